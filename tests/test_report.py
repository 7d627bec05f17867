"""The report: what it gathers, recommends and draws, opened in a browser."""

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from parapolicy.cli import main
from parapolicy.evaluate.measure.statistics import (
    episodes_needed,
    equivalence_p,
    interquartile_mean,
    percentile_interval,
    pooled_improvement,
    pooled_interval,
    pooled_mean,
)
from parapolicy.evaluate.report.figures import CHOSEN, calibration_figure, sampler_colors
from parapolicy.evaluate.report.gather import episode_table, gather_latencies, gather_runs
from parapolicy.evaluate.report.html_report import write_report
from parapolicy.evaluate.report.pooled import pool
from parapolicy.evaluate.report.summary import Margins, recommend, summarize
from tests.conftest import PATIENCE

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


def made_up_run(
    folder: Path,
    rewards: dict[str, list[float]],
    p50: dict[str, float],
    env: str = "pusht",
    seams: Mapping[str, float] = {"seam_mean": 12.5, "motion_mean": 3.25},
) -> None:
    samplers: dict[str, Any] = {}
    for label, values in rewards.items():
        samplers[label] = {
            "per_episode": [
                {
                    "seed": seed,
                    "max_reward": value,
                    "success": value > 0.9,
                    "steps": 300,
                    "rounds_mean": 5.0,
                    "evaluations_mean": 100.0 if label == "sequential" else 50.0,
                    **seams,
                }
                for seed, value in enumerate(values)
            ]
        }
        if label in p50:
            times = {"p50": p50[label], "p95": p50[label], "p99": 1.2 * p50[label], "each": [p50[label]] * 5}
            error = {"median": 0.004, "p95": 0.01, "each": [0.003, 0.004, 0.011], "asked": 0.008}
            samplers[label] |= {"chunk_ms": times, "chunk_error": error}
    folder.mkdir(parents=True, exist_ok=True)
    machine = {"cpu": "a made-up CPU", "threads": 2, "device": "cpu"}
    results = {
        "env": env,
        "checkpoint": "made/up",
        "samplers": samplers,
        "machine": machine,
        "versions": {"torch": "9"},
    }
    (folder / "results.json").write_text(json.dumps(results))


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    base = rng.beta(8, 1, 100)
    rewards = {
        "sequential": base,
        "ours": np.clip(base + rng.normal(0, 0.002, 100), 0, 1),
        "hasty <b>": np.clip(base - 0.2 + rng.normal(0, 0.02, 100), 0, 1),
    }
    # two blocks of seeds in folders of their own, and the latencies in the first
    made_up_run(
        tmp_path / "a", {k: v.tolist() for k, v in rewards.items()}, {"sequential": 600, "ours": 150, "hasty <b>": 20}
    )
    return tmp_path


def test_the_report_recommends_the_fastest_that_is_equivalent(made_up: Path) -> None:
    runs = gather_runs([made_up])
    summary = summarize(episode_table(runs), gather_latencies(runs, [made_up]), Margins())
    chosen, sentence = recommend(summary, Margins())
    assert chosen == "ours"
    assert "150 ms per chunk against 600, 4.0 times as fast" in sentence
    rows = summary.set_index("sampler")
    assert f"same success within ±0.05: {rows.loc['ours', 'success']:.2f} [" in sentence
    assert rows.loc["ours", "equivalence_p"] < 0.01 < 0.9 < rows.loc["hasty <b>", "equivalence_p"]
    assert rows.loc["hasty <b>", "difference_high"] < -0.15


def test_a_sampler_that_loses_successes_is_passed_over_and_named(tmp_path: Path) -> None:
    base = 0.905 + np.random.default_rng(0).normal(0, 0.01, 100)  # 0.9 is what counts as success
    rewards = {"sequential": base, "ours": base + 1e-6, "short": base - 0.01}
    times = {"sequential": 600, "ours": 150, "short": 20}
    made_up_run(tmp_path / "a", {name: values.tolist() for name, values in rewards.items()}, times)
    runs = gather_runs([tmp_path])
    summary = summarize(episode_table(runs), gather_latencies(runs, [tmp_path]), Margins())
    rows = summary.set_index("sampler")
    assert rows.loc["short", "equivalence_p"] < 0.05
    assert rows.loc["short", "success_difference_high"] < 0 <= rows.loc["ours", "success_difference_high"]
    chosen, sentence = recommend(summary, Margins())
    assert chosen == "ours"
    assert f"“short”, 20 ms, succeeds less often: {rows.loc['short', 'success']:.2f}" in sentence
    colors = sampler_colors(summary, chosen)
    assert colors["ours"] == CHOSEN
    assert len(set(colors.values())) == 3
    chosen, sentence = recommend(summary[summary["sampler"] != "ours"], Margins())
    assert chosen is None
    assert "and its success within ±0.05" in sentence


