"""Comparison with what the published code itself answers, from the files beside its checkpoints."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from parapolicy.observation import normalize_observation
from parapolicy.policy import Policy
from tests.conftest import ROOT


def oracle_folder(name: str) -> Path:
    """The folder of one format's checkpoints; skips the test where it is not at hand."""
    data = Path(os.environ.get("PARAPOLICY_DEMONSTRATIONS", ROOT.parent / "shared" / "data"))
    folder = (data if data.is_absolute() else ROOT / data) / "checkpoints" / name
    if not folder.is_dir():
        pytest.skip(f"no checkpoints of other programs at {folder}; set PARAPOLICY_DEMONSTRATIONS to their folder")
    return folder


def assert_answers(policy: Policy, path: Path) -> None:
    """Condition and network calls within 1e-5 of their size, the chunk within 1e-4 of its range.

    Args:
        policy: with the sequential sampler.
        path: an .npz file of what the published code answers; the READMEs beside say what is in it.
    """
    answers = np.load(path)
    observation = {name[4:]: answers[name] for name in answers.files if name.startswith("obs/")}
    with torch.inference_mode():
        inputs, _ = normalize_observation(policy.spec, policy.normalizer, observation)
        condition = policy.network.embed_condition(inputs)
        assert isinstance(condition, torch.Tensor)
        _close(condition.numpy(), answers["global_cond"], 1e-5)
        recorded = torch.from_numpy(answers["global_cond"])
        entry = torch.arange(len(recorded))
        for x, time, expected in zip(answers["net_x"], answers["net_t"], answers["net_out"], strict=True):
            steps = policy.network.embed_steps(torch.full((len(entry),), int(np.ravel(time)[0])))
            output = policy.network(torch.from_numpy(x), steps, recorded, entry, entry)
            _close(output.numpy(), expected, 1e-5)
    assert policy.schedule.timesteps.tolist() == answers["timesteps"].tolist()
    chunk = policy.predict(observation, noise=torch.from_numpy(answers["noise"]))
    trajectory = policy.normalizer.normalize("action", torch.from_numpy(chunk.trajectory))
    np.testing.assert_allclose(trajectory.numpy(), answers["trajectory"], rtol=0, atol=1e-4)
    bound = 1e-4 * np.ptp(answers["actions"])
    np.testing.assert_allclose(chunk.actions, answers["actions"], rtol=0, atol=bound)


def _close(found: np.ndarray, expected: np.ndarray, relative: float) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=relative * np.abs(expected).max())
