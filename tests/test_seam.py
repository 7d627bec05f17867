"""How a controller joins chunks: on a simulated clock, with chunks that come in time, late and not at all."""

import dataclasses
import re
from typing import Any

import numpy as np
import pytest

from parapolicy import Controller
from parapolicy.control import SimulatedClock
from parapolicy.control.seam import SEAMS
from parapolicy.evaluate.run.motion import chunk_motion, jerks, seam_jumps
from parapolicy.evaluate.run.variants import build_variants
from parapolicy.policy import Chunk, Policy
from tests.helpers import small_policy, some_observation

pytestmark = pytest.mark.filterwarnings("ignore:act was called")  # a first chunk takes longer than a period
FIRST = 1  # of the small policy's horizon of 8: the present step; 4 actions are executed


class Recorded:
    """A policy on a simulated clock, which records what it was asked."""

    def __init__(self, policy: Policy, *seconds: float) -> None:
        self.policy, self.spec = policy, policy.spec
        self.seconds = list(seconds)  # of every chunk; the last one of all later ones
        self.calls: list[dict[str, Any]] = []
        self.chunks: list[Chunk] = []
        self.clock = SimulatedClock(lambda measured: self.seconds[min(len(self.chunks), len(self.seconds)) - 1])

    def predict(self, observation: Any, **options: Any) -> Chunk:
        self.calls.append(options)

        def compute() -> Chunk:
            self.chunks.append(self.policy.predict(observation, **options))
            return self.chunks[-1]

        chunk: Chunk = self.clock.compute(compute)
        return chunk


def run(policy: Recorded, steps: int, seed: int = 0, **options: Any) -> tuple[Controller, np.ndarray, list[dict]]:
    """A new controller's actions, (steps, Da), and its log."""
    rows: list[dict] = []
    options = {"asynchronous": True, "log": rows.append, **options}
    executor = policy.clock if options["asynchronous"] else None
    controller = Controller(policy, 10, clock=policy.clock, executor=executor, **options)
    controller.reset(seed)
    actions = drive(controller, policy, steps)
    return controller, actions, rows


def drive(controller: Controller, policy: Recorded, steps: int) -> np.ndarray:
    actions = []
    for _ in range(steps):
        seen = some_observation(policy.spec, seed=controller.step + 1)
        actions.append(controller.act({key: value[0] for key, value in seen.items()}))
        policy.clock.advance(0.1)
    return np.stack(actions)