def test_a_sequential_sampler_that_is_the_fastest_is_recommended_itself(tmp_path: Path) -> None:
    base = np.random.default_rng(0).beta(8, 1, 100)
    made_up_run(
        tmp_path / "a", {"sequential": base.tolist(), "slow": base.tolist()}, {"sequential": 15.6, "slow": 33.9}
    )
    runs = gather_runs([tmp_path])
    summary = summarize(episode_table(runs), gather_latencies(runs, [tmp_path]), Margins())
    chosen, sentence = recommend(summary, Margins())
    assert chosen == "sequential"
    assert (
        "15.6 ms per chunk. The samplers shown to keep its reward and success are no faster: “slow”, 33.9 ms"
        in sentence
    )


def distances(mean: float, spread: float = 1.0) -> dict[str, Any]:
    """One sampler's, with an interval of ± 1e-3."""
    measured = {"mean": mean, "ci95": [mean - 1e-3, mean + 1e-3], "max": mean, "observations": 16}
    return {"energy_distance": measured, "paired_energy_distance": {**measured, "spread": spread}}


def test_what_is_far_from_the_policy_is_never_recommended(made_up: Path) -> None:
    runs = gather_runs([made_up])
    table, latencies = episode_table(runs), gather_latencies(runs, [made_up])

    def ask(table: pd.DataFrame, margins: Margins = Margins(), **energy: float) -> tuple[str | None, str]:  # noqa: B008
        measured = {("pusht", "made/up", name): distances(mean) for name, mean in energy.items()}
        return recommend(summarize(table, latencies, margins, measured or None), margins)

    assert ask(table, ours=0.005)[0] == "ours"
    chosen, sentence = ask(table, ours=0.0098)  # its interval ends above 0.01 of the spread
    assert chosen is None
    assert "“ours”, 150 ms, is up to 1.1e-02 from the policy's distribution (bound 1.0e-02)" in sentence
    assert ask(table, Margins(fidelity=0.02), ours=0.0098)[0] == "ours"
    chosen, sentence = ask(table, sequential=0.0)
    assert chosen is None
    assert "“ours”, 150 ms, was not compared in distribution" in sentence
    assert "No distance between distributions was measured." in ask(table)[1]
    other = table.assign(other=table["sampler"] == "ours")
    chosen, sentence = ask(other, ours=0.0)
    assert (chosen, "samples another distribution" in ask(other)[1]) == (None, False)
    assert ask(other, Margins(others=True), ours=0.5)[0] == "ours"


def test_a_recommendation_takes_enough_episodes(made_up: Path) -> None:
    runs = gather_runs([made_up])
    table = episode_table(runs)
    equal = table[table["sampler"] == "sequential"].assign(sampler="ours", is_reference=False)
    both = pd.concat([table[table["sampler"] == "sequential"], equal])
    latencies = gather_latencies(runs, [made_up])
    for episodes, expected in ((100, "ours"), (99, None)):
        few = both[both["seed"] < episodes]
        chosen, sentence = recommend(summarize(few, latencies, Margins()), Margins())
        assert chosen == expected
    assert "it takes about 100 episodes or more (there are 99)" in sentence


def test_the_schedule_and_the_sampler_say_what_is_another_distribution(tmp_path: Path) -> None:
    made_up_run(tmp_path, {name: [0.5, 0.6] for name in ("sequential", "short", "restart", "secant")}, {})
    entries = ["sequential", {"name": "sequential", "solver": "ddim", "label": "short"}, "restart", "secant"]
    (tmp_path / "run.json").write_text(json.dumps({"config": {"samplers": entries}}))
    table = episode_table(gather_runs([tmp_path])).drop_duplicates("sampler").set_index("sampler")
    assert table["other"].to_dict() == {"sequential": False, "short": True, "restart": True, "secant": False}
    assert table["is_reference"].to_dict() == {"sequential": True, "short": False, "restart": False, "secant": False}


