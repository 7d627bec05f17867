"""Policies as plan files: sampled without Python, equal to the bit, and refused where they are damaged."""

import ctypes
import dataclasses
import math
import os
import shlex
import shutil
import struct
import subprocess
import zlib
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
from parapolicy.engine import make_engine, native_library
from parapolicy.engine.lowered.unet1d_plan import Layer
from parapolicy.normalizer import Affine, Normalizer
from parapolicy.observation import ObservationHistory
from parapolicy.planner import made_up_observations
from parapolicy.policy import Chunk
from tests.conftest import ROOT, SHIPPED
from tests.helpers import DDPM_CONFIG, small_policy, some_observation

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
OK, NO_FILE, NO_PLAN, OTHER_VERSION, DAMAGED, NO_MEMORY, BAD_ARGUMENT, BAD_OBSERVATION, BAD_RESULT = range(9)


class Sizes(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("obs_steps", "observed", "horizon", "action_dim", "first_action")),
        *((name, ctypes.c_int64) for name in ("action_steps", "steps", "noise")),
        ("control_hz", ctypes.c_double),
    )


class Options(ctypes.Structure):
    _fields_ = (("threads", ctypes.c_int64), ("seconds", ctypes.c_double))


class Stats(ctypes.Structure):
    _fields_ = (("rounds", ctypes.c_int64), ("evaluations", ctypes.c_int64), ("complete", ctypes.c_int32))


class Embedded:
    """The C interface, as a program without Python calls it."""

    def __init__(self) -> None:
        self.library = native_library.load_library()
        self.library.parapolicy_message.restype = ctypes.c_char_p
        self.library.parapolicy_free.argtypes = [ctypes.c_void_p]
        self.policy, self.sizes, self.stats = ctypes.c_void_p(), Sizes(), Stats()

    def load(self, path: Path) -> int:
        self.library.parapolicy_free(self.policy)
        code: int = self.library.parapolicy_load(os.fsencode(path), ctypes.byref(self.policy))
        if code == OK:
            assert self.library.parapolicy_get_sizes(self.policy, ctypes.byref(self.sizes)) == OK
        return code

    def sample(
        self, observation: np.ndarray, noise: np.ndarray, normalised: bool = False, options: Options | None = None
    ) -> tuple[int, np.ndarray]:
        sizes = self.sizes
        assert (observation.dtype, observation.shape) == (np.float32, (sizes.obs_steps, sizes.observed))
        assert (noise.dtype, noise.size) == (np.float32, sizes.noise)
        trajectory = np.zeros((sizes.horizon, sizes.action_dim), np.float32)
        function = self.library.parapolicy_sample_normalised if normalised else self.library.parapolicy_sample
        arrays = [ctypes.c_void_p(np.ascontiguousarray(value).ctypes.data) for value in (observation, noise)]
        given = None if options is None else ctypes.byref(options)
        out = ctypes.c_void_p(trajectory.ctypes.data)
        return function(self.policy, *arrays, given, out, ctypes.byref(self.stats)), trajectory


@pytest.fixture
def embedded() -> Embedded:
    return Embedded()


def flat(spec: parapolicy.PolicySpec, observation: dict[str, np.ndarray]) -> np.ndarray:
    """{key: (To, …)} -> (To, numbers of a step)."""
    parts = [observation[key].reshape(spec.n_obs_steps, -1) for key in spec.observation]
    return np.concatenate(parts, 1).astype(np.float32)


def native(policy: parapolicy.Policy, engine: str = "fused") -> parapolicy.Policy:
    return dataclasses.replace(policy, engine=make_engine(engine, policy.device))


def shipped_policy(name: str, engine: str = "fused") -> parapolicy.Policy:
    folder = ROOT / "checkpoints" / name
    return native(with_calibration(parapolicy.load_policy(folder, device="cpu"), folder, measure=False), engine)


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


def sealed(content: bytes | bytearray) -> bytes:
    """With the digest that goes with it."""
    content = bytearray(content)
    content[export.CHECKSUM_AT : export.CHECKSUM_AT + 4] = bytes(4)
    struct.pack_into("<I", content, export.CHECKSUM_AT, zlib.crc32(content))
    return bytes(content)


def test_damage_is_refused(embedded: Embedded, tmp_path: Path) -> None:
    path = tmp_path / "plan"
    export.write_plan(native(small_policy("collocation")), path)
    whole = path.read_bytes()
    assert sealed(whole) == whole
    rng = np.random.default_rng(0)
    for length in (*rng.integers(0, len(whole), 30), len(whole) - 1, len(whole) - 64):
        path.write_bytes(whole[:length])
        assert embedded.load(path) in (NO_PLAN, DAMAGED)
    path.write_bytes(whole + b"more")
    assert embedded.load(path) == DAMAGED
    header = struct.calcsize(export.HEADER)
    for at in (*range(header), *rng.integers(header, len(whole), 100)):
        changed = bytearray(whole)
        changed[at] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        assert embedded.load(path) == (NO_PLAN if at < 8 else OTHER_VERSION if at < 12 else DAMAGED)
    path.write_bytes(whole)
    assert embedded.load(path) == OK