def test_a_chunk_is_sampled_with_what_is_executed_meanwhile() -> None:
    """200 ms at 10 Hz: the chunk that is begun at step 2 comes at step 4; steps 2 and 3 are held."""
    policy = Recorded(small_policy("sequential"), 0.2)
    _, actions, rows = run(policy, 12, seam="hold")
    assert "hold" not in policy.calls[0]
    hold = policy.calls[1]["hold"]
    np.testing.assert_array_equal(hold.weights, [0, 1, 1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(hold.actions[FIRST : FIRST + 2], actions[2:4])
    np.testing.assert_array_equal(policy.chunks[1].trajectory[FIRST : FIRST + 2], actions[2:4])
    np.testing.assert_array_equal(actions[4], policy.chunks[1].trajectory[FIRST + 2])  # which goes on from there
    assert [row["held_from"] for row in rows[2:8]] == [None, None, 0, 0, 1, 1]
    assert [row["committed"] for row in rows[2:8]] == [0, 0, 2, 2, 2, 2]


def test_a_held_chunk_can_be_computed_again_from_the_log() -> None:
    policy = Recorded(small_policy("sequential"), 0.2)
    controller, _, rows = run(policy, 8, seam="hold_soft", warm_start=True)
    assert policy.calls[1]["warm"] is not None
    assert controller.record.chunks[1].held_from == 0
    assert rows[-1]["held_from"] == rows[-1]["warm_from"]


def test_without_latency_nothing_is_held() -> None:
    policy = small_policy("sequential")
    policies = [Recorded(policy, 0.0) for _ in range(2)]
    plain, held = (run(p, 20, seam=seam)[1] for p, seam in zip(policies, ("none", "hold"), strict=True))
    np.testing.assert_array_equal(plain, held)
    assert not any("hold" in call for call in policies[1].calls)


@pytest.mark.parametrize("seam", SEAMS)
def test_the_same_seed_gives_the_same_actions_and_reset_forgets(seam: str) -> None:
    policy = small_policy("sequential")
    first, second = (Recorded(policy, 0.2) for _ in range(2))
    controller, actions, _ = run(first, 14, 5, seam=seam)
    np.testing.assert_array_equal(run(second, 14, 5, seam=seam)[1], actions)
    asked = len(first.calls)
    controller.reset(5)
    first.clock.reset()
    np.testing.assert_array_equal(drive(controller, first, 14), actions)
    assert "hold" not in first.calls[asked]


@pytest.mark.parametrize("seam", SEAMS)
def test_a_late_chunk_never_jumps_back_in_time(seam: str) -> None:
    """Chunks that come as expected, 3 steps late and earlier: every action is for its own control step."""
    policy = Recorded(small_policy("sequential"), 0.1, 0.1, 0.4, 0.1, 0.3, 0.2)
    controller, actions, rows = run(policy, 30, seam=seam)
    chunks = [row["chunk"] for row in rows]
    assert chunks == sorted(chunks)
    assert len(set(chunks)) > 4
    for row, action in zip(rows, actions, strict=True):
        assert row["index"] == row["step"] - row["begin"]
        if seam in ("none", "hold", "hold_soft"):
            actual = policy.chunks[row["chunk"]].trajectory[FIRST:]
            np.testing.assert_array_equal(action, actual[min(row["index"], len(actual) - 1)])
    assert controller.record.held == 0


def test_a_chunk_that_comes_later_than_expected_has_the_expected_steps_held() -> None:
    policy = Recorded(small_policy("sequential"), 0.1, 0.3)
    _, actions, rows = run(policy, 8, seam="hold")
    held = policy.calls[1]["hold"]
    np.testing.assert_array_equal(held.weights, [0, 1, 0, 0, 0, 0, 0, 0])
    taken = next(row["step"] for row in rows if row["chunk"] == 1)
    assert taken - rows[taken]["begin"] == 3
    np.testing.assert_array_equal(actions[taken], policy.chunks[1].trajectory[FIRST + 3])


def test_blending_fades_over_the_overlap() -> None:
    policy = Recorded(small_policy("sequential"), 0.0)
    _, actions, _ = run(policy, 8, seam="blend", asynchronous=False)
    old, new = (chunk.trajectory[FIRST:] for chunk in policy.chunks)
    for k in range(3):  # the old chunk has actions for steps 4 to 6
        share = (k + 1) / 4
        np.testing.assert_allclose(actions[4 + k], share * new[k] + (1 - share) * old[4 + k], rtol=1e-5)
    np.testing.assert_array_equal(actions[7], new[3])


def test_a_fade_that_has_not_ended_goes_on_within_the_next() -> None:
    policy = Recorded(small_policy("sequential", n_action_steps=2), 0.0)
    _, actions, _ = run(policy, 5, seam="blend", asynchronous=False)
    a, b, c = (chunk.trajectory[FIRST:] for chunk in policy.chunks)
    before = 3 / 6 * b[2] + 3 / 6 * a[4]  # at step 4, the third of the five that a and b share
    np.testing.assert_allclose(actions[4], 1 / 6 * c[0] + 5 / 6 * before, rtol=1e-5)


def test_a_chunk_that_comes_after_the_old_one_s_end_takes_over_at_once() -> None:
    policy = Recorded(small_policy("sequential"), 0.0, 0.6)
    _, actions, rows = run(policy, 11, seam="blend")
    taken = next(row["step"] for row in rows if row["chunk"] == 1)
    assert rows[taken - 1]["kind"] == "held"
    index = FIRST + taken - rows[taken]["begin"]
    np.testing.assert_array_equal(actions[taken], policy.chunks[1].trajectory[index])


def test_ensembling_weighs_every_chunk_for_the_step() -> None:
    policy = Recorded(small_policy("sequential", n_action_steps=2), 0.0)
    _, actions, _ = run(policy, 8, seam="ensemble", asynchronous=False)
    a, b, c, d = (chunk.trajectory[FIRST:] for chunk in policy.chunks)
    for step, values in {1: [a[1]], 3: [a[3], b[1]], 5: [a[5], b[3], c[1]], 7: [b[5], c[3], d[1]]}.items():
        weights = np.exp(-0.01 * np.arange(len(values)))
        np.testing.assert_allclose(actions[step], np.average(values, axis=0, weights=weights), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seam": "smooth"}, "seam is 'smooth', expected one of ('none', 'hold',"),
        ({"seam": "hold", "asynchronous": False}, "a synchronous robot waits"),
        ({"seam": "ensemble", "blend_steps": 2}, "blend_steps is 2, which seam 'ensemble' does not use"),
    ],
)
def test_a_seam_that_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    policy = Recorded(small_policy(), 0.0)
    with pytest.raises(ValueError, match=re.escape(message)):
        run(policy, 1, **options)


@pytest.mark.parametrize("seam", ["hold_soft", "blend", "ensemble"])
def test_chunks_that_do_not_overlap_are_refused(seam: str) -> None:
    policy = Recorded(small_policy(n_action_steps=7), 0.0)
    with pytest.raises(ValueError, match=r"needs overlapping chunks, but the policy executes all 7 actions"):
        run(policy, 1, seam=seam)
    held = Recorded(small_policy(n_action_steps=7), 0.1)
    run(held, 8, seam="hold")
    assert "hold" in held.calls[1]  # there is still what is executed meanwhile


def test_a_policy_that_cannot_hold_is_refused_before_it_fails() -> None:
    class Plain:
        spec = small_policy().spec

        def predict(self, observation: Any, *, seed: int, deadline: Any, warm: Any, executed: int | None) -> Chunk: ...  # type: ignore[empty-body]

    Controller(Plain(), 10, asynchronous=True, seam="blend").close()
    with pytest.raises(ValueError, match="expected a policy whose predict takes hold"):
        Controller(Plain(), 10, asynchronous=True, seam="hold")
    Controller(small_policy(), 10, asynchronous=True, seam="hold").close()


def test_a_policy_that_holds_nothing_is_not_asked_to() -> None:
    """Policies of one's own, such as a client of a server, need no argument ``hold`` for the other seams."""
    policy = Recorded(small_policy(), 0.2)
    run(policy, 10, seam="blend")
    assert not any("hold" in call for call in policy.calls)


def test_entries_of_an_evaluation_have_seams() -> None:
    policy = small_policy()
    entries = ["sequential", {"name": "collocation", "seam": "ensemble"}]
    variants = build_variants(policy, entries, control="async", seam="hold")
    assert [variant.seam for variant in variants.values()] == ["hold", "ensemble"]
    assert dataclasses.replace(variants["collocation"], asynchronous=False).needs_controller
    with pytest.raises(ValueError, match="a synchronous robot waits"):
        build_variants(policy, entries, seam="hold")


def test_motion_is_measured_in_units_of_actions() -> None:
    x = np.array([0.0, 1.0, 2.0, 5.0, 6.0, 8.0])
    actions, chunks = np.stack((x, 0 * x), 1), [0, 0, 0, 1, 1, 1]
    assert seam_jumps(actions, chunks) == [3.0]
    assert chunk_motion(actions, chunks) == [1.0, 1.5]
    np.testing.assert_allclose(jerks(actions), np.abs(np.diff(x, 3)))
    assert jerks(actions[:3]) == seam_jumps(actions[:1], [0]) == chunk_motion(actions[:1], [0]) == []
