"""Plans are measured once, remembered by all that they depend on, and chosen by the clock."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import parapolicy
from parapolicy import planner
from parapolicy.calibrate import with_calibration
from parapolicy.samplers import Collocation, Secant, Sequential, make_sampler
from parapolicy.schedule import Calibration
from tests.conftest import SHIPPED
from tests.helpers import small_policy


def test_every_candidate_is_measured_and_the_fastest_is_taken() -> None:
    policy = small_policy()
    plan = planner._measure(policy, planner.made_up_observations(policy, 2), tolerance=0.05)
    assert list(plan.milliseconds) == ["sequential", "window 16", "window 20"]  # the schedule has 20 steps
    assert plan.rounds["sequential"] == 20
    assert plan.rounds["window 20"] < 20
    assert min(plan.milliseconds.values()) == plan.milliseconds[plan.choice] > 0


@pytest.mark.parametrize(("fastest", "sampler"), [("sequential", Sequential()), ("window 16", Secant(16, 0.05))])
def test_the_choice_is_applied_and_explained(fastest: str, sampler: object) -> None:
    milliseconds = {"sequential": 5.0, "window 16": 5.0, "window 20": 5.0} | {fastest: 4.0}
    plan = parapolicy.Plan(milliseconds, dict.fromkeys(milliseconds, 2.0), 0.05)
    assert plan.apply(small_policy()).sampler == sampler
    assert str(plan).startswith(f"{fastest} is the fastest")
    assert "4.0 ms" in str(plan)


def test_a_plan_is_remembered_until_something_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = small_policy()
    first = parapolicy.make_plan(policy, cache=tmp_path)
    (entry,) = tmp_path.iterdir()
    counted: list[int] = []
    measure = planner._measure
    monkeypatch.setattr(planner, "_measure", lambda *a: counted.append(1) or measure(*a))
    assert parapolicy.make_plan(policy, cache=tmp_path) == first
    assert not counted
    entry.write_text("{damaged")
    parapolicy.make_plan(policy, cache=tmp_path)
    parapolicy.make_plan(policy, tolerance=0.03, cache=tmp_path)
    parapolicy.make_plan(policy.with_schedule("ddim", 10), cache=tmp_path)
    with torch.no_grad():
        next(policy.network.parameters()).add_(1e-3)
    parapolicy.make_plan(policy, cache=tmp_path)
    assert len(counted) == 4


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert parapolicy.make_plan(small_policy(), cache=blocked).choice


def test_load_policy_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PARAPOLICY_CACHE", str(tmp_path))
    policy = parapolicy.load_policy(SHIPPED, sampler="auto", device="cpu", engine="fused", tolerance=0.02)
    assert len(list(tmp_path.glob("plan-*.json"))) == 1
    assert isinstance(policy.sampler, Sequential | Collocation) or policy.sampler.tolerance == 0.02
    parapolicy.explain(policy, tolerance=0.02)
    printed = capsys.readouterr().out
    assert "is the fastest of what was measured here" in printed
    assert "collocation" in printed  # whose distribution this policy's calibration has measured
    with pytest.raises(ValueError, match=r"no parameters \['window'\]"):
        parapolicy.load_policy(SHIPPED, sampler="auto", window=3, engine="eager")


@pytest.mark.parametrize(
    "damage",
    [
        {"milliseconds": {"window 20": 1.0}, "rounds": {"window 20": 1.0}},
        {"milliseconds": ["sequential", "window 16", "window 20"]},
        {"milliseconds": {"sequential": float("nan"), "window 16": 2.0, "window 20": 2.0}},
        {"milliseconds": {"sequential": -1.0, "window 16": 2.0, "window 20": 2.0}},
        {"milliseconds": {"sequential": True, "window 16": 2.0, "window 20": 2.0}},
        {"milliseconds": {"sequential": "1", "window 16": 2.0, "window 20": 2.0}},
        {"milliseconds": {"sequential": 10**400, "window 16": 2.0, "window 20": 2.0}},
        {"milliseconds": {"sequential": 2.0, "window 16": 2.0, "window 20": 2.0, "window 99999": 1.0}},
        {"rounds": {"sequential": 0, "window 16": 2.0, "window 20": 2.0}},
        {"tolerance": 0.5},
        {"tolerance": "0.015"},
    ],
)
def test_a_remembered_plan_that_cannot_have_been_measured_is_measured_anew(
    damage: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = small_policy()
    names = ("sequential", "window 16", "window 20")
    plan = parapolicy.Plan(dict.fromkeys(names, 3.0), dict.fromkeys(names, 2.0), planner.TOLERANCE)
    monkeypatch.setattr(planner, "_measure", lambda *a: plan)
    parapolicy.make_plan(policy, cache=tmp_path)
    (entry,) = tmp_path.iterdir()  # and no unfinished file
    entry.write_text(json.dumps({**dataclasses.asdict(plan), **damage}))
    assert parapolicy.make_plan(policy, cache=tmp_path) == plan
    assert json.loads(entry.read_text()) == dataclasses.asdict(plan)


def test_a_plan_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = small_policy()
    expected = parapolicy.make_plan(policy, cache=tmp_path)
    (entry,) = tmp_path.iterdir()
    entry.write_text("{}")  # to be measured and written again
    monkeypatch.setattr(planner, "_measure", lambda *a: expected)
    write = Path.write_text

    def fill_up(path: Path, text: str, *a: Any, **b: Any) -> int:
        write(path, text[:10], *a, **b)
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", fill_up)
    assert parapolicy.make_plan(policy, cache=tmp_path) == expected
    assert [path.read_text() for path in tmp_path.iterdir()] == ["{}"]


def test_a_user_without_a_home_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("PARAPOLICY_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert parapolicy.make_plan(small_policy()).choice


def test_a_plan_for_the_distribution_knows_collocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = small_policy()
    plan = parapolicy.make_plan(policy, cache=tmp_path, fidelity="distribution")
    assert {"sequential", "window 20", "collocation 20/1", "collocation 20/12"} < set(plan.milliseconds)
    fastest = dataclasses.replace(plan, milliseconds={**plan.milliseconds, "collocation 20/3": 1e-9})
    assert fastest.apply(policy).sampler == Collocation(20, 3)
    assert "collocation 20/3" not in parapolicy.make_plan(policy, cache=tmp_path).milliseconds
    monkeypatch.setattr(planner, "_measure", lambda *a: pytest.fail("measured again"))
    assert parapolicy.make_plan(policy, cache=tmp_path, fidelity="distribution") == plan
    with pytest.raises(ValueError, match="fidelity is 'reward'"):
        parapolicy.make_plan(policy, cache=tmp_path, fidelity="reward")


def measured_policy(distances: dict[int, float]) -> parapolicy.Policy:
    policy = small_policy()
    calibration = Calibration(torch.eye(16), torch.zeros(20, 16), {}, distances)
    return dataclasses.replace(policy, schedule=dataclasses.replace(policy.schedule, calibration=calibration))


def test_the_fewest_nodes_within_the_bound_are_taken(tmp_path: Path) -> None:
    distances = {6: 0.03, 8: 0.004, 12: 0.001}
    policy = measured_policy(distances)
    found = [planner.find_nodes(policy, bound) for bound in (0.05, 0.01, 0.002, 1e-4)]
    assert found == [6, 8, 12, None]
    plan = parapolicy.make_plan(policy, cache=tmp_path, fidelity="distribution")
    assert {name for name in plan.milliseconds if name.startswith("col")} == {
        f"collocation 8/{window}" for window in (1, 3, 6, 8)
    }
    assert parapolicy.make_plan(policy, cache=tmp_path) == plan  # since it was measured, that is what is kept
    assert parapolicy.make_plan(policy, cache=tmp_path, bound=1e-4).fidelity == "seed"
    assert parapolicy.make_plan(small_policy(), cache=tmp_path).fidelity == "seed"
    strict = parapolicy.make_plan(policy, cache=tmp_path, fidelity="distribution", bound=1e-4)
    assert set(strict.milliseconds) == {"sequential", "window 16", "window 20"}
    assert planner.find_nodes(small_policy()) == 20  # nothing was measured: many nodes
    with pytest.raises(ValueError, match="bound is 0, expected a number above 0"):
        parapolicy.make_plan(policy, fidelity="distribution", bound=0)


def test_a_plan_is_of_a_batch(tmp_path: Path) -> None:
    policy, sizes = small_policy(), []
    policy.network.register_forward_pre_hook(lambda network, inputs: sizes.append(len(inputs[0])))
    plan = parapolicy.make_plan(policy, cache=tmp_path, batch=3)
    assert sizes[0] == 3
    assert plan.batch == 3
    assert parapolicy.make_plan(policy, cache=tmp_path, batch=3) == plan
    assert parapolicy.make_plan(policy, cache=tmp_path).batch == 1
    with pytest.raises(ValueError, match="batch is 0"):
        parapolicy.make_plan(policy, batch=0)


def test_load_policy_calibrates_for_the_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAPOLICY_CACHE", str(tmp_path / "cache"))
    parapolicy.save_policy(small_policy(), tmp_path / "policy")
    policy = parapolicy.load_policy(
        tmp_path / "policy", sampler="auto", fidelity="distribution", device="cpu", engine="eager"
    )
    assert policy.schedule.calibration is not None


@pytest.mark.parametrize(
    ("distances", "name"), [({24: 0.004}, "Collocation"), ({24: 0.04, 32: 0.001}, "Secant"), ({}, "Secant")]
)
def test_a_policy_is_interpolated_by_default_only_where_that_was_measured(
    distances: dict[int, float], name: str
) -> None:
    assert type(planner.default_sampler(measured_policy(distances))).__name__ == name


def test_a_policy_is_loaded_with_its_default_sampler_and_no_calibration_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert parapolicy.load_policy(SHIPPED, device="cpu", engine="eager").sampler == Collocation(24, 3)
    monkeypatch.setattr("parapolicy.calibrate.calibrate", lambda *a: pytest.fail("calibrated"))
    parapolicy.save_policy(small_policy(), tmp_path)
    assert parapolicy.load_policy(tmp_path, device="cpu", engine="eager").sampler == Secant()
    with pytest.raises(ValueError, match=r"\['window'\] are parameters of a sampler, but no sampler is named"):
        parapolicy.load_policy(tmp_path, device="cpu", window=8)


@pytest.mark.parametrize(("change", "fits"), [(1e-6, True), (0.01, False)])
def test_a_calibration_fits_the_schedule_that_another_processor_computes(change: float, fits: bool) -> None:
    """Processors differ in the last bits of a schedule's tables."""
    policy = parapolicy.load_policy(SHIPPED, device="cpu", engine="eager", sampler="sequential")
    tables = {name: getattr(policy.schedule, name) * (1 + change) for name in ("A", "B", "S", "alpha", "sigma")}
    computed = dataclasses.replace(policy.schedule, calibration=None, **tables)
    found = with_calibration(dataclasses.replace(policy, schedule=computed), SHIPPED, measure=False)
    assert (found.schedule.calibration is not None) == fits


def test_auto_nodes_are_the_fewest_that_were_measured_to_be_within_the_bound() -> None:
    schedule = measured_policy({6: 0.03, 8: 0.004, 12: 0.001}).schedule
    assert len(make_sampler("collocation", nodes="auto").tables(schedule).nodes) == 8
    for unmeasured in (small_policy(), measured_policy({6: 0.03})):
        with pytest.raises(ValueError, match="no number of nodes was measured to keep"):
            make_sampler("collocation", nodes="auto").tables(unmeasured.schedule)
