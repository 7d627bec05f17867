"""The benchmark runs, and what it reports hangs together."""

import json
import sys
from pathlib import Path

import pytest
import torch

from parapolicy import bench
from parapolicy.engine import make_engine
from tests.conftest import SHIPPED
from tests.helpers import small_policy


def test_the_floor_counts_the_network_s_work() -> None:
    policy = small_policy()
    x = torch.randn(3, policy.spec.horizon, 2)
    inputs = (x, torch.zeros(3, dtype=torch.int64), torch.randn(3, policy.spec.condition_dim))
    weights = sum(parameter.numel() for parameter in policy.network.parameters())
    slow_memory = {"flops_per_second": 1e30, "bytes_per_second": 4.0}
    assert bench.network_floor(policy.network, inputs, slow_memory) == weights
    slow_arithmetic = {"flops_per_second": 1.0, "bytes_per_second": 1e30}
    one = bench.network_floor(policy.network, tuple(value[:1] for value in inputs), slow_arithmetic)
    assert bench.network_floor(policy.network, inputs, slow_arithmetic) == 3 * one
    assert one > 2 * weights / 3  # most weights are used at several positions, some at one


def test_every_call_is_timed_once_per_repeat_in_rotating_order() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = bench.alternate(calls, 3)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_chunks_of_every_kind_are_measured() -> None:
    policy = small_policy()
    rows = bench.bench_chunks(policy, {"eager": make_engine("eager", policy.network)}, 2)
    assert {"upstream, DDPM-100", "upstream, DDIM-10", "sequential, eager", "secant, eager"} <= set(rows)
    assert all(0 < row["p50"] <= row["max"] for row in rows.values())


def test_the_command_writes_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "BATCHES", (1, 4))
    monkeypatch.setattr(bench, "ROBOTS", (1, 2))
    options = ["--engines", "eager", "--chunks", "1", "--device", "cpu", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench", str(SHIPPED), *options])
    bench.main()
    results = json.loads((tmp_path / "bench.json").read_text())
    assert [row["batch"] for row in results["network"]] == [1, 4]
    assert all(row["eager"] > 0 and row["floor"] > 0 for row in results["network"])
    assert (tmp_path / "bench.png").stat().st_size > 1000
    assert [row["robots"] for row in results["robots"]] == [1, 2]
    assert "upstream / p50" in capsys.readouterr().out
