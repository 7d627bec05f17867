"""What a run shows at its end: tables that fit into a terminal, and a figure whose names can be read."""

import io
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from parapolicy.evaluate.report import plots
from parapolicy.evaluate.report.terminal import print_tables

# label: chunk ms p50, p95, p99; rounds and evaluations, mean and p95; error p95. Of Push-T, and of a network of the
# published size in the eager engine.
ROWS = {
    "sequential": (18.94, 19.01, 19.02, 100.0, 100.0, 100.0, 100.0, 0.0),
    "paradigms": (85.6, 93.1, 94.96, 25.8, 26.0, 413.2, 415.5, 8.6e-4),
    "secant": (44.3, 47.4, 47.9, 6.6, 7.2, 191.9, 208.2, 2.7e-3),
    "collocation-19-nodes-uncalibrated, asynchronous": (5.75, 6.2, 6.3, 10.5, 11.2, 29.9, 32.2, 1.3e-3),
    "upstream, DDPM-100 of the published size": (10337.4, 11875.2, 12655.9, 1000.0, 1000.0, 3017.4, 4000.0, 1.25),
}


def run_results() -> dict[str, Any]:
    """A ``results.json`` with all of its tables."""
    samplers: dict[str, Any] = {}
    for label, (p50, p95, p99, rounds, rounds_p95, evaluations, evaluations_p95, error) in ROWS.items():
        samplers[label] = {
            "mean_max_reward": 0.962,
            "mean_max_reward_ci95": [0.945, 0.975],
            "success_rate": 0.63,
            "paired_reward_difference": {"to": "sequential", "mean": -0.0312, "ci95": [-0.0484, 0.0181]},
            "per_episode": [{"seed": 100_000}],
            "chunk_ms": {"p50": p50, "p95": p95, "p99": p99, "encode_p50": 0.4},
            "speedup_p50": ROWS["sequential"][0] / p50 * 1000,
            "rounds": {"mean": rounds, "p95": rounds_p95},
            "evaluations": {"mean": evaluations, "p95": evaluations_p95},
            "chunk_error": {"p95": error},
            "control": {"seam": "hold_soft"},
            "motion": {
                name: {"mean": value, "ci95": [0.9 * value, 1.1 * value]}
                for name, value in (("jump", 43.1), ("step", 8.4), ("relative_jump", 5.37), ("jerk", 0.000627))
            },
            "energy_distance": {"mean": -0.0123, "ci95": [-0.0234, 0.0345], "resampling_mean": 0.0412},
            "paired_energy_distance": {"mean": 0.0002, "ci95": [0.0001, 0.0004]},
        }
    return {
        "env": "pusht",
        "checkpoint": "checkpoints/pusht_lowdim",
        "episodes": 1030,
        "seeds": [300_000],
        "samplers": samplers,
    }


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_the_tables_fit_and_numbers_are_whole(columns: int) -> None:
    """Also in a terminal that is narrower, whose lines then are longer than it is."""
    results, printed = run_results(), io.StringIO()
    print_tables(results, Console(file=printed, width=columns))
    lines = printed.getvalue().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= max(columns, 80)
    text = re.sub(r"\s+", " ", printed.getvalue())
    for number in (
        "18.9 19.0 19.0",
        "10337 11875 12656",
        "192 (208)",
        "3017 (4000)",
        "1.3e-03",
        "1.83×",
        "3294×",
        "0.962 [0.945, 0.975]",
        "-0.031 [-0.048, +0.018]",
        "0.000627",
        "[0.000564, 0.00069]",
        "-0.0123 [-0.0234, 0.0345]",
    ):
        assert number in text
    assert "…" not in text


def test_long_names_are_wrapped_between_words() -> None:
    printed = io.StringIO()
    print_tables(run_results(), Console(file=printed, width=80))
    column = [line[:14].strip() for line in printed.getvalue().splitlines()]
    assert {"sequential", "paradigms", "secant", "upstream,"} <= set(column)


def test_names_in_the_figure_do_not_overlap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of samplers with equal rewards and near latencies, too."""
    kept: list[Figure] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: kept.append(figure))
    results = run_results()
    results["samplers"]["secant"]["chunk_ms"]["p50"] = 18.95
    plots.plot_latency_reward(results, tmp_path / "latency_reward.png")
    (figure,) = kept
    figure.draw_without_rendering()
    texts = [*figure.legends[0].get_texts(), *figure.axes[0].texts]
    assert [" ".join(text.get_text().split()) for text in texts[1:3]] == ["sequential: 18.9 ms", "secant: 18.9 ms"]
    assert len(texts) == len(ROWS)
    boxes = [text.get_window_extent() for text in texts]
    for one, other in itertools.combinations([*boxes, figure.axes[0].get_window_extent()], 2):
        assert not one.overlaps(other)
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
