"""Policies as plan files: sampled without Python, equal to the bit."""

import ctypes
import dataclasses
import math
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import parapolicy
from parapolicy import export
from parapolicy.calibrate import with_calibration
from parapolicy.cli import main
from parapolicy.engine import native_build, native_library
from parapolicy.normalizer import Affine, Normalizer
from parapolicy.observation import ObservationHistory
from parapolicy.planner import made_up_observations
from parapolicy.policy import Chunk
from tests.conftest import ROOT, SHIPPED
from tests.embedded import (
    BAD_ARGUMENT,
    BAD_OBSERVATION,
    BAD_RESULT,
    NO_FILE,
    NO_PLAN,
    OK,
    Embedded,
    Options,
    flat,
    native,
)
from tests.helpers import DDPM_CONFIG, small_policy, some_observation

OTHER_FLAGS = ("-shared", "-fPIC", native_build.NATIVE)  # of a library, or of the processor
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")


@pytest.fixture
def embedded() -> Embedded:
    return Embedded()


def shipped_policy(name: str, engine: str = "fused") -> parapolicy.Policy:
    folder = ROOT / "checkpoints" / name
    return native(
        with_calibration(parapolicy.load_policy(folder, device="cpu", engine="eager"), folder, measure=False), engine
    )


def assert_equal_chunks(embedded: Embedded, policy: parapolicy.Policy, path: Path, observations: list[Any]) -> None:
    export.write_plan(policy, path)
    assert embedded.load(path) == OK
    for seed, observation in enumerate(observations):
        expected: Chunk = policy.predict(observation, seed=seed)
        noise = parapolicy.draw_noise(policy.schedule, seed=seed).numpy()
        code, trajectory = embedded.sample(flat(policy.spec, observation), noise)
        assert code == OK
        assert np.array_equal(trajectory, expected.trajectory)
        found = embedded.stats.rounds, embedded.stats.evaluations, bool(embedded.stats.complete)
        assert found == (expected.stats.rounds, expected.stats.evaluations, True)


@pytest.mark.parametrize("name", ["pusht_lowdim", "lift_lowdim", "can_lowdim", "square_lowdim"])
def test_a_shipped_policy_s_chunks_are_equal_to_the_bit(name: str, embedded: Embedded, tmp_path: Path) -> None:
    policy = shipped_policy(name)
    observations = made_up_observations(policy, 3)
    for candidate in (policy.with_sampler("collocation"), policy.with_schedule("ddim", 10).with_sampler("sequential")):
        assert_equal_chunks(embedded, candidate, tmp_path / "plan", observations)
    sizes, spec = embedded.sizes, policy.spec
    assert (sizes.obs_steps, sizes.observed) == (2, spec.condition_dim / 2)
    assert (sizes.horizon, sizes.action_dim, sizes.steps) == (*spec.sample_shape, 10)
    assert (sizes.first_action, sizes.action_steps, sizes.control_hz) == (1, 8, spec.control_hz)
    assert sizes.noise == 11 * math.prod(spec.sample_shape)


def test_bfloat16_is_equal_to_the_bit(embedded: Embedded, tmp_path: Path) -> None:
    if not native_library.load_library().parapolicy_multiplies_bfloat16():
        pytest.skip("no instruction for products of bfloat16 here")
    policy = shipped_policy("pusht_lowdim", "fused_bfloat16")
    for sampler in ("collocation", "sequential"):
        candidate = policy.with_sampler(sampler)
        assert_equal_chunks(embedded, candidate, tmp_path / "plan", made_up_observations(policy, 2))