def test_upstream_has_a_row_with_the_scores_of_the_sampler_whose_chunks_it_computes(made_up: Path) -> None:
    times = {"p50": 700.0, "p99": 800.0, "each": [700.0] * 5}
    place = {"env": "pusht", "checkpoint": "made/up", "sampler": "upstream sequential"}
    row = {**place, "same_as": "sequential", "engine": "upstream", "chunk_ms": times}
    (made_up / "latency.json").write_text(json.dumps([row]))
    runs = gather_runs([made_up])
    summary = summarize(episode_table(runs), gather_latencies(runs, [made_up]), Margins())
    rows = summary.set_index("sampler")
    assert rows.loc["upstream sequential", ["reward", "success"]].tolist() == (
        rows.loc["sequential", ["reward", "success"]].tolist()
    )
    assert rows["upstream"].tolist() == [False, False, False, True]
    assert np.isnan(rows.loc["upstream sequential", "equivalence_p"])
    chosen, sentence = recommend(summary, Margins())
    assert chosen == "ours"
    assert "150 ms per chunk against 600 (the published code: 700), 4.0 times" in sentence


def test_errors_obtained_stand_beside_the_error_asked_for() -> None:
    asked = {"median": 0.004, "each": [0.003, 0.0, 0.011], "asked": 0.008}
    measured = {
        "loose": {"chunk_error": {"median": 0.05, "each": [0.04, 0.05, 0.07]}},
        "ours": {"chunk_error": asked},
        "sequential": {"chunk_error": {"median": 0.0, "each": [0.0, 0.0]}},  # the reference itself
        "upstream": {},
        "older": {"chunk_error": {"median": 0.1}},
    }
    figure = calibration_figure(measured, {"ours": "#123456"})
    assert figure is not None
    assert [(trace.name, list(trace.y)) for trace in figure.data] == [
        ("ours", [0.003, 0.011]),
        ("loose", [0.04, 0.05, 0.07]),
        ("asked for", [0.008]),
    ]
    assert figure.data[2].x == ("ours",)
    assert calibration_figure({name: measured[name] for name in ("sequential", "upstream", "older")}, {}) is None


def test_no_recommendation_is_made_without_grounds(made_up: Path, tmp_path: Path) -> None:
    runs = gather_runs([made_up])
    table = episode_table(runs)
    few = table[table["seed"] < 4]
    chosen, sentence = recommend(summarize(few, gather_latencies(runs, [made_up]), Margins(0.001)), Margins(0.001))
    assert chosen is None
    assert "No sampler is shown to keep" in sentence
    chosen, sentence = recommend(summarize(table, {}, Margins()), Margins())
    assert chosen is None
    assert "No latency was measured" in sentence


