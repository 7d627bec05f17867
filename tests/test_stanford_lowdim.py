"""Low-dim checkpoints of real-stanford/diffusion_policy, made up from our own networks: every option, and refusals."""

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import parapolicy
from parapolicy import CheckpointError
from parapolicy.checkpoint import read_checkpoint
from parapolicy.networks import Network
from tests import stanford_files as files
from tests.stanford_files import assert_same
from tests.torch_files import as_config, stand_ins

OBSERVATION = {"obs": (3,)}


def lowdim(path: Path, network: dict[str, Any], config: dict[str, Any], **spec: Any) -> tuple[Any, Network]:
    """A made-up low-dim file, read; and the network that it was made from."""
    _, built = files.network_of(network, OBSERVATION, **spec)
    state = files.model_state(built) | files.normaliser_state(obs=3, action=2)
    return read_checkpoint(files.save(path / "x.ckpt", config, state)), built


def test_a_made_up_file_acts_as_its_network(tmp_path: Path) -> None:
    loaded, built = lowdim(tmp_path, files.UNET, files.lowdim_config())
    assert_same(loaded.network, built)
    assert loaded.spec.observation == {"obs": parapolicy.Feature((3,))}
    assert loaded.spec.control_hz is None
    assert loaded.spec.provenance["weights"] == "ema_model"
    assert torch.equal(loaded.normalizer.normalize("obs", torch.ones(3)), torch.full((3,), 0.75))
    policy = parapolicy.load_policy(tmp_path / "x.ckpt", device="cpu", sampler="sequential", engine="eager")
    assert policy.predict({"obs": np.zeros((2, 3), np.float32)}).actions.shape == (4, 2)


@pytest.mark.parametrize(
    ("dataset", "parts"),
    [
        ({"_target_": "x.PushTLowdimDataset"}, ["keypoint", "agent_pos"]),
        ({"_target_": "x.PushTLowdimDataset", "obs_key": "corners"}, None),
        ({"_target_": "x.RobomimicReplayLowdimDataset", "obs_keys": ["object", "gripper"]}, ["object", "gripper"]),
        ({"_target_": "x.RobomimicReplayLowdimDataset"}, None),
        ({"_target_": "mine.Dataset", "obs_keys": ["object", "gripper"]}, None),  # may join them in another way
        ({}, None),
    ],
)
def test_the_parts_of_its_observation_are_those_of_a_known_data_set(
    tmp_path: Path, dataset: dict[str, Any], parts: list[str] | None
) -> None:
    loaded, _ = lowdim(tmp_path, files.UNET, files.lowdim_config() | {"task": {"dataset": dataset}})
    assert loaded.spec.provenance.get("obs") == parts


def test_raw_weights_act_where_no_average_was_kept(tmp_path: Path) -> None:
    config = files.lowdim_config()
    config["training"]["use_ema"] = False
    _, built = files.network_of(files.UNET, OBSERVATION)
    state = files.model_state(built) | files.normaliser_state(obs=3, action=2)
    other = {k: torch.zeros_like(v) for k, v in state.items()}
    loaded = read_checkpoint(files.save(tmp_path / "x.ckpt", config, other, model=state))
    assert_same(loaded.network, built)
    assert loaded.spec.provenance["weights"] == "model"


@pytest.mark.parametrize("scale", [True, False])
def test_film_with_and_without_scale(tmp_path: Path, scale: bool) -> None:
    config = files.lowdim_config()
    config["policy"]["model"]["cond_predict_scale"] = scale
    loaded, built = lowdim(tmp_path, {**files.UNET, "cond_predict_scale": scale}, config)
    assert_same(loaded.network, built)
    config["policy"]["model"]["cond_predict_scale"] = not scale
    with pytest.raises(CheckpointError, match=r"cond_predict_scale is (True|False) in its config, but its tensors"):
        lowdim(tmp_path, {**files.UNET, "cond_predict_scale": scale}, config)


def test_the_last_group_norm_has_eight_groups_whatever_the_config_says(tmp_path: Path) -> None:
    config = files.lowdim_config()
    config["policy"]["model"]["n_groups"] = 4
    loaded, _ = lowdim(tmp_path, {**files.UNET, "n_groups": 4, "final_groups": 8}, config)
    assert loaded.spec.network["n_groups"] == 4
    assert loaded.network.final_conv[0].block[1].num_groups == 8
    assert loaded.network.mid_modules[0].blocks[0].block[1].num_groups == 4