def test_no_number_of_a_file_is_trusted(embedded: Embedded, tmp_path: Path) -> None:
    """Sizes and places with a good checksum: refused, or sampled within the memory there is."""
    path, policy = tmp_path / "plan", native(small_policy("collocation"))
    export.write_plan(policy, path)
    whole = path.read_bytes()
    assert embedded.load(path) == OK
    given = flat(policy.spec, some_observation(policy.spec)), parapolicy.draw_noise(policy.schedule).numpy()
    sizes, header = bytes(embedded.sizes), struct.calcsize(export.HEADER)
    layers = -(-header // export.ALIGNMENT) * export.ALIGNMENT
    fields = len(dataclasses.fields(Layer))
    places = [*range(16, header - 48, 8), *range(layers, layers + 8 * fields * 6, 8)]  # of the first six layers
    rng, refused, sampled = np.random.default_rng(0), 0, 0
    for at in places:
        value = struct.unpack_from("<q", whole, at)[0]
        for other in (-(2**63), -2, 2**62, 2**31, 2**24, value + 1, value * 2 + 64, int(rng.integers(-1000, 1000))):
            changed = bytearray(whole)
            struct.pack_into("<q", changed, at, other)
            path.write_bytes(sealed(changed))
            code = embedded.load(path)
            assert code == (DAMAGED if abs(other) >= 2**31 else code)
            assert code in (OK, DAMAGED)
            refused += code != OK
            if code == OK and bytes(embedded.sizes) == sizes:
                assert embedded.sample(*given, options=Options(2, 0.0))[0] in (OK, BAD_RESULT)
                sampled += 1
    assert refused > 0.6 * 8 * len(places)
    assert sampled > 50


# A layer's number that is beyond what there is, where the first layer's is not.
BEYOND = {"taps": 2**20, "inputs": 2**20, "outputs": 2**20, "strip": 48, "unit": 8, "precision": 1, "rounded": 1}
BEYOND |= {"weight": 2**20, "bias": 2**20, "norm": 2**20, "film": 2**20, "group": 7, "stride": 0, "padding": -1}
BEYOND |= {"source": 2**20, "source_channel": 1, "source_stride": 2**20, "source_length": 2**20}
BEYOND |= {"target": 2**20, "target_channel": 2**20, "target_stride": 1, "target_length": 2**20, "residual": 2**20}


@pytest.mark.parametrize("name", BEYOND)
def test_a_place_beyond_the_memory_is_refused(name: str, embedded: Embedded, tmp_path: Path) -> None:
    path = tmp_path / "plan"
    export.write_plan(native(small_policy()), path)
    content = bytearray(path.read_bytes())
    header, fields = struct.calcsize(export.HEADER), [field.name for field in dataclasses.fields(Layer)]
    struct.pack_into("<q", content, -(-header // 64) * 64 + 8 * fields.index(name), BEYOND[name])
    path.write_bytes(sealed(content))
    assert embedded.load(path) == DAMAGED


def test_what_a_plan_file_does_not_do_is_refused(tmp_path: Path) -> None:
    observation = {"camera": parapolicy.Feature((40, 40, 3), "image"), "position": (2,)}
    camera = {"backbone": "resnet18", "norm": "group"}
    seeing = {"name": "unet1d", "diffusion_step_embed_dim": 8, "down_dims": [8, 16], "n_groups": 4}
    seeing |= {"encoder": {"cameras": {"camera": camera}, "shared": True}}
    inpainting = {"name": "unet1d", "down_dims": [16, 32], "n_groups": 4, "condition": "inpaint"}
    policies = {
        "engine is 'eager'": small_policy(),
        "sampler is Secant": native(small_policy("secant")),
        "no images": native(small_policy(observation=observation, network=seeing)),
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


def test_the_program_in_c_samples_the_same_chunks(tmp_path: Path) -> None:
    """It is built as docs/embedding.md says."""
    policy = shipped_policy("pusht_lowdim").with_sampler("collocation", nodes=15)
    export.write_plan(policy, tmp_path / "plan")
    documented = next(line for line in (ROOT / "docs" / "embedding.md").read_text().splitlines() if "g++ -O3" in line)
    command = documented.strip().removesuffix("-o push_t")
    assert set(native_library.FLAGS) - {"-shared", "-fPIC"} <= set(shlex.split(command))
    subprocess.run(f"{command} -o {shlex.quote(str(tmp_path / 'push_t'))}", shell=True, check=True, cwd=ROOT)

    steps = made_up_observations(policy, 9)
    history, requests = ObservationHistory(policy.spec), []
    for step in steps:
        history.push({key: value[0] for key, value in step.items()})
        requests.append(history.stacked())
    observed = np.stack([flat(policy.spec, step)[0] for step in steps])
    noise = [parapolicy.draw_noise(policy.schedule, seed=seed) for seed in range(2)]
    observed.tofile(tmp_path / "observations")
    np.stack([value.numpy() for value in noise]).tofile(tmp_path / "noise")
    names = [str(tmp_path / name) for name in ("push_t", "plan", "observations", "chunks", "noise")]
    done = subprocess.run(names, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("2 chunks; 900 ticks of 1 ms, ")
    found = np.fromfile(tmp_path / "chunks", np.float32).reshape(2, 16, 2)
    for i, request in enumerate((requests[0], requests[8])):
        assert np.array_equal(found[i], policy.predict(request, noise=noise[i]).trajectory)

    (tmp_path / "plan").write_bytes((tmp_path / "plan").read_bytes()[:-64])
    done = subprocess.run(names, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (1, "error: the plan file is damaged; export it anew\n")