def test_the_report_is_written(made_up: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_up_run(made_up / "b", {"sequential": [0.5] * 20, "ours": [0.6] * 20}, {}, env="lift", seams={})
    main(["report", str(made_up), "--output", str(made_up / "out")])
    assert "report.html" in capsys.readouterr().out
    page = (made_up / "out" / "report.html").read_text()
    assert "<th>jump at seams</th><th>motion inside</th>" in page
    assert "<td>12.5</td><td>3.25</td>" in page  # of every row of the first run
    assert "<td>–</td><td>–</td></tr>" in page  # the second has none, as older runs
    for text in ("hasty &lt;b&gt;", "All tasks together", "a made-up CPU", "torch 9", "times as fast"):
        assert text in page
    assert "hasty <b></td>" not in page
    assert "https://cdn" not in page.split("</script>")[-1]
    assert len(pd.read_csv(made_up / "out" / "episodes.csv")) == 340
    assert len(pd.read_parquet(made_up / "out" / "episodes.parquet")) == 340
    assert (made_up / "out" / "pareto_pusht_up.png").read_bytes()[:4] == b"\x89PNG"
    tables = (made_up / "out" / "samplers.md").read_text()
    assert "## lift, made/up" in tables
    assert "| ours | 50.0 | 5.0 | 150.0 |" in tables
    assert "| ours | 20 | +0.100 [+0.100, +0.100] | 1 | no |" in tables


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome here")
def test_the_page_shows_its_figures_in_a_browser(made_up: Path) -> None:
    page = write_report([made_up], made_up / "out")
    dumped = subprocess.run(
        [
            str(BROWSER),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
            f"--user-data-dir={made_up / 'profile'}",
            "--virtual-time-budget=10000",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    dom = dumped.stdout
    assert dom.count("main-svg") >= 2, dumped.stderr[-2000:]
    assert "reward, difference by seed" in dom
    assert ">200</text>" in dom  # a logarithmic axis with whole numbers
    assert dom.count('class="point"') >= 6  # three samplers in two panels
    assert "ours</text>" in dom
    assert "largest error of a chunk" in dom


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report"], "no folder"),
        (["report", "/nowhere"], r"no results.json in /nowhere"),
        (["report", ".", "--margin", "-1"], "margin is -1"),
    ],
)
def test_bad_reports_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(arguments)


def test_statistics_against_known_answers() -> None:
    rng = np.random.default_rng(0)
    same = rng.normal(0, 0.1, 200)
    assert equivalence_p(same, 0.05) < 0.001 < 0.5 < equivalence_p(same + 0.06, 0.05)
    assert equivalence_p([0.0, 0.0], 0.01) == 0.0
    assert equivalence_p([0.5], 0.01) == 1.0
    assert interquartile_mean([0, 0, 1, 2, 3, 100, 100, 100]) == pytest.approx(26.5)
    # sd 0.1, margin 0.05: n = ((1.645 + 1.282) 0.1 / 0.05)² = 34
    exact = np.array([-1, 1]) * 0.1 / np.sqrt(2)
    assert episodes_needed(exact, 0.05) == 60  # and none of 3 / 0.05 that differs by 1
    assert episodes_needed(2 * exact, 0.05) == 138
    needed = episodes_needed(2 * same, 0.05)
    shown = [equivalence_p(rng.normal(0, 0.2, needed), 0.05) < 0.05 for _ in range(400)]
    assert 0.68 < np.mean(shown) < 0.9
    low, high = percentile_interval(np.random.default_rng(1).exponential(1, 400), 50)
    assert low < np.log(2) < high
    outliers = [[0, 0, 1, 2] * 20, [3, 100, 100, 100]]
    value, (low, high) = pooled_interval(outliers)
    assert value == interquartile_mean(np.concatenate(outliers)) == pytest.approx(26 / 42)
    assert 0.2 < low < value < high < 1.0 < 4 < np.mean(np.concatenate(outliers))
    value, (low, high) = pooled_interval([rng.uniform(0, 1, 100), rng.uniform(0, 1, 50)])
    assert low < 0.5 < high
    assert low < value < high


def test_a_probability_of_improvement_is_rliables() -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, (50, 3)).round(1)
    y = np.clip(x + rng.normal(0.1, 0.3, (50, 3)), 0, 1).round(1)
    value, (low, high) = pooled_improvement(x.T, y.T)
    assert value == pytest.approx(0.46646666666666664)  # rliable 1.2.0, metrics.probability_of_improvement
    assert low < value < high
    other, (other_low, other_high) = pooled_improvement(y.T, x.T)
    assert other == pytest.approx(1 - value)
    assert (other_low, other_high) == pytest.approx((1 - high, 1 - low), abs=0.01)
    assert pooled_improvement([[1.0, 1.0]], [[0.0, 0.5]]) == (1.0, (1.0, 1.0))
    # Standard error of a Mann-Whitney statistic of two equal distributions: sqrt((n + m + 1) / (12 n m)).
    same = [rng.uniform(0, 1, 100) for _ in range(4)]
    _, (low, high) = pooled_improvement(same[:2], same[2:])
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(201 / 12 / 100**2 / 2), rel=0.1)


def test_a_pooled_mean_gives_each_task_the_same_weight() -> None:
    rng = np.random.default_rng(0)
    value, (low, high) = pooled_mean([[1.0] * 300, rng.permutation([0.0, 1.0] * 50)])
    assert value == 0.75
    assert high - low == pytest.approx(1.96 * 0.5 / np.sqrt(100), rel=0.1)  # of the second task alone, halved


def test_tasks_are_pooled_by_sampler(made_up: Path) -> None:
    made_up_run(made_up / "b", {"sequential": [0.5] * 20, "ours": [0.6] * 20}, {}, env="lift", seams={})
    episodes = episode_table(gather_runs([made_up]))
    assert pool(episodes[episodes["env"] == "lift"]).empty
    pooled = pool(episodes).set_index("sampler")
    assert (pooled.loc["sequential", "tasks"], pooled.loc["ours", "tasks"]) == (2, 2)
    assert pd.isna(pooled.loc["sequential", "improvement"])
    means = episodes.groupby(["sampler", "env"])["reward"].mean()
    assert pooled.loc["ours", "mean"] == pytest.approx(means["ours"].mean())
    shift = means["ours"] - means["sequential"]
    assert pooled.loc["ours", "difference"] == pytest.approx(shift.mean())
    assert 0.5 < pooled.loc["ours", "improvement"] <= 1
    path = write_report([made_up], made_up / "out").parent
    assert pd.read_csv(path / "pooled.csv")["sampler"].tolist() == pooled.index.tolist()
    assert (
        f"| ours | 2 | {pooled.loc['ours', 'episodes']} | {pooled.loc['ours', 'mean']:.3f} ["
        in (path / "pooled.md").read_text()
    )