WAYS: dict[str, Callable[[parapolicy.Policy], parapolicy.Policy]] = {
    "clipping whose excess stays": lambda policy: policy.with_schedule("ddim", 7, eta=0.5),
    "second order": lambda policy: policy.with_schedule("dpmsolver++", 9, order=2),
    "nodes without calibration": lambda policy: policy.with_sampler("collocation", nodes=6, window=2),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_every_schedule_is_equal_to_the_bit(way: str, prediction: str, embedded: Embedded, tmp_path: Path) -> None:
    scheduler = {**DDPM_CONFIG, "num_train_timesteps": 20, "prediction_type": prediction, "clip_sample_range": 0.5}
    policy = WAYS[way](native(small_policy(scheduler=scheduler)))
    assert_equal_chunks(embedded, policy, tmp_path / "plan", [some_observation(policy.spec, seed=i) for i in range(2)])


def test_a_normalizer_s_centre_is_subtracted(embedded: Embedded, tmp_path: Path) -> None:
    policy = native(small_policy())
    maps = {
        key: Affine(affine.scale, affine.offset, torch.full_like(affine.scale, 0.3))
        for key, affine in policy.normalizer.maps.items()
    }
    policy = dataclasses.replace(policy, normalizer=Normalizer(maps))
    assert_equal_chunks(embedded, policy, tmp_path / "plan", [some_observation(policy.spec)])


def test_a_normalised_observation_may_be_given(embedded: Embedded, tmp_path: Path) -> None:
    policy = native(small_policy())
    export.write_plan(policy, tmp_path / "plan")
    assert embedded.load(tmp_path / "plan") == OK
    observation, noise = some_observation(policy.spec), parapolicy.draw_noise(policy.schedule).numpy()
    normal = {k: policy.normalizer.normalize(k, torch.from_numpy(v)).numpy() for k, v in observation.items()}
    _, expected = embedded.sample(flat(policy.spec, observation), noise)
    assert np.array_equal(embedded.sample(flat(policy.spec, normal), noise, normalised=True)[1], expected)


def test_errors_are_codes(embedded: Embedded, tmp_path: Path) -> None:
    policy = native(small_policy())
    export.write_plan(policy, tmp_path / "plan")
    assert embedded.load(tmp_path / "none") == NO_FILE
    assert embedded.load(tmp_path) == NO_FILE
    assert not embedded.policy
    assert embedded.load(SHIPPED / "model.safetensors") == NO_PLAN
    (tmp_path / "empty").touch()
    assert embedded.load(tmp_path / "empty") == NO_PLAN
    assert embedded.load(tmp_path / "plan") == OK
    good = flat(policy.spec, some_observation(policy.spec)), parapolicy.draw_noise(policy.schedule).numpy()
    assert embedded.sample(*good)[0] == OK
    for bad in (math.nan, math.inf):
        assert embedded.sample(np.full_like(good[0], bad), good[1])[0] == BAD_OBSERVATION
        assert embedded.sample(good[0], np.full_like(good[1], bad))[0] == BAD_RESULT
    for options in (Options(0, -1.0), Options(1, math.nan)):
        assert embedded.sample(*good, options=options)[0] == BAD_ARGUMENT
    library = embedded.library
    assert library.parapolicy_load(None, ctypes.byref(embedded.policy)) == BAD_ARGUMENT
    assert library.parapolicy_load(b"plan", None) == BAD_ARGUMENT
    assert library.parapolicy_get_sizes(None, ctypes.byref(embedded.sizes)) == BAD_ARGUMENT
    assert library.parapolicy_sample(embedded.policy, None, None, None, None, None) == BAD_ARGUMENT
    messages = {library.parapolicy_message(code) for code in range(-1, 10)}
    assert len(messages) == 10  # the unknown ones are alike
    assert all(messages)


def test_time_and_threads_may_be_given(embedded: Embedded, tmp_path: Path) -> None:
    policy = native(small_policy("collocation"))
    export.write_plan(policy, tmp_path / "plan")
    assert embedded.load(tmp_path / "plan") == OK
    given = flat(policy.spec, some_observation(policy.spec)), parapolicy.draw_noise(policy.schedule).numpy()
    _, expected = embedded.sample(*given)
    whole = embedded.stats.rounds
    for options in (Options(3, -1.0), Options(1, 3600.0)):
        code, trajectory = embedded.sample(*given, options=options)
        assert (code, embedded.stats.rounds, embedded.stats.complete) == (OK, whole, 1)
        assert np.array_equal(trajectory, expected)
    assert embedded.sample(*given, options=Options(1, 0.0))[0] == OK
    assert (embedded.stats.rounds, embedded.stats.complete) == (1, 0)


def test_what_a_plan_file_does_not_do_is_refused(tmp_path: Path) -> None:
    observation = {"camera": parapolicy.Feature((40, 40, 3), "image"), "position": (2,)}
    camera = {"backbone": "resnet18", "norm": "group"}
    seeing = {"name": "unet1d", "diffusion_step_embed_dim": 8, "down_dims": [8, 16], "n_groups": 4}
    seeing |= {"encoder": {"cameras": {"camera": camera}, "shared": True}}
    inpainting = {"name": "unet1d", "down_dims": [16, 32], "n_groups": 4, "condition": "inpaint"}
    policies = {
        "engine is 'eager'": small_policy(),
        "sampler is 'secant'": native(small_policy("secant")),
        "without images": native(small_policy(observation=observation, network=seeing)),
        "inpainting": native(small_policy(observation={"state": (3,)}, observed_dim=3, network=inpainting)),
    }
    for message, policy in policies.items():
        with pytest.raises(ValueError, match=message):
            export.write_plan(policy, tmp_path / "plan")
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_a_plan(embedded: Embedded, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan"
    main(["export", str(SHIPPED), str(path), "--sampler", "collocation", "--nodes", "15", "--window", "2"])
    assert capsys.readouterr().out == f"wrote {path}\n"
    assert embedded.load(path) == OK
    main(["export", str(SHIPPED), str(path), "--format", "fused", "--solver", "ddim", "--steps", "16"])
    assert embedded.load(path) == OK
    assert embedded.sizes.steps == 16
    for arguments, message in (
        ([str(tmp_path)], "is a folder"),
        ([str(path), "--sampler", "secant"], "expected sequential or collocation"),
        ([str(path), "--engine", "eager"], "engine is 'eager'"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["export", str(SHIPPED), *arguments])


def build_program(path: Path, *compiler: str) -> None:
    """As docs/embedding.md says; by another compiler, and its flag for the processor, where one is given."""
    documented = next(line for line in (ROOT / "docs" / "embedding.md").read_text().splitlines() if "g++ -O3" in line)
    command = documented.strip().removesuffix("-o push_t")
    assert {"-march=native", *native_build.FLAGS} - {*OTHER_FLAGS} <= set(shlex.split(command))
    if compiler:
        command = command.replace("g++", compiler[0]).replace("-march=native", compiler[1])
    subprocess.run(f"{command} -o {shlex.quote(str(path))}", shell=True, check=True, cwd=ROOT)


def write_inputs(policy: parapolicy.Policy, folder: Path) -> np.ndarray:
    """The program's files for two chunks, and the chunks of Python."""
    export.write_plan(policy, folder / "plan")
    steps = made_up_observations(policy, 9)
    history, requests = ObservationHistory(policy.spec), []
    for step in steps:
        history.push({key: value[0] for key, value in step.items()})
        requests.append(history.stacked())
    observed = np.stack([flat(policy.spec, step)[0] for step in steps])
    noise = [parapolicy.draw_noise(policy.schedule, seed=seed) for seed in range(2)]
    observed.tofile(folder / "observations")
    np.stack([value.numpy() for value in noise]).tofile(folder / "noise")
    asked = zip((requests[0], requests[8]), noise, strict=True)
    return np.stack([policy.predict(request, noise=value).trajectory for request, value in asked])


def test_the_program_in_c_samples_the_same_chunks(tmp_path: Path) -> None:
    build_program(tmp_path / "push_t")
    expected = write_inputs(shipped_policy("pusht_lowdim").with_sampler("collocation", nodes=15), tmp_path)
    names = [str(tmp_path / name) for name in ("push_t", "plan", "observations", "chunks", "noise")]
    done = subprocess.run(names, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("2 chunks; 900 ticks of 1 ms, ")
    assert np.array_equal(np.fromfile(tmp_path / "chunks", np.float32).reshape(2, 16, 2), expected)

    small = native(small_policy(control_hz=None)).with_sampler("sequential")
    export.write_plan(small, tmp_path / "plan of no rate")
    command = [names[0], f"{names[1]} of no rate", *names[2:4]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (1, f"{names[1]} of no rate does not say its control rate\n")

    (tmp_path / "plan").write_bytes((tmp_path / "plan").read_bytes()[:-64])
    done = subprocess.run(names, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (1, "error: the plan file is damaged; export it again\n")


ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [name for name in (ARM_COMPILER, ARM_EMULATOR) if shutil.which(name) is None]


@pytest.mark.skipif(bool(MISSING), reason=f"no {' and no '.join(MISSING)} here")
def test_on_arm_it_samples_them_too(tmp_path: Path) -> None:
    """Vectors have another width there, so that sums have another order; three steps show bfloat16's roundings most."""
    build_program(tmp_path / "push_t", ARM_COMPILER, "-march=armv8.6-a -static")  # with instructions for bfloat16
    names = [str(tmp_path / name) for name in ("push_t", "plan", "observations", "chunks", "noise")]
    for engine, tolerance in (("fused", 1e-5), ("fused_bfloat16", 0.03)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where float32 takes the place of bfloat16
            policy = shipped_policy("pusht_lowdim", engine).with_schedule("ddim", 3).with_sampler("sequential")
            expected = write_inputs(policy, tmp_path)
        subprocess.run([ARM_EMULATOR, *names], check=True, timeout=600, stdout=subprocess.DEVNULL)
        found = np.fromfile(tmp_path / "chunks", np.float32).reshape(2, 16, 2)
        scale = policy.normalizer.maps["action"].scale.numpy()
        np.testing.assert_allclose(found * scale, expected * scale, rtol=0, atol=tolerance)