@pytest.mark.parametrize(
    ("oa_step_convention", "only", "n_obs_steps", "executed", "horizon"),
    [
        (True, False, 2, (1, 5), 8),
        (False, False, 2, (2, 6), 8),
        (True, True, 2, (0, 4), 4),
        (False, False, 1, (1, 5), 8),
    ],
)
def test_which_actions_are_executed(
    tmp_path: Path, oa_step_convention: bool, only: bool, n_obs_steps: int, executed: tuple[int, int], horizon: int
) -> None:
    options = {"oa_step_convention": oa_step_convention, "pred_action_steps_only": only, "n_obs_steps": n_obs_steps}
    loaded, _ = lowdim(tmp_path, files.UNET, files.lowdim_config(**options), n_obs_steps=n_obs_steps)
    assert loaded.spec.executed == slice(*executed)
    assert loaded.spec.horizon == horizon


def test_latency_steps_are_part_of_the_actions(tmp_path: Path) -> None:
    config = files.lowdim_config(n_action_steps="${eval:'${n_action_steps}+${n_latency_steps}'}")
    config |= {"n_action_steps": 4, "n_latency_steps": 2}
    loaded, _ = lowdim(tmp_path, files.UNET, config)
    assert loaded.spec.executed == slice(1, 7)
    assert loaded.spec.provenance["n_latency_steps"] == 2


@pytest.mark.parametrize("condition", ["local", "inpaint"])
def test_unets_conditioned_locally_and_by_inpainting(tmp_path: Path, condition: str) -> None:
    config = files.lowdim_config(obs_as_global_cond=False, obs_as_local_cond=condition == "local")
    observed = 3 if condition == "inpaint" else 0
    loaded, built = lowdim(tmp_path, {**files.UNET, "condition": condition}, config, observed_dim=observed)
    assert_same(loaded.network, built)
    assert loaded.spec.network["condition"] == condition
    assert loaded.spec.sample_shape == (8, 2 + observed)
    config["policy"]["obs_as_local_cond"] = not config["policy"]["obs_as_local_cond"]
    with pytest.raises(CheckpointError, match="obs_as_local_cond"):
        lowdim(tmp_path, {**files.UNET, "condition": condition}, config, observed_dim=observed)


TRANSFORMERS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "causal": ({}, {}, {}),
    "not causal": ({"causal_attn": False}, {}, {"causal_attn": False}),
    "condition layers": ({"n_cond_layers": 1}, {}, {"n_cond_layers": 1}),
    "inpainting": ({"condition": "inpaint"}, {"obs_as_cond": False}, {}),
    "encoder only": (
        {"condition": "inpaint", "time_as_condition": False},
        {"obs_as_cond": False},
        {"time_as_cond": False, "n_cond_layers": 4},
    ),
}


def transformer_config(model: dict[str, Any], policy: dict[str, Any]) -> dict[str, Any]:
    config = files.lowdim_config(unet=False, **policy)
    config["policy"]["model"] |= model
    return config


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(tmp_path: Path, name: str) -> None:
    arguments, policy, model = TRANSFORMERS[name]
    observed = 3 if "condition" in arguments else 0
    loaded, built = lowdim(
        tmp_path, {**files.TRANSFORMER, **arguments}, transformer_config(model, policy), observed_dim=observed
    )
    assert_same(loaded.network, built)
    assert loaded.spec.executed == slice(1, 5)
    assert loaded.spec.observed_dim == observed


def test_a_transformer_that_predicts_only_what_is_executed(tmp_path: Path) -> None:
    """Without masks, the published network takes the first positions of its table; with them it cannot run."""
    for causal in (False, True):
        config = transformer_config({"causal_attn": causal}, {"pred_action_steps_only": True})
        _, built = files.network_of({**files.TRANSFORMER, "causal_attn": causal}, OBSERVATION)
        state = files.model_state(built) | files.normaliser_state(obs=3, action=2)
        path = files.save(tmp_path / "x.ckpt", config, state)
        if causal:
            with pytest.raises(CheckpointError, match="pos_emb has 8 positions, but its config"):
                read_checkpoint(path)
        else:
            loaded = read_checkpoint(path)
            assert loaded.spec.executed == slice(0, 4)
            assert loaded.spec.horizon == 4
            transformer: Any = loaded.network
            assert torch.equal(transformer.pos_emb, state["model.pos_emb"][:, :4])


@pytest.mark.parametrize("name", ["mask", "memory_mask"])
def test_other_masks_are_refused(tmp_path: Path, name: str) -> None:
    _, built = files.network_of(files.TRANSFORMER, OBSERVATION)
    state = files.model_state(built) | files.normaliser_state(obs=3, action=2)
    state[f"model.{name}"] = torch.zeros_like(state[f"model.{name}"])
    path = files.save(tmp_path / "x.ckpt", transformer_config({}, {}), state)
    with pytest.raises(CheckpointError, match=rf"model\.{name} is not the causal mask"):
        read_checkpoint(path)
    del state[f"model.{name}"]
    files.save(path, transformer_config({}, {}), state)
    with pytest.raises(CheckpointError, match=rf"model\.{name} is not the causal mask|causal_attn"):
        read_checkpoint(path)


