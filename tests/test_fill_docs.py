"""The comparison page is filled from results and keeps its prose."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.fill_docs import fill_page

PAGE = "# Title\n\nProse.\n\n<!-- closed loop -->\nold\n<!-- end -->\n\nMore.\n\n<!-- errors -->\n<!-- end -->\n"


def some_results(**changes: Any) -> dict[str, Any]:
    quantiles = {"median": 1e-3, "p95": 2e-3, "p99": 3e-3, "p99.9": 4e-3, "max": 5e-3}
    row = {
        "mean_max_reward": 0.9,
        "mean_max_reward_ci95": [0.8, 0.95],
        "success_rate": 0.5,
        "success_rate_ci95": [0.4, 0.6],
        "rounds": {"mean": 6.9, "p95": 8.0},
        "evaluations": {"mean": 193.0, "p95": 240.0},
        "chunk_error": quantiles,
        "chunk_ms": {"p50": 150.0, "p99": 200.0},
        "speedup_p50": 4.5,
    }
    errors = {
        "chunks": 5000,
        "rounds": {"mean": 6.9, "p95": 8.0},
        "evaluations": {"mean": 193.0},
        "error": quantiles,
        "action_error": {key: 250 * value for key, value in quantiles.items()},
        "exceeding_10_tolerances": 3,
    }
    machine = {"cpu": "a processor", "threads": 2, "device": "cpu"}
    versions = {"python": "3.11", "torch": "2.13", "diffusers": "0.35"}
    results = {"episodes": 100, "samplers": {"secant": row}, "errors": {"secant": errors}}
    return results | {"machine": machine, "versions": versions} | changes


def test_blocks_are_filled_and_prose_is_kept() -> None:
    page = fill_page(PAGE, [some_results()])
    assert page.startswith("# Title\n\nProse.\n")
    assert "old" not in page
    assert "| secant | 0.900 [0.800, 0.950] | 0.50 [0.40, 0.60] |" in page
    assert "3 of 5000" in page
    assert "| 0.25 / 0.50 |" in page
    assert fill_page(page, [some_results()]) == page


def test_too_few_episodes_are_no_closed_loop_result() -> None:
    page = fill_page(PAGE, [some_results(episodes=20)])
    assert "0.900" not in page
    assert "3 of 5000" in page


def test_a_page_without_blocks_or_with_an_unknown_one_is_refused() -> None:
    with pytest.raises(ValueError, match="no block"):
        fill_page("prose", [some_results()])
    with pytest.raises(ValueError, match="block 'speed'"):
        fill_page("<!-- speed -->\n<!-- end -->", [some_results()])


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(some_results()))
    page = tmp_path / "page.md"
    page.write_text("<!-- machine -->\n<!-- end -->\n")
    command = [sys.executable, "-m", "tools.fill_docs", str(page)]
    subprocess.run([*command, str(tmp_path)], check=True)
    assert "a processor, 2 threads" in page.read_text()
    refused = subprocess.run([*command, str(tmp_path / "absent")], capture_output=True, text=True)
    assert refused.returncode == 1
    assert "absent" in refused.stderr
