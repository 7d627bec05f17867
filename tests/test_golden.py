"""The shipped policies compute what they always have: their condition by hand, and one chunk each as numbers on file.

After a change that is meant to change them: ``python -m tests.test_golden --write``.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import parapolicy
from tests.helpers import received_condition

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden.json"
ROBOMIMIC = ("object", "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
KEYS = {  # in the order in which the network was trained on them
    "pusht_lowdim": ("keypoint", "agent_pos"),
    "lift_lowdim": ROBOMIMIC,
    "can_lowdim": ROBOMIMIC,
    "square_lowdim": ROBOMIMIC,
}
SAMPLERS = ("sequential", "secant")

Steps = list[dict[str, np.ndarray]]


def affine(name: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset of a key, as they are in the policy's file."""
    tensors = load_file(ROOT / "checkpoints" / name / "model.safetensors")
    return tensors[f"normalizer.{key}.scale"], tensors[f"normalizer.{key}.offset"]


def made_up_steps(name: str) -> Steps:
    """Two control steps' observations, oldest first, within four fifths of what the policy was trained on."""
    steps: Steps = [{}, {}]
    for k, key in enumerate(KEYS[name]):
        scale, offset = affine(name, key)
        waves = 0.8 * np.sin(1.0 + k + 0.7 * np.arange(2 * scale.size)).reshape(2, *scale.shape)
        for step, wave in zip(steps, waves, strict=True):
            step[key] = ((wave - offset) / scale).astype(np.float32)
    return steps


def stacked(policy: parapolicy.Policy, steps: Steps) -> dict[str, np.ndarray]:
    history = parapolicy.ObservationHistory(policy.spec)
    for step in steps:
        history.push(dict(reversed(step.items())))  # the caller's order means nothing
    return history.stacked()


def sample(name: str, sampler: str) -> tuple[np.ndarray, int]:
    """The normalised trajectory (H, Da) of seed 0, and its rounds."""
    policy = parapolicy.load_policy(ROOT / "checkpoints" / name, sampler=sampler, device="cpu", engine="eager")
    chunk = policy.predict(stacked(policy, made_up_steps(name)), seed=0)
    scale, offset = affine(name, "action")
    return chunk.trajectory * scale + offset, int(chunk.stats.rounds)


@pytest.mark.parametrize("name", KEYS)
def test_the_condition_is_what_a_hand_computes(name: str) -> None:
    steps = made_up_steps(name)
    parts = []
    for step in steps:  # oldest first
        for key in KEYS[name]:
            scale, offset = affine(name, key)
            parts.append((step[key] * scale + offset).ravel())
    policy = parapolicy.load_policy(ROOT / "checkpoints" / name, device="cpu", engine="eager")
    condition = received_condition(policy, stacked(policy, steps))
    np.testing.assert_allclose(condition.numpy(), np.concatenate(parts), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", KEYS)
def test_the_chunk_is_the_one_on_file(name: str, sampler: str) -> None:
    """Rounding in another order moves these chunks by 4e-7."""
    expected = json.loads(GOLDEN.read_text())[name][sampler]
    trajectory, rounds = sample(name, sampler)
    np.testing.assert_allclose(trajectory, expected["trajectory"], rtol=0, atol=1e-5)
    assert rounds == expected["rounds"]


def write() -> None:
    chunks = {name: {sampler: sample(name, sampler) for sampler in SAMPLERS} for name in KEYS}
    lines = []
    for name, samplers in chunks.items():
        entries = []
        for sampler, (trajectory, rounds) in samplers.items():
            rows = ",\n      ".join(json.dumps([round(float(value), 7) for value in row]) for row in trajectory)
            entries.append(f'    "{sampler}": {{"rounds": {rounds}, "trajectory": [\n      {rows}]}}')
        lines.append(f'  "{name}": {{\n' + ",\n".join(entries) + "}")
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "}\n")


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    write()
