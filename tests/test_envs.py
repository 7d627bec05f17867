"""Environments by name: the project's own, and those that another package installs."""

from pathlib import Path

import pytest

from envs import make_env
from tests.helpers import small_spec

PACKAGE = """
import gymnasium

class Corridor(gymnasium.Env):
    def __init__(self, spec, length=3):
        self.spec_of_policy, self.length = spec, length
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with an environment, laid out as pip installs it."""
    (tmp_path / "corridor_envs.py").write_text(PACKAGE)
    about = tmp_path / "corridor_envs-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: corridor-envs\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[parapolicy.envs]\ncorridor = corridor_envs:Corridor\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("installed")
def test_an_installed_packages_environment_is_found() -> None:
    spec = small_spec()
    env = make_env("corridor", spec, length=5)
    assert type(env).__name__ == "Corridor"
    assert (env.spec_of_policy, env.length) == (spec, 5)
    with pytest.raises(ValueError, match=r"env is 'maze', expected one of \['pusht', .*, 'corridor'\]"):
        make_env("maze", spec)


def test_without_the_package_its_environment_is_unknown() -> None:
    with pytest.raises(ValueError, match="env is 'corridor', expected one of"):
        make_env("corridor", small_spec())
