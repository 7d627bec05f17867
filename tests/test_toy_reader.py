"""A checkpoint format of a third party: one reader, and a small package that is installed with all kinds of plug-in."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import parapolicy
from parapolicy import checkpoint
from parapolicy.networks import Network, build_network
from parapolicy.normalizer import Affine, Normalizer
from parapolicy.spec import PolicySpec
from tests.conftest import PATIENCE, ROOT
from tests.helpers import small_spec, some_observation


class Seeds:
    """A file that holds one number, from which the weights are drawn."""

    def recognises(self, path: Path) -> bool:
        return path.suffix == ".seed"

    def read(self, path: Path) -> tuple[PolicySpec, Network, Normalizer]:
        if not path.read_text().strip().isdigit():
            raise parapolicy.CheckpointError(f"{path} holds {path.read_text()!r}, expected a whole number")
        torch.manual_seed(int(path.read_text()))
        spec = small_spec()
        maps = {key: Affine(torch.full(s, 0.01), torch.full(s, -0.5)) for key, s in spec.normalizer_shapes.items()}
        return spec, build_network(spec).requires_grad_(False).eval(), Normalizer(maps)


def test_it_is_recognised_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "READERS", (*checkpoint.READERS, Seeds()))
    path = tmp_path / "policy.seed"
    path.write_text("7")
    policy = parapolicy.load_policy(path, device="cpu", engine="eager")
    observation = some_observation(policy.spec)
    assert np.isfinite(policy.predict(observation).trajectory).all()
    parapolicy.save_policy(policy, tmp_path / "native")
    native = parapolicy.load_policy(tmp_path / "native", device="cpu", engine="eager")
    np.testing.assert_array_equal(native.predict(observation).trajectory, policy.predict(observation).trajectory)
    path.write_text("seven")
    with pytest.raises(parapolicy.CheckpointError, match="expected a whole number"):
        parapolicy.load_policy(path, engine="eager")
    with pytest.raises(parapolicy.CheckpointError, match="no checkpoint at"):
        parapolicy.load_policy(tmp_path / "policy.sead", engine="eager")


MODULE = """
import torch
from tests.test_toy_network import Toy
from tests.test_toy_reader import Seeds

reader = Seeds()

def make_env(spec, **options):
    return f"an environment for {spec.action_dim} numbers with {options}"
"""
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "parapolicy-toy"
version = "1.0"
[project.entry-points."parapolicy.networks"]
toy = "parapolicy_toy:Toy"
[project.entry-points."parapolicy.readers"]
seeds = "parapolicy_toy:reader"
[project.entry-points."parapolicy.envs"]
toy = "parapolicy_toy:make_env"
[tool.setuptools]
py-modules = ["parapolicy_toy"]
"""
USE = """
import sys, dataclasses, parapolicy, numpy as np
from envs import make_env
from parapolicy.networks import build_network
from tests.test_toy_network import OBSERVATION
policy = parapolicy.load_policy(sys.argv[1], device="cpu", engine="eager")
print(policy.predict({"position": np.zeros((2, 2)), "points": np.zeros((2, 3, 2))}).actions.shape)
spec = dataclasses.replace(policy.spec, observation=OBSERVATION, network={"name": "toy", "width": 4})
print(type(build_network(spec)).__name__)
print(make_env("toy", policy.spec, size=3))
"""


def test_an_installed_package_adds_a_network_a_reader_and_an_environment(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    (source / "parapolicy_toy.py").write_text(MODULE)
    (source / "pyproject.toml").write_text(PROJECT)
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*pip, str(target), str(source)], check=True, capture_output=True)
    (tmp_path / "policy.seed").write_text("7")
    command = [sys.executable, "-c", USE, str(tmp_path / "policy.seed")]
    environment = {"PYTHONPATH": f"{target}:{ROOT}", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["(4, 2)", "Toy", "an environment for 2 numbers with {'size': 3}"]
