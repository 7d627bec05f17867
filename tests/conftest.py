import os
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

import parapolicy

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "checkpoints" / "pusht_lowdim"
PATIENCE = 600  # seconds; a bound against hanging, far beyond what a slow machine needs

# Property tests run whole samplers: no time limit per example, and the same examples on every run.
hypothesis.settings.register_profile(
    "repeatable",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    derandomize=True,
    max_examples=40,
)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shipped() -> parapolicy.Policy:
    """The shipped Push-T policy, on the CPU."""
    return parapolicy.load_policy(SHIPPED, sampler="secant", device="cpu", engine="eager")


@pytest.fixture(scope="session")
def demonstrations() -> Path:
    """The published Push-T demonstrations, where they are at hand."""
    path = Path(os.environ.get("PARAPOLICY_DEMONSTRATIONS", ROOT.parent / "shared" / "data"))
    path = path if path.is_absolute() else ROOT / path
    zarr = path / "pusht" / "pusht_cchi_v7_replay.zarr"
    if not zarr.is_dir():
        pytest.skip(
            f"no Push-T demonstrations at {zarr}; set PARAPOLICY_DEMONSTRATIONS to the folder that holds pusht/"
        )
    return zarr


@pytest.fixture
def buffer(tmp_path: Path) -> Path:
    """Three episodes of 5, 9 and 20 steps in the published layout."""
    import zarr  # which not every test environment has, and which takes a second

    path = tmp_path / "replay.zarr"
    layout = {"zarr_format": 2} if int(zarr.__version__[0]) > 2 else {}  # the published one; zarr 2 knows no other
    root = zarr.open_group(str(path), mode="w", **layout)
    rng = np.random.default_rng(0)
    for name, shape in {"state": (34, 5), "points": (34, 3, 2), "action": (34, 2)}.items():
        root[f"data/{name}"] = rng.uniform(0, 512, shape).astype(np.float32)
    root["meta/episode_ends"] = np.array([5, 14, 34])
    return path
