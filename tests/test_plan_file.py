"""Plan files that are damaged or hostile are refused."""

import dataclasses
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import parapolicy
from parapolicy import export
from parapolicy.engine.lowered.plan import Layer
from tests.embedded import BAD_RESULT, DAMAGED, NO_PLAN, OK, OTHER_VERSION, Embedded, Options, flat, native, sealed
from tests.helpers import small_policy, some_observation

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")


@pytest.fixture
def embedded() -> Embedded:
    return Embedded()


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


@pytest.mark.parametrize(
    ("name", "total_at", "need"),
    [
        ("weight", 32, lambda layer: layer["taps"] * layer["inputs"] * layer["padded"]),
        ("bias", 40, lambda layer: layer["padded"]),
        ("norm", 40, lambda layer: 2 * layer["outputs"] + 1),
        ("film", 72, lambda layer: layer["outputs"] * (1 + layer["film_scale"])),
    ],
    ids=["weight", "bias", "norm", "film"],
)
def test_the_last_place_that_fits_is_taken(
    name: str, total_at: int, need: Callable[[dict[str, int]], int], embedded: Embedded, tmp_path: Path
) -> None:
    path = tmp_path / "plan"
    export.write_plan(native(small_policy()), path)
    content = bytearray(path.read_bytes())
    names = [field.name for field in dataclasses.fields(Layer)]
    size, at = 8 * len(names), -(-struct.calcsize(export.HEADER) // 64) * 64
    layers = [
        dict(zip(names, struct.unpack_from(f"<{len(names)}q", content, at + i * size), strict=True)) for i in (0, 1)
    ]
    i = next(i for i in (0, 1) if layers[i]["film"] >= 0)  # the one that has all
    last = struct.unpack_from("<q", content, total_at)[0] - need(layers[i])
    for value, code in ((last, OK), (last + 1, DAMAGED)):
        struct.pack_into("<q", content, at + i * size + 8 * names.index(name), value)
        path.write_bytes(sealed(content))
        assert embedded.load(path) == code