def schedule_of(tmp_path: Path, **options: Any) -> Any:
    _, built = files.network_of(files.UNET, OBSERVATION)
    state = files.model_state(built) | files.normaliser_state(obs=3, action=2)
    files.save(tmp_path / "x.ckpt", files.lowdim_config(**options), state)
    return parapolicy.load_policy(tmp_path / "x.ckpt", device="cpu", engine="eager").schedule


def test_schedules_are_those_of_diffusers_0_11(tmp_path: Path) -> None:
    schedule = schedule_of(tmp_path, num_inference_steps=16)
    assert schedule.solver == "ddpm"
    assert schedule.timesteps.tolist() == list(range(96, -1, -6))  # 17 steps
    schedule = schedule_of(tmp_path, noise_scheduler=files.DDIM, num_inference_steps=8)
    assert schedule.solver == "ddim"
    assert schedule.timesteps.tolist() == list(range(84, -1, -12))
    assert not schedule.S.any()
    assert schedule_of(tmp_path, noise_scheduler=files.DDIM, num_inference_steps=8, eta=0.5).S.any()
    assert len(schedule_of(tmp_path, num_inference_steps=None)) == 100
    newer = {**files.DDPM, "timestep_spacing": "trailing"}
    assert schedule_of(tmp_path, noise_scheduler=newer, num_inference_steps=10).timesteps[0] == 99


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 0.5}, r"policy\.eta is 0\.5"),
        ({"use_clipped_model_output": True, "noise_scheduler": files.DDIM}, "use_clipped_model_output is True"),
        ({"predict_epsilon": False}, r"policy\.predict_epsilon is False"),
        ({"noise_scheduler": {**files.DDIM, "prediction_type": "sample"}}, "DDIM with prediction_type 'sample'"),
        ({"noise_scheduler": {**files.DDPM, "_target_": "os.system"}}, "its scheduler is 'os.system'"),
        ({"noise_scheduler": {**files.DDPM, "_target_": "mine.DDPMScheduler"}}, "its scheduler is 'mine.DDPM"),
        ({"noise_scheduler": {**files.DDPM, "thresolding": True}}, "thresolding"),
        ({"num_inference_steps": 200}, "num_inference_steps is 200, expected at most 100"),
        ({"n_action_steps": 8}, "n_action_steps is 8, expected at most 7"),
        ({"horizon": 9}, "expected a multiple of 2"),
        ({"horizon": "${oc.env:HOME}"}, r"policy\.horizon is the expression '\$\{oc\.env:HOME\}'.*never evaluated"),
        ({"horizon": "${policy.horizon}"}, "refers to itself"),
        ({"horizon": "${nowhere}"}, "which does not exist"),
        ({"horizon": "???"}, "has no value"),
        ({"horizon": "${eval:'8 if 1 else 9'}"}, "never evaluated"),
        ({"n_obs_steps": 3}, "cond_encoder.1.weight has shape"),
        ({"obs_dim": 4}, r"policy\.obs_dim is 4 in its config, but its tensors are for 3"),
        ({"action_dim": 3}, r"policy\.action_dim is 3 in its config, but its tensors are for 2"),
        ({"model": {"_target_": "x.OtherUnet"}}, "OtherUnet"),
        ({"_target_": "diffusion_policy.policy.x.IbcDfoLowdimPolicy"}, "its policy is 'IbcDfoLowdimPolicy'"),
        ({"obs_as_local_cond": True}, "both on"),
    ],
)  # fmt: skip
def test_what_would_change_the_answers_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        schedule_of(tmp_path, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.extra": torch.zeros(2)}, r"unexpected \['extra'\]"),
        ({"extra": torch.zeros(2)}, r"unknown tensors \['extra'\]"),
        ({"normalizer.params_dict.obs.extra": torch.zeros(2)}, "unknown tensors"),
        ({"normalizer.params_dict.action.scale": torch.zeros(2)}, "scale of 0"),
        ({"normalizer.params_dict.action.scale": torch.full((2,), torch.nan)}, "not finite"),
        ({"normalizer.params_dict.action.scale": torch.ones(3)}, "the normaliser's action.scale has shape"),
        ({"normalizer.params_dict.action.scale": torch.ones(2).double()}, "float64, expected float32"),
        ({"normalizer.params_dict.action.scale": None}, "no normaliser of 'action'"),
        ({"model.final_conv.1.bias": torch.full((2,), torch.inf)}, "not finite"),
        ({"model.final_conv.1.bias": torch.zeros(3)}, "final_conv.1.bias has shape"),
        ({"model.final_conv.1.bias": torch.zeros(2).half()}, "torch.float16"),
        ({"model.final_conv.1.bias": None}, r"missing \['final_conv.1.bias'\]"),
        ({"model.down_modules.0.0.blocks.0.block.0.weight": None}, "lacks the tensor"),
        ({"model.down_modules.0.0.blocks.0.block.0.weight": torch.zeros(8)}, "expected 3 axes"),
        ({"model.final_conv.1.bias": "no tensor"}, "which is not a tensor"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    _, built = files.network_of(files.UNET, OBSERVATION)
    state: dict[str, Any] = {**files.model_state(built), **files.normaliser_state(obs=3, action=2), **change}
    state = {name: value for name, value in state.items() if value is not None}
    path = files.save(tmp_path / "x.ckpt", files.lowdim_config(), state, model={})
    with pytest.raises(CheckpointError, match=rf"x\.ckpt: .*{message}"):
        read_checkpoint(path)


def test_a_normaliser_of_one_number_is_for_all(tmp_path: Path) -> None:
    _, built = files.network_of(files.UNET, OBSERVATION)
    state = files.model_state(built) | files.normaliser_state(obs=1, action=1, unused=5)
    loaded = read_checkpoint(files.save(tmp_path / "x.ckpt", files.lowdim_config(), state))
    assert loaded.normalizer.maps["obs"].scale.shape == (3,)
    assert loaded.normalizer.maps["action"].offset.tolist() == [0.25, 0.25]


def test_configs_of_omegaconf_resolved_and_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = stand_ins(monkeypatch)
    config = files.lowdim_config(horizon="${horizon}", obs_dim="${task.obs_dim}", n_obs_steps="${n_obs_steps}")
    config |= {"horizon": "${deeper.0.value}", "deeper": [{"value": 8}], "n_obs_steps": 2, "task": {"obs_dim": 3}}
    config["policy"]["model"] |= {"input_dim": "${eval: anything}", "down_dims": "${dims}"}
    config |= {"dims": [8, 16], "run": "${now:%Y.%m.%d}_${name}"}
    loaded, built = lowdim(tmp_path, files.UNET, as_config(classes, config))
    assert_same(loaded.network, built)
    assert loaded.spec.horizon == 8


def test_shared_and_cyclic_values_that_are_not_needed_do_not_matter(tmp_path: Path) -> None:
    laughs: Any = "ha"
    for _ in range(60):
        laughs = [laughs] * 8
    cyclic: dict[str, Any] = {}
    cyclic["self"] = cyclic
    config = files.lowdim_config() | {"task": {"name": "x", "laughs": laughs}, "cyclic": cyclic}
    loaded, built = lowdim(tmp_path, files.UNET, config)
    assert_same(loaded.network, built)
    for bad in (laughs, cyclic, "${a}"):
        config = files.lowdim_config(noise_scheduler={**files.DDPM, "trained_betas": bad})
        config["a"] = "+".join(["${eval:'${a}", *["${a}"] * 5]) + "'}"
        with pytest.raises(CheckpointError, match=r"too large or nested|refers to itself|expression"):
            lowdim(tmp_path, files.UNET, config)


def test_odd_values_in_the_config_are_errors_that_name_the_file(tmp_path: Path) -> None:
    """Every value that counts, replaced by each of these."""
    _, built = files.network_of(files.UNET, OBSERVATION)
    state = files.model_state(built) | files.normaliser_state(obs=3, action=2)
    honest = files.lowdim_config()
    places = [("policy", key) for key in honest["policy"]]
    places += [("policy", "model", key) for key in honest["policy"]["model"]]
    places += [("policy", "noise_scheduler", key) for key in honest["policy"]["noise_scheduler"]]
    places += [("training", "use_ema"), ("training",), ("policy",), ("n_latency_steps",)]
    odd: list[Any] = [None, -1, 2**40, float("nan"), "x", {1: 2}]
    for place, value in itertools.product(places, odd):
        config = copy.deepcopy(honest)
        inner = config
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        path = files.save(tmp_path / "odd.ckpt", config, state, model={})
        try:
            parapolicy.load_policy(path, device="cpu", engine="eager")
        except CheckpointError as error:
            if "odd.ckpt" not in str(error):
                pytest.fail(f"{place} {value!r}: {error}")


@pytest.mark.parametrize(
    "payload", [{}, [], {"cfg": {}, "state_dicts": []}, {"state_dicts": {"model": {}}}, "state_dicts"]
)
def test_other_payloads_are_refused(tmp_path: Path, payload: Any) -> None:
    torch.save(payload, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"x\.ckpt"):
        read_checkpoint(tmp_path / "x.ckpt")


def test_other_policies_are_refused_by_name(tmp_path: Path) -> None:
    config = files.lowdim_config()
    config["policy"]["_target_"] = "diffusion_policy.policy.x.DiffusionTransformerTimmPolicy"
    path = files.save(tmp_path / "umi.ckpt", config, {"x": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="its policy is 'DiffusionTransformerTimmPolicy', expected one of"):
        read_checkpoint(path)
