"""`make results-gpu`, dry: tiny sizes on the CPU, every part, and the tables made from its file."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from parapolicy.bench import benchmarks
from tests.conftest import ROOT
from tools import fill_speed, results_gpu


@pytest.fixture
def dry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The command's folder; it measures one size."""
    for name in results_gpu.TINY:
        monkeypatch.setattr(benchmarks, name, getattr(benchmarks, name))  # main sets them: given back after the test
    monkeypatch.setattr(results_gpu, "SIZES", {"pusht": results_gpu.SIZES["pusht"]})
    monkeypatch.setattr(sys, "argv", ["results_gpu", "--dry", "--output", str(tmp_path)])
    return tmp_path


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "gpu.json").read_text())
    return found


def test_a_dry_run_has_every_part_and_table(dry: Path) -> None:
    results_gpu.main()
    parts = read(dry)["parts"]
    assert list(parts) == ["pusht", "tests", "agreement", "scaling", "devices"]
    assert not any("error" in part for part in parts.values())
    assert parts["agreement"]["eager"] < 1e-4
    assert [row["devices"] for row in parts["devices"]["devices"]] == [1, 1]
    chunks = {row["chunk"] for row in parts["pusht"]["chunks"]}
    assert {"secant (window 40), eager", "secant, window 100, warm, eager", "DDIM-16, eager"} <= chunks
    tables = fill_speed.gpu_tables([dry])
    for expected in ("No GPU, a dry run", "| secant (window 40) |", "| window | 20 |", "| devices (gloo, `eager`) |"):
        assert expected in tables


def test_a_part_that_fails_is_named_and_the_others_go_on(dry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> dict[str, Any]:
        raise RuntimeError("out of memory")

    for name in ("measure_size", "measure_scaling", "measure_devices"):
        monkeypatch.setattr(results_gpu, name, fail)
    with pytest.raises(SystemExit, match="error: pusht, scaling, devices failed"):
        results_gpu.main()
    parts = read(dry)["parts"]
    assert "out of memory" in parts["pusht"]["error"]
    assert parts["agreement"]["eager"] < 1e-4
    assert "Failed: pusht, scaling, devices." in fill_speed.gpu_tables([dry])


def test_parts_without_time_are_left_out(dry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--minutes", "-1"])
    results_gpu.main()
    assert read(dry)["left_out"] == ["pusht", "tests", "agreement", "scaling", "devices"]
    assert read(dry)["parts"] == {}


def test_the_tests_that_need_cuda_are_there() -> None:
    for name in results_gpu.CUDA_TESTS:
        path, function = name.split("::")
        assert f"def {function}(" in (ROOT / path).read_text()


def test_packages_are_what_torch_does_not_bring() -> None:
    names = {line.partition("==")[0] for line in results_gpu.packages()}
    assert {"numpy", "diffusers", "pytest"} <= names
    assert not {"torch", "sympy", "filelock"} & names
