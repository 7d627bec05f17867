"""The benchmark runs, and what it reports hangs together."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import parapolicy
from parapolicy.bench import __main__ as command
from parapolicy.bench import benchmarks, roofline, soak
from parapolicy.bench.widen import widen
from tests.conftest import SHIPPED
from tests.helpers import call_network, small_policy


def test_the_floor_counts_the_network_s_work() -> None:
    policy = small_policy()
    flops, weights = benchmarks.work(policy)
    assert weights == 4 * sum(parameter.numel() for parameter in policy.network.parameters())
    assert flops > 2 * weights / 12  # most weights are used at several positions, some at one
    slow_memory = {"flops_per_second": 1e30, "bytes_per_second": 4.0}
    assert roofline.floor(2, 30, flops, weights, slow_memory) == 2 * weights / 4
    slow_arithmetic = {"flops_per_second": 1.0, "bytes_per_second": 1e30}
    assert roofline.floor(2, 30, flops, weights, slow_arithmetic) == 30 * flops


@pytest.mark.parametrize(("calls", "seconds"), [(2, 90.0), (3, 120.0)])
def test_the_floor_is_the_longer_of_arithmetic_and_reading(calls: int, seconds: float) -> None:
    """30 rows of 6 FLOPs at 2 a second, and calls of 200 bytes at 5 a second, side by side."""
    assert roofline.floor(calls, 30, 6, 200, {"flops_per_second": 2.0, "bytes_per_second": 5.0}) == seconds


def test_a_row_s_flops_are_those_of_a_hand_count() -> None:
    arguments = {"diffusion_step_embed_dim": 8, "down_dims": [4], "kernel_size": 3, "n_groups": 2}
    observation = {"position": (3,)}
    policy = small_policy(observation=observation, n_obs_steps=1, horizon=5, network={"name": "unet1d", **arguments})
    step_encoder = 2 * (8 * 32 + 32 * 8)
    positions = 5
    down = 3 * (2 * 4 + 4 * 4) + 2 * 4 + 3 * (4 * 4 + 4 * 4)  # with a residual projection in the first
    middle = 2 * 3 * (4 * 4 + 4 * 4)
    end = 3 * 4 * 4 + 4 * 2
    film = 4 * (8 + 3) * 8
    expected = step_encoder + 2 * positions * (down + middle + end) + 2 * film
    assert roofline.row_flops(policy.network, policy.spec) == expected


@pytest.mark.parametrize(("down_dims", "scale"), [((8, 16), True), ((8, 16, 16), False)])
def test_a_widened_network_is_the_same_function(down_dims: tuple[int, ...], scale: bool) -> None:
    sizes = {"diffusion_step_embed_dim": 16, "down_dims": list(down_dims), "n_groups": 4, "cond_predict_scale": scale}
    policy = small_policy(network={"name": "unet1d", **sizes})
    wide = widen(policy, 3)
    x, timestep, condition = torch.randn(6, 8, 2), torch.arange(6), torch.randn(6, policy.spec.condition_dim)
    expected = call_network(policy.network, x, timestep, condition)
    torch.testing.assert_close(call_network(wide.network, x, timestep, condition), expected, rtol=0, atol=1e-5)
    assert wide.network.mid_modules[0].blocks[0].block[0].out_channels == 3 * down_dims[-1]
    assert wide.spec.network["down_dims"] == [3 * channels for channels in down_dims]


def test_widened_fourfold_the_shipped_policy_has_the_published_size(shipped: parapolicy.Policy) -> None:
    parameters = sum(parameter.numel() for parameter in widen(shipped, 4).network.parameters())
    assert 60e6 < parameters < 70e6


def test_every_call_is_timed_once_per_repeat_in_rotating_order() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = benchmarks.alternate(calls, 3, torch.device("cpu"))
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    order.clear()
    seconds = benchmarks.alternate(calls, 2, torch.device("cpu"), leading=1)
    assert "".join(order) == "abc" + "aabbcc" + "bbccaa"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_more_steps_are_the_same_noise_levels_more_finely_divided(shipped: parapolicy.Policy) -> None:
    finer = benchmarks._with_steps(shipped, 400)
    assert len(finer.schedule) == 400
    trained = dict(zip(shipped.schedule.timesteps.tolist(), shipped.schedule.alpha.tolist(), strict=True))
    found = dict(zip(finer.schedule.timesteps.tolist(), finer.schedule.alpha.tolist(), strict=True))
    for timestep in (0, 50, 98):
        assert found[timestep] == pytest.approx(trained[timestep], abs=1e-3)


def test_the_command_writes_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parapolicy.save_policy(small_policy(), tmp_path / "policy")  # of 20 steps
    few = {"BATCHES": (1, 4), "ROBOTS": (1, 2), "ROBOT_SAMPLERS": ("collocation", "sequential")}
    for name, value in (few | {"WINDOWS": (20,), "STEPS": (5,), "HORIZONS": (8,)}).items():
        monkeypatch.setattr(benchmarks, name, value)
    options = ["--engines", "eager", "--chunks", "1", "--device", "cpu", "--scaling", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench", str(tmp_path / "policy"), *options])
    command.main()
    results = json.loads((tmp_path / "bench.json").read_text())
    assert [row["batch"] for row in results["network"]] == [1, 4]
    assert all(row["eager"] > 0 and row["floor"] > 0 for row in results["network"])
    chunks = {row["chunk"]: row for row in results["chunks"]}
    assert {"upstream, DDPM-100", "upstream, DDIM-10", "sequential, eager", "secant (window 40), eager"} <= set(chunks)
    assert all(0 < row["p50"] <= row["max"] for row in chunks.values())
    assert 0 < chunks["secant (window 40), eager"]["error_p95"] < 0.1
    assert chunks["sequential, eager"]["rounds"] == 20
    assert (tmp_path / "bench.png").stat().st_size > 1000
    assert [row["robots"] for row in results["robots"]] == [1, 1, 2, 2]
    assert {row["sampler"]: row["rounds"] for row in results["robots"]}["sequential"] == 20
    assert [row["T"] for row in results["scaling"]["steps"]] == [5]
    assert [row["devices"] for row in results["scaling"]["devices"]] == [1, 2]
    assert results["peak_memory"]["process"] > 50
    assert "peak memory" in capsys.readouterr().out


def test_numbers_that_make_no_sense_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--widen", "0"])
    with pytest.raises(SystemExit):
        command.main()
    assert "--widen is 0, expected at least 1" in capsys.readouterr().err


def test_a_soak_reports_every_tenth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--chunks", "20", "--engine", "eager", "--device", "cpu", "--output", str(tmp_path / "soak.json")]
    monkeypatch.setattr(sys, "argv", ["soak", str(SHIPPED), *options])
    soak.main()
    printed = capsys.readouterr().out
    assert printed.count(" to ") == 10
    assert "18 to 20" in printed
    assert len(json.loads((tmp_path / "soak.json").read_text())["rows"]) == 11


def test_a_soak_of_a_controller_counts_what_was_missed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    parapolicy.save_policy(small_policy(), tmp_path)
    options = ["--engine", "eager", "--device", "cpu", "--control-hz", "50", "--seconds", "0.4"]
    monkeypatch.setattr(sys, "argv", ["soak", str(tmp_path), *options])
    act = parapolicy.Controller.act

    def slow(controller: parapolicy.Controller, observation: dict[str, np.ndarray]) -> np.ndarray:
        if controller.step == 5:
            time.sleep(0.25)
        return act(controller, observation)

    monkeypatch.setattr(soak.Controller, "act", slow)
    with pytest.warns(UserWarning, match="the loop does not keep its 50 Hz|the policy was trained"):
        soak.main()
    printed = capsys.readouterr().out
    rows = [line.split("│") for line in printed.splitlines() if " to " in line or "all " in line]
    assert len(rows) == 11
    missed = [int(row[7]) for row in rows]
    assert missed[-1] == sum(missed[:-1]) >= 5
    assert "'steps': 21" in printed


def test_a_soak_may_begin_a_chunk_at_each_control_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    parapolicy.save_policy(small_policy(), tmp_path / "policy")
    rounds: list[tuple[str, int]] = []
    predict = parapolicy.Policy.predict

    def note(policy: parapolicy.Policy, *arguments: Any, **options: Any) -> parapolicy.Chunk:
        chunk = predict(policy, *arguments, **options)
        rounds.append((type(policy.sampler).__name__, len(chunk.actions)))
        return chunk

    monkeypatch.setattr(parapolicy.Policy, "predict", note)
    options = ["--engine", "eager", "--device", "cpu", "--control-hz", "10", "--seconds", "1", "--executed", "1"]
    options += ["--sampler", "{name: paradigms, window: 3}", "--output", str(tmp_path / "soak.json")]
    monkeypatch.setattr(sys, "argv", ["soak", str(tmp_path / "policy"), *options])
    soak.main()
    assert set(rounds) == {("ParaDiGMS", 1)}
    assert len(rounds) > 5 + 1  # warming up, and at rest
    assert "'steps': 11" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "soak.json").read_text())["rows"]) == 11
    monkeypatch.setattr(sys, "argv", ["soak", str(tmp_path / "policy"), *options, "--executed", "9"])
    with pytest.raises(SystemExit, match="n_action_steps"):
        soak.main()
    monkeypatch.setattr(sys, "argv", ["soak", str(tmp_path / "policy"), *options, "--priority", "100"])
    with pytest.raises(SystemExit):
        soak.main()
    assert "--priority is 100, expected 1 to 99" in capsys.readouterr().err
