"""The native checkpoint: the same bits back, and a clear error for everything that is not one."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from safetensors.torch import load_file, save_file

import parapolicy
from parapolicy.normalizer import Affine, Normalizer
from parapolicy.spec import PolicySpec
from tests.conftest import SHIPPED
from tests.fuzzing import checkpoints as fuzzing
from tests.helpers import small_policy, small_spec, some_observation


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    parapolicy.save_policy(small_policy(), tmp_path / "policy")
    return tmp_path / "policy"


@pytest.fixture
def old_folder(tmp_path: Path) -> Path:
    """From before the digests: what is in it is all that can be checked."""
    return fuzzing.write(tmp_path / "old", fuzzing.without_digests(fuzzing.saved_policy()))


def edit_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def edit_scheduler(**changes: Any) -> Callable[[Path], None]:
    return edit_config(lambda config: config["spec"]["scheduler"].update(changes))


def edit_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def edit_text(old: str, new: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        text = (folder / "config.json").read_text()
        assert old in text
        (folder / "config.json").write_text(text.replace(old, new))

    return edit


def nested(depth: int) -> Any:
    return {"a": nested(depth - 1)} if depth else {}


def truncate(name: str, keep: float) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return edit


def test_round_trip_is_exact(folder: Path, tmp_path: Path) -> None:
    first = parapolicy.load_policy(folder, device="cpu", engine="eager")
    parapolicy.save_policy(first, tmp_path / "again")
    second = parapolicy.load_policy(tmp_path / "again", device="cpu", engine="eager")
    assert first.spec == second.spec
    for name, value in first.network.state_dict().items():
        assert torch.equal(value, second.network.state_dict()[name])
    observation = some_observation(first.spec)
    assert (first.predict(observation).actions == second.predict(observation).actions).all()
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["config.json", "model.safetensors"]


def test_film_without_scale_round_trips(tmp_path: Path) -> None:
    network = {**small_spec().network, "cond_predict_scale": False}
    parapolicy.save_policy(small_policy(network=network), tmp_path)
    assert parapolicy.load_policy(tmp_path, engine="eager").spec.network["cond_predict_scale"] is False


DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "truncated config": (truncate("config.json", 0.5), "is not a JSON text"),
    "binary config": (lambda f: (f / "config.json").write_bytes(b"\x80\x04\x95\xff"), "is not a JSON text"),
    "deep config": (lambda f: (f / "config.json").write_text("[" * 100_000), "is not a JSON text"),
    "other JSON": (lambda f: (f / "config.json").write_text("[]"), "not the configuration of a parapolicy"),
    "foreign config": (edit_config(lambda c: c.update(format="lerobot")), "not the configuration of a parapolicy"),
    "newer version": (edit_config(lambda c: c.update(version=3)), "has version 3"),
    "unknown key": (edit_config(lambda c: c["spec"].update(horizn=8)), "unknown keys .'horizn'"),
    "missing key": (edit_config(lambda c: c["spec"].pop("horizon")), "lacks .'horizon'"),
    "text for a number": (edit_config(lambda c: c["spec"].update(horizon="8")), "horizon is '8'"),
    "odd horizon": (edit_config(lambda c: c["spec"].update(horizon=9)), "horizon is 9"),
    "too many actions": (edit_config(lambda c: c["spec"].update(n_action_steps=8)), "n_action_steps is 8"),
    "unknown network": (edit_config(lambda c: c["spec"]["network"].update(name="mlp")), "network name is 'mlp'"),
    "unknown argument": (edit_config(lambda c: c["spec"]["network"].update(depth=3)), "depth"),
    "no levels": (edit_config(lambda c: c["spec"]["network"].update(down_dims=[])), "down_dims is .., expected a list"),
    "negative width": (edit_config(lambda c: c["spec"]["network"].update(down_dims=[-16, 32])), "down_dims.0. is -16"),
    "huge network": (edit_config(lambda c: c["spec"]["network"].update(down_dims=[2**18, 2**19])), "from config.json"),
    "other width": (edit_config(lambda c: c["spec"]["network"].update(down_dims=[16, 64])), "from config.json"),
    "other observation": (edit_config(lambda c: c["spec"]["observation"][0].update(shape=[3])), "from config.json"),
    "renamed observation": (edit_config(lambda c: c["spec"]["observation"][0].update(key="other")), "missing tensors"),
    "endless horizon": (edit_config(lambda c: c["spec"].update(horizon=2**40)), "horizon is 1099511627776"),
    "endless schedule": (edit_scheduler(num_train_timesteps=10**12), "num_train_timesteps is 1000000000000"),
    "unknown scheduler": (edit_scheduler(_class_name="PNDMScheduler"), "PNDMScheduler"),
    "text for a beta": (edit_scheduler(beta_schedule="linear", beta_start="x"), "gives no schedule: beta_start is 'x'"),
    "misspelt setting": (edit_scheduler(predction_type="sample"), "did you mean 'prediction_type'"),
    "doubled key": (edit_text('"horizon": 8', '"horizon": 8, "horizon": 16'), "keys .'horizon'. occur twice"),
    "not a number": (edit_text('"control_hz": 10', '"control_hz": NaN'), "NaN is not a JSON number"),
    "minus infinity": (edit_text('"control_hz": 10', '"control_hz": -Infinity'), "-Infinity is not a JSON number"),
    "unknown top key": (edit_config(lambda c: c.update(weights_sha257="")), "unknown keys .'weights_sha257'"),
    "version as a truth": (edit_config(lambda c: c.update(version=True)), "has version True"),
    "large config": (
        lambda f: (f / "config.json").write_text(" " * 2**20 + "{}"),
        "has 1048578 bytes, expected at most",
    ),
    "large header": (
        lambda f: (f / "model.safetensors").write_bytes((2**23).to_bytes(8, "little")),
        "header is larger",
    ),
    "truth as a size": (edit_config(lambda c: c["spec"]["observation"][0].update(shape=[True, 2])), "shape .True, 2"),
    "text as a size": (edit_config(lambda c: c["spec"]["observation"][0].update(shape=["2"])), "shape .'2'"),
    "fraction as a size": (edit_config(lambda c: c["spec"]["observation"][0].update(shape=[2.0])), "shape .2.0"),
    "text as a shape": (edit_config(lambda c: c["spec"]["observation"][0].update(shape="2")), "shape '2'"),
    "number as a key": (edit_config(lambda c: c["spec"]["observation"][0].update(key=3)), "observation entry is"),
    "rate as a truth": (edit_config(lambda c: c["spec"].update(control_hz=True)), "control_hz is True"),
    "endless rate": (edit_config(lambda c: c["spec"].update(control_hz=10**400)), "control_hz is 1000"),
    "long provenance": (edit_config(lambda c: c["spec"].update(provenance={"a": "x" * 2**19})), "provenance is longer"),
    "deep provenance": (edit_config(lambda c: c["spec"].update(provenance=nested(20))), "provenance is nested more"),
    "many levels": (edit_config(lambda c: c["spec"]["network"].update(down_dims=[16] * 10**3)), "down_dims is .16, 16"),
    "fractional width": (
        edit_config(lambda c: c["spec"]["network"].update(down_dims=[16.0, 32])),
        "down_dims.0. is 16.0",
    ),
    "truth as groups": (edit_config(lambda c: c["spec"]["network"].update(n_groups=True)), "n_groups is True"),
    "negative groups": (edit_config(lambda c: c["spec"]["network"].update(n_groups=-4)), "n_groups is -4"),
    "text as a truth": (
        edit_config(lambda c: c["spec"]["network"].update(cond_predict_scale="no")),
        "cond_predict_scale is 'no'",
    ),
    "list of observations": (edit_config(lambda c: c["spec"].update(observation=[1])), "observation entry is 1"),
    "odd embedding": (edit_config(lambda c: c["spec"]["network"].update(diffusion_step_embed_dim=3)), "embed_dim is 3"),
    "truncated weights": (truncate("model.safetensors", 0.5), "damaged"),
    "empty weights": (truncate("model.safetensors", 0.0), "damaged"),
    "pickled weights": (lambda f: torch.save({"a": 1}, f / "model.safetensors"), "damaged"),
    "missing tensor": (
        edit_weights(lambda t: t.pop("network.final_conv.1.bias")),
        "missing tensors .'network.final_conv",
    ),
    "extra tensor": (edit_weights(lambda t: t.update(extra=torch.ones(1))), "unexpected tensors .'extra'"),
    "no normalizer": (edit_weights(lambda t: t.pop("normalizer.action.scale")), "missing tensors .'normalizer.action"),
    "zero scale": (edit_weights(lambda t: t["normalizer.action.scale"].zero_()), "scale of 0"),
    "NaN weight": (edit_weights(lambda t: t["network.final_conv.1.bias"].fill_(torch.nan)), "not finite"),
    "half weight": (
        edit_weights(lambda t: t.update({"network.final_conv.1.bias": torch.ones(2).half()})),
        "has type F16",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(old_folder: Path, damage: str) -> None:
    edit, message = DAMAGES[damage]
    edit(old_folder)
    with pytest.raises(parapolicy.CheckpointError, match=message) as caught:
        parapolicy.load_policy(old_folder, engine="eager")
    assert len(str(caught.value)) < 500 + len(str(old_folder))


def test_every_flipped_byte_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    """Each byte of config.json, and of the weights 150 of the header and of the body; the bit by turns."""
    network = {"name": "unet1d", "diffusion_step_embed_dim": 4, "down_dims": [4], "n_groups": 1}
    parapolicy.save_policy(small_policy(network=network), tmp_path)
    expected = fuzzing.load(tmp_path)
    assert expected is not None
    tried: Counter[str] = Counter()
    for name in ("config.json", "model.safetensors"):
        written = (tmp_path / name).read_bytes()
        header = 8 + int.from_bytes(written[:8], "little")
        places = [*range(0, header, header // 150), *range(header, len(written), len(written) // 150)]
        for k, position in enumerate(range(len(written)) if name == "config.json" else places):
            (tmp_path / name).write_bytes(fuzzing.flip(written, position, 1 << k % 8))
            policy = fuzzing.load(tmp_path)
            tried[f"{name} refused" if policy is None else f"{name} equal"] += 1
            if policy is not None:
                fuzzing.assert_equal(policy, expected)
        (tmp_path / name).write_bytes(written)
    assert set(tried) <= {"config.json refused", "config.json equal", "model.safetensors refused"}
    assert tried["config.json refused"] > 500
    assert tried["model.safetensors refused"] > 200


@pytest.mark.parametrize("case", fuzzing.CASES)
def test_random_damage_is_refused_or_changes_nothing(case: str, tmp_path: Path) -> None:
    """A short slice of ``make fuzz``."""
    rng = np.random.default_rng(0)
    found = Counter(fuzzing.CASES[case](rng, tmp_path) for _ in range(25))
    assert found["refused"]
    assert set(found) <= {"refused", "equal"}


def test_an_edited_config_says_how_to_change_a_policy(folder: Path, tmp_path: Path) -> None:
    policy = parapolicy.load_policy(folder, device="cpu", engine="eager")
    edit_config(lambda config: config["spec"].update(control_hz=20))(folder)
    with pytest.raises(
        parapolicy.CheckpointError, match=r"config.json differs from the one that .* parapolicy.save_policy\(replace"
    ):
        parapolicy.load_policy(folder, engine="eager")
    spec = dataclasses.replace(policy.spec, control_hz=20)
    parapolicy.save_policy(dataclasses.replace(policy, spec=spec), folder)
    assert parapolicy.load_policy(folder, device="cpu", engine="eager").spec.control_hz == 20


def test_a_rewritten_layout_is_the_same_policy(folder: Path) -> None:
    """Keys in another order, other white space, 1 for 1.0: what tools do that read and write JSON."""
    expected = parapolicy.load_policy(folder, device="cpu", engine="eager")
    config = json.loads((folder / "config.json").read_text())
    config["spec"]["control_hz"] = 10.0
    (folder / "config.json").write_text(json.dumps(config, sort_keys=True))
    loaded = parapolicy.load_policy(folder, device="cpu", engine="eager")
    assert list(loaded.spec.observation) == ["position", "points"]
    fuzzing.assert_equal(loaded, expected)


@pytest.mark.parametrize("digests", [True, False])
def test_sorted_keys_of_version_1_beside_new_weights_are_refused(folder: Path, digests: bool) -> None:
    """Its observations were in a map, whose order is lost."""
    config = json.loads((folder / "config.json").read_text())
    config["version"] = 1
    config["spec"]["observation"] = {entry["key"]: entry["shape"] for entry in config["spec"]["observation"]}
    if not digests:
        del config["weights_sha256"]
    (folder / "config.json").write_text(json.dumps(config, sort_keys=True))
    with pytest.raises(parapolicy.CheckpointError, match="spec_sha256 differs"):
        parapolicy.load_policy(folder, engine="eager")


def test_a_digest_left_out_is_refused(folder: Path, tmp_path: Path) -> None:
    written = fuzzing.saved_policy()
    old = fuzzing.without_digests(written)
    assert fuzzing.load(fuzzing.write(tmp_path / "old", old)) is not None
    for name in written:
        fuzzing.write(folder, {**written, name: old[name]})
        with pytest.raises(parapolicy.CheckpointError, match="weights_sha256 is missing or differs"):
            parapolicy.load_policy(folder, engine="eager")


def test_the_digest_is_that_of_sha256sum(folder: Path) -> None:
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert json.loads((folder / "config.json").read_text())["weights_sha256"] == digest


def test_minus_infinity_of_diffusers_is_left_out(tmp_path: Path) -> None:
    """Its default, no bound, for which JSON has no form."""
    made = DPMSolverMultistepScheduler(20, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    scheduler = {"_class_name": type(made).__name__, **made.config}
    assert scheduler["lambda_min_clipped"] == -np.inf
    policy = small_policy(scheduler=scheduler)
    parapolicy.save_policy(policy, tmp_path)
    fuzzing.assert_equal(parapolicy.load_policy(tmp_path, sampler="sequential", device="cpu", engine="eager"), policy)


def test_too_long_a_config_is_not_saved(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    lists = {"a": {"b": {"c": [0] * 80_000}}}  # short on one line, long with a line for each number
    with pytest.raises(parapolicy.CheckpointError, match="expected at most 1048576"):
        parapolicy.save_policy(small_policy(provenance=lists), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_damaged_config_of_lerobot_s_inner_folder_is_named(tmp_path: Path) -> None:
    inner = tmp_path / "pretrained_model"
    inner.mkdir()
    (inner / "config.json").write_text("{")
    with pytest.raises(parapolicy.CheckpointError, match=r"pretrained_model/config.json is not a JSON text"):
        parapolicy.load_policy(tmp_path, engine="eager")


def test_no_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(parapolicy.CheckpointError, match=r"no checkpoint at .*nowhere.*: there is no such file"):
        parapolicy.load_policy(tmp_path / "nowhere", engine="eager")


def test_diverged_weights_are_not_saved(folder: Path) -> None:
    policy = small_policy()
    policy.network.final_conv[1].bias.fill_(torch.inf)
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(parapolicy.CheckpointError, match=r"final_conv.1.bias"):
        parapolicy.save_policy(policy, folder)
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "value"), [("n_obs_steps", 0), ("action_dim", True), ("control_hz", 0), ("control_hz", float("inf"))]
)
def test_bad_counts_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        small_spec(**{name: value})


def test_spec_survives_json() -> None:
    spec = small_spec(provenance={"data": "made up"})
    assert PolicySpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_normalizer_fits_range_and_inverts() -> None:
    values = torch.rand(50, 3) * torch.tensor([500.0, 1.0, 0.0]) + torch.tensor([10.0, -3.0, 7.0])
    normalizer = Normalizer.fit({"action": values})
    normalized = normalizer.normalize("action", values)
    torch.testing.assert_close(normalized.amin(0), torch.tensor([-1.0, -1.0, 0.0]))
    torch.testing.assert_close(normalized.amax(0), torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(normalizer.unnormalize("action", normalized), values, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="not finite"):
        Normalizer({"action": Affine(torch.tensor([torch.nan]), torch.zeros(1))})


def test_the_shipped_policy_is_small_and_complete(shipped: parapolicy.Policy) -> None:
    assert (SHIPPED / "model.safetensors").stat().st_size <= 20e6
    spec = shipped.spec
    assert (spec.n_obs_steps, spec.horizon, spec.n_action_steps) == (2, 16, 8)
    assert len(shipped.schedule) == 100
    assert shipped.schedule.solver == "ddpm"
    assert "success rate" in (SHIPPED / "README.md").read_text()


def test_files_with_observations_in_a_map_keep_loading(old_folder: Path) -> None:
    """Version 1 kept them so; their order counts."""
    expected = parapolicy.load_policy(old_folder, device="cpu", engine="eager")
    path = old_folder / "config.json"
    config = json.loads(path.read_text())
    config["version"] = 1
    config["spec"]["observation"] = {entry["key"]: entry["shape"] for entry in config["spec"]["observation"]}
    path.write_text(json.dumps(config))
    fuzzing.assert_equal(parapolicy.load_policy(old_folder, device="cpu", engine="eager"), expected)
