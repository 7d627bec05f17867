"""The wheel, built and installed into an empty environment that borrows only the dependencies of this one."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import parapolicy
from parapolicy.engine import native_build, native_library
from parapolicy.planner import made_up_observations
from tests.conftest import PATIENCE, ROOT, SHIPPED

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1200)]
SOURCES = ("parapolicy", "hydra_plugins", "conf", "envs")
FILES = ("eval.py", "train.py", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
# In the installed package: which library computes, and a chunk by it.
CHUNK = f"""
import sys, numpy as np, parapolicy
from parapolicy.engine import native_library
from parapolicy.planner import made_up_observations
policy = parapolicy.load_policy({str(SHIPPED)!r}, "sequential", device="cpu", engine=sys.argv[1])
(observation,) = made_up_observations(policy, 1)
np.save(sys.argv[2], policy.predict(observation, seed=3).trajectory)
print(native_library.load_library()._name)
"""


def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, **options)


def alone(**variables: str) -> dict[str, str]:
    """This process's environment, without what leads to the repository."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CXX")} | variables


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds the wheel from a copy of the repository."""

    def build(**variables: str) -> Path:
        folder = tmp_path_factory.mktemp("build")
        for name in SOURCES:
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in FILES:
            shutil.copy(ROOT / name, folder)
        command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
        done = run(command, cwd=folder, env=alone(**variables))
        assert done.returncode == 0, done.stderr
        (folder / "log").write_text(done.stdout + done.stderr)
        (wheel,) = (folder / "dist").glob("*.whl")
        return wheel

    return build


@pytest.fixture(scope="module")
def installed(built: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the environment that holds the wheel."""
    folder = tmp_path_factory.mktemp("environment")
    done = run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
    assert done.returncode == 0, done.stderr
    python = str(folder / "bin" / "python")
    done = run([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", str(built())], env=alone())
    assert done.returncode == 0, done.stderr
    (packages,) = folder.glob("lib/python*/site-packages")
    # Its own .pth files are not followed, so this repository stays out.
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def test_the_wheel_evaluates_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    command = [
        str(installed / "bin" / "parapolicy"),
        "eval",
        "episodes=2",
        "samplers=[{name: sequential, solver: ddim, steps: 4}]",
        "processes=true",
        "env.options.max_episode_steps=16",
        "latency_chunks=0",
        "videos=0",
        "hydra.run.dir=run",
    ]
    missing = run(command, cwd=tmp_path, env=alone())
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: no checkpoint at 'checkpoints/pusht_lowdim'; give checkpoint=FOLDER")
    done = run([*command, f"checkpoint={SHIPPED}"], cwd=tmp_path, env=alone())
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["seeds"] == [100_000, 100_001]
    (row,) = results["samplers"].values()
    assert row["overall"]["n_episodes"] == 2


def test_its_other_applications_are_there(installed: Path, tmp_path: Path) -> None:
    for command, words in (("train", "checkpoint_every"), ("bench", "--scaling"), ("serve", "port=8000")):
        done = run([str(installed / "bin" / "parapolicy"), command, "--help"], cwd=tmp_path, env=alone())
        assert (done.returncode, words in done.stdout) == (0, True), done.stderr
    top = [path.name for path in next(installed.glob("lib/python*/site-packages")).iterdir()]
    assert not {"conf", "envs", "eval.py", "train.py", "tools"} & set(top)
    program = "import parapolicy; from parapolicy.application.envs import make_env; print(parapolicy.__file__)"
    done = run([str(installed / "bin" / "python"), "-c", program], cwd=tmp_path, env=alone())
    assert done.stdout.startswith(str(installed)), done.stderr


@pytest.mark.skipif(native_build.find_compiler() is None, reason="no C++ compiler here")
@pytest.mark.parametrize("engine", ["fused", "fused_bfloat16"])
def test_without_a_compiler_the_wheel_s_library_serves(
    engine: str, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = frozenset(native_library._processor().split())
    fitting = [flags for flags, needed in native_build.VARIANTS.values() if needed <= words]
    if not fitting:
        pytest.skip("no library of a wheel is for this processor")
    library = native_library.load_library(fitting[0])  # compiled here, with the same flags
    if engine == "fused_bfloat16" and not library.parapolicy_multiplies_bfloat16():
        pytest.skip("this processor has no bfloat16 product instructions")
    chunk, cache = tmp_path / "chunk.npy", tmp_path / "cache"
    command = [str(installed / "bin" / "python"), "-W", "error", "-c", CHUNK, engine, str(chunk)]
    without = alone(PATH=str(tmp_path), PARAPOLICY_CACHE=str(cache), OMP_NUM_THREADS="1")
    done = run(command, cwd=tmp_path, env=without)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent == Path(next(installed.glob("lib/*/*/parapolicy/engine/prebuilt")))
    assert not list(cache.glob("*.so"))

    for module in ("parapolicy.engine.fused", "parapolicy.engine.lowered.fused_network"):
        monkeypatch.setattr(f"{module}.load_library", lambda: library)
    policy = parapolicy.load_policy(SHIPPED, "sequential", device="cpu", engine=engine)
    (observation,) = made_up_observations(policy, 1)
    np.testing.assert_array_equal(np.load(chunk), policy.predict(observation, seed=3).trajectory)

    source = next(installed.glob("lib/*/*/parapolicy/engine/fused.cpp"))
    before = source.read_text()
    try:
        source.write_text(before + "// another version\n")
        done = run(command, cwd=tmp_path, env=without)
        assert done.returncode != 0
        assert "there is no C++ compiler" in done.stderr
    finally:
        source.write_text(before)


def test_without_a_compiler_the_wheel_is_pure(built: Callable[..., Path], tmp_path: Path) -> None:
    wheel = built(PATH=str(tmp_path), CXX="")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "the wheel has no compiled libraries" in (wheel.parent.parent / "log").read_text()
