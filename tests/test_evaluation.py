"""Closed-loop episodes, their statistics, and the two commands as a user runs them."""

import io
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hydra.errors import HydraException
from rich.console import Console

import parapolicy
import train
from envs import make_env
from parapolicy.evaluate.measure.statistics import mean_interval, proportion_interval
from parapolicy.evaluate.measure.timing import count_evaluations, measure_chunks
from parapolicy.evaluate.measure.upstream import upstream_chunk
from parapolicy.evaluate.report.terminal import print_tables
from parapolicy.evaluate.run.evaluation import evaluate
from parapolicy.evaluate.run.results import compare_to_baseline, summarize_chunks, summarize_episodes
from parapolicy.evaluate.run.rollout import EpisodeRecord, rollout
from parapolicy.evaluate.run.variants import build_variants, find_baseline
from parapolicy.spec import Feature
from tests.conftest import PATIENCE, ROOT
from tests.helpers import configured, small_policy, some_observation


def run(script: str, *overrides: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / script), *overrides]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=PATIENCE)


def test_episodes_do_not_depend_on_the_number_of_environments(shipped: parapolicy.Policy) -> None:
    """Four seeds one at a time, three at a time and all at once: the same rewards and rounds."""
    policy = shipped.with_sampler("semi_implicit")
    outcomes = []
    for num_envs in (1, 3, 4):
        episodes = rollout(
            policy, lambda: make_env("pusht", policy.spec, max_episode_steps=24), range(100_000, 100_004), 0, num_envs
        )
        outcomes.append({episode.seed: episode for episode in episodes})
    for other in outcomes[1:]:
        assert other.keys() == outcomes[0].keys()
        for seed, episode in other.items():
            # To the bit where a padded network call is reproducible; elsewhere roundings may differ a little.
            np.testing.assert_allclose(episode.rewards, outcomes[0][seed].rewards, rtol=1e-4)
            np.testing.assert_allclose(episode.rounds, outcomes[0][seed].rounds, atol=1)


def test_rollout_executes_chunks_and_reports_progress(shipped: parapolicy.Policy) -> None:
    steps: list[int] = []
    (episode,) = rollout(
        shipped.with_sampler("semi_implicit"),
        lambda: make_env("pusht", shipped.spec, max_episode_steps=20, render_size=96),
        [100_001],
        record=[100_001],
        progress=steps.append,
    )
    assert steps == [8, 8, 4]
    assert (len(episode.rewards), len(episode.rounds), len(episode.observations)) == (20, 3, 3)
    assert len(episode.frames) == 21
    assert episode.max_reward == max(episode.rewards)


def test_another_noise_seed_is_another_episode(shipped: parapolicy.Policy) -> None:
    policy = shipped.with_schedule("ddim", 5)
    rewards = []
    for noise_seed in (0, 0, 1):
        (episode,) = rollout(
            policy, lambda: make_env("pusht", policy.spec, max_episode_steps=40), [100_002], noise_seed
        )
        rewards.append([float(step["agent_pos"][-1, 0]) for step in episode.observations])
    assert rewards[0] == rewards[1] != rewards[2]


def test_chunks_are_measured_against_sequential_with_the_same_noise() -> None:
    policy = small_policy()
    variants = build_variants(
        policy,
        [
            "sequential",
            {"name": "semi_implicit", "tolerance": 0.0, "label": "exact"},
            {"name": "paradigms", "tolerance": 100.0, "window": 20, "label": "loose"},
            {"name": "semi_implicit", "solver": "ddim", "steps": 5, "tolerance": 0.0, "label": "short"},
        ],
    )
    observations = [some_observation(policy.spec, seed=i) for i in range(3)]
    policies = {label: variant.policy for label, variant in variants.items()}
    measured = measure_chunks(policies, observations)
    assert {label: len(row.seconds) for label, row in measured.items()} == dict.fromkeys(variants, 3)
    assert max(measured["sequential"].errors) == 0
    assert max(measured["exact"].errors + measured["short"].errors) < 1e-5
    assert min(measured["loose"].errors) > 1e-4
    assert find_baseline(policies) == "sequential"
    assert len(policies["short"].schedule) == 5
    summary = summarize_chunks(measured["loose"], policies["loose"])["chunk_error"]
    assert len(summary["each"]) == 3
    assert "asked" not in summary  # its tolerance is of the steps' noise
    loose = policies["loose"].with_sampler("secant", tolerance=0.3)
    assert summarize_chunks(measured["loose"], loose)["chunk_error"]["asked"] == 0.3


@pytest.mark.parametrize(("solver", "steps"), [("ddpm", 20), ("ddpm", 8), ("ddim", 10)])
def test_upstream_s_way_gives_the_sequential_chunk_and_is_timed_beside_it(solver: str, steps: int) -> None:
    policy = small_policy().with_schedule(solver, steps).with_sampler("sequential")
    observation = some_observation(policy.spec, seed=0)
    generator = torch.Generator().manual_seed(7)  # as diffusers draws it, one step after the other
    shape = (1, policy.spec.horizon, policy.spec.action_dim)
    noise = torch.stack([torch.randn(shape, generator=generator) for _ in range(steps + 1)])
    expected = policy.predict(observation, noise=noise).trajectory
    np.testing.assert_allclose(upstream_chunk(policy, observation, 7), expected, rtol=0, atol=1e-3)
    measured = measure_chunks({"ours": policy}, [observation] * 3, upstream={"upstream": policy})
    assert len(measured["upstream"].seconds) == len(measured["ours"].seconds) == 3
    assert measured["upstream"].errors == []
    assert "chunk_error" not in summarize_chunks(measured["upstream"], None)


def test_upstream_s_way_names_a_schedule_that_diffusers_cannot_take() -> None:
    policy = small_policy().with_schedule("ddim", 8)
    with pytest.raises(ValueError, match="DDIMScheduler with 8 steps begins at timestep 14, this schedule at 19"):
        upstream_chunk(policy, some_observation(policy.spec, seed=0), 7)


def test_evaluations_are_counted_by_diffusion_step() -> None:
    policy = small_policy()
    observations = [some_observation(policy.spec, seed=i) for i in range(2)]
    timesteps, counts = count_evaluations(policy.with_sampler("sequential"), observations)
    assert timesteps == list(range(19, -1, -1))
    assert counts == [1.0] * 20
    parallel = policy.with_sampler("paradigms", window=8)
    _, counts = count_evaluations(parallel, observations)
    spent = [parallel.predict(observation, seed=i).stats.evaluations for i, observation in enumerate(observations)]
    assert min(counts) >= 1
    assert sum(counts) == pytest.approx(np.mean(spent))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "samplers is empty"),
        (["sequential", "sequential"], "label is 'sequential'"),
        (["fast"], "sampler is 'fast'"),
        ([{"name": "paradigms", "tol": 1}], r"no parameters \['tol'\]"),
        ([{"window": 3}], "has no name"),
        ([{"name": "sequential", "control": "fast"}], "control is 'fast', expected sync or async"),
        ([{"name": "sequential", "latency": "80"}], "latency is '80'"),
        ([{"name": "sequential", "label": "../x"}], "label is '../x'"),
    ],
)
def test_bad_sampler_lists_are_named(entries: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_variants(small_policy(), entries)


def test_intervals_cover() -> None:
    """95 % intervals of the mean hold the truth in about 95 % of 300 repetitions, for skewed rewards too."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        low, high = mean_interval(rng.beta(4, 1, 30))
        hits += low <= 0.8 <= high
    assert 0.90 <= hits / 300 <= 0.99
    assert mean_interval([0.5, 0.5]) == (0.5, 0.5)
    low, high = proportion_interval(0, 20)
    assert (low, round(high, 3)) == (0.0, 0.161)


def test_summaries_pair_by_seed() -> None:
    def row(rewards: dict[int, float], p50: float) -> dict[str, Any]:
        episodes = [
            EpisodeRecord(seed, [0.0, reward], reward >= 1, rounds=[3, 5], evaluations=[30, 50])
            for seed, reward in rewards.items()
        ]
        return summarize_episodes(episodes, 2.0, ["a.mp4"]) | {"chunk_ms": {"p50": p50}}

    ours, theirs = row({2: 0.5, 1: 1.0}, 10.0), row({1: 0.9, 2: 0.7}, 50.0)
    result = compare_to_baseline(ours, theirs, "sequential")
    assert result["paired_reward_difference"]["mean"] == pytest.approx(-0.05)
    assert result["speedup_p50"] == 5.0
    assert ours["mean_max_reward"] == ours["test/mean_score"] == ours["overall"]["avg_max_reward"] == 0.75
    assert ours["overall"]["pc_success"] == 50.0
    assert ours["test/sim_max_reward_2"] == 0.5
    assert [episode["seed"] for episode in ours["per_episode"]] == [1, 2]
    assert ours["rounds"]["mean"] == 4.0


def test_eval_command(tmp_path: Path) -> None:
    done = run(
        "eval.py",
        "episodes=2",
        "samplers=[sequential,{name: semi_implicit, window: 10}]",
        "env.options.max_episode_steps=16",
        "latency_chunks=2",
        "videos=[100000]",
        "fidelity.measure=true",
        "fidelity.observations=1",
        "fidelity.draws=4",
        f"hydra.run.dir={tmp_path}",
    )
    assert done.returncode == 0, done.stderr
    for text in ("semi_implicit", "mean max reward", "speed-", "No sampler is shown to keep", str(tmp_path)):
        assert text in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    narrow = Console(width=80, file=io.StringIO())
    long = dict(zip(("sequential", "semi_implicit_window_10_and_more"), results["samplers"].values(), strict=True))
    print_tables({**results, "samplers": long}, narrow)
    text = narrow.file.getvalue()
    assert "…" not in text
    encode = [row["chunk_ms"]["encode_p50"] for row in results["samplers"].values()]
    assert 0 < min(encode) < results["samplers"]["sequential"]["chunk_ms"]["p50"]
    assert f"{min(encode):.1f} to {max(encode):.1f} ms" in " ".join(text.split())
    low, high = results["samplers"]["semi_implicit"]["mean_max_reward_ci95"]
    assert f"[{low:.3f}, {high:.3f}]" in text
    assert results["seeds"] == [100_000, 100_001]
    assert {"machine", "versions", "env", "checkpoint", "test/mean_score"} <= results.keys()
    row = results["samplers"]["semi_implicit"]
    schema = """mean_max_reward mean_max_reward_ci95 success_rate success_rate_ci95 paired_reward_difference chunk_ms
        speedup_p50 rounds evaluations chunk_error overall per_episode test/mean_score test/sim_max_reward_100001"""
    assert set(schema.split()) <= row.keys()
    assert row["rounds"]["mean"] < 100
    assert row["chunk_error"]["max"] < 0.5
    for name in ("energy_distance", "paired_energy_distance"):
        assert row[name]["observations"] == 1
        assert row[name]["ci95"][0] <= row[name]["mean"] <= row[name]["ci95"][1]
    assert row["paired_energy_distance"]["spread"] > 0
    assert "energy distance" in done.stdout
    assert results["samplers"]["sequential"]["rounds"] == {"mean": 100.0, "p95": 100.0}
    lines = [json.loads(line) for line in (tmp_path / "episodes.jsonl").read_text().splitlines()]
    assert {(line["sampler"], line["seed"]) for line in lines} == {
        (sampler, seed) for sampler in results["samplers"] for seed in (100_000, 100_001)
    }
    assert (tmp_path / "latency_reward.png").read_bytes()[:4] == b"\x89PNG"
    video = tmp_path / "videos" / "semi_implicit_100000.mp4"
    assert row["overall"]["video_paths"] == [str(video)]
    assert video.read_bytes()[4:8] == b"ftyp"


def test_a_replaced_checkpoint_does_not_go_on_in_the_same_folder(tmp_path: Path) -> None:
    parapolicy.save_policy(small_policy(observation={"state": (5,)}), tmp_path / "policy")
    ddim = "samplers=[{name: sequential, solver: ddim, steps: 2}]"
    config = configured("eval", f"checkpoint={tmp_path / 'policy'}", ddim, "episodes=1", "videos=0", "latency_chunks=0")

    def once() -> float:
        env = partial(make_env, "pusht", max_episode_steps=4)
        return evaluate(config, tmp_path / "run", lambda spec, clock: env(spec))["test/mean_score"]

    assert once() == once()
    parapolicy.save_policy(small_policy(observation={"state": (5,)}), tmp_path / "policy")  # other random weights
    with pytest.raises(ValueError, match="has a run of another checkpoint"):
        once()


def test_without_ffmpeg_there_are_no_videos_and_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nonexistent")
    parapolicy.save_policy(small_policy(observation={"state": (5,)}), tmp_path / "policy")
    ddim = "samplers=[{name: sequential, solver: ddim, steps: 2}]"
    config = configured("eval", f"checkpoint={tmp_path / 'policy'}", ddim, "episodes=2", "videos=2", "latency_chunks=0")
    results = evaluate(config, tmp_path / "run", lambda spec, clock: make_env("pusht", spec, max_episode_steps=4))
    (row,) = results["samplers"].values()
    assert (row["overall"]["n_episodes"], row["overall"]["video_paths"]) == (2, [])
    assert capsys.readouterr().out.count("videos cannot be written, the run continues without") == 1
    assert not list((tmp_path / "run" / "videos").iterdir())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("episode=3", "episode"),
        ("env=pushx", "Could not find 'env/pushx'"),
        ("checkpoint=nowhere", "no checkpoint at 'nowhere'"),
        ("samplers=[fast]", "sampler is 'fast', expected one of"),
        ("control=slow", "control is 'slow', expected sync or async"),
        ("env.latency=80ms", "latency is '80ms', expected none, measured, fixed:80ms or trace:FILE"),
        ("watch=tv", "watch is 'tv', expected web"),
        ("device=cuda:99", "device 'cuda:99' is not available"),
        ("engine=fast", "engine is 'fast', expected one of"),
        ("episodes=0", "episodes is 0"),
        ("num_envs=0", "num_envs is 0"),
        ("env_timeout_s=0", "env_timeout_s is 0"),
    ],
)
def test_eval_errors_name_the_value(
    override: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises((ValueError, HydraException), match=message):
        evaluate(configured("eval", override), tmp_path, lambda spec, clock: make_env("pusht", spec))


def test_an_error_is_one_line_of_the_command(tmp_path: Path) -> None:
    done = run("eval.py", "samplers=[fast]", f"hydra.run.dir={tmp_path}")
    assert done.returncode != 0
    assert done.stderr.startswith("error: sampler is 'fast', expected one of")
    assert "Traceback" not in done.stderr


def made_up_buffer(folder: Path) -> Path:
    path = folder / "replay.zarr"
    root = zarr.open_group(str(path), mode="w")
    rng = np.random.default_rng(0)
    for name, width in {"state": 5, "action": 2}.items():
        root[f"data/{name}"] = rng.uniform(50, 450, (60, width)).astype(np.float32)
    root["meta/episode_ends"] = np.array([30, 60])
    return path


def test_train_command_then_eval(tmp_path: Path) -> None:
    """Train on a made-up replay buffer, score in closed loop, write the card, load what was written; and again."""
    made_up_buffer(tmp_path)
    small = ["train.steps=4", "train.batch_size=8", "train.compile=false", "policy.network.down_dims=[16,32]"]
    overrides = [
        "data=pusht_state",
        f"data.path={tmp_path / 'replay.zarr'}",
        f"output={tmp_path / 'policy'}",
        "score.episodes=2",
        "score.options.max_episode_steps=8",
        *small,
    ]
    command = ["train.py", *overrides, f"hydra.run.dir={tmp_path / 'run'}"]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    policy = parapolicy.load_policy(tmp_path / "policy", engine="eager")
    assert dict(policy.spec.observation) == {"state": Feature((5,), "state")}
    card = (tmp_path / "policy" / "README.md").read_text()
    for text in ("data=pusht_state", "over 2 episodes, seeds from 100000", "steps 4", "seed 0"):
        assert text in card
    assert str(tmp_path / "replay.zarr") not in card
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "policy").iterdir()}
    again = run(*command)
    assert (again.returncode, again.stdout) == (0, f"{tmp_path / 'policy'} is finished\n")
    with pytest.raises(ValueError, match=r"finished policy of a run with other settings \(seed\)"):
        train.run(configured("train", *overrides, "train.seed=1"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "policy").iterdir()} == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path=BUFFER", "+data.maks=train"], r"data has unknown settings \['maks'\]"),
        (["data.path=BUFFER", "+data.mask=train"], "data.mask is 'train', but only HDF5 files have masks"),
        (["data.path=BUFFER", "+data.action.column=[0]"], r"unknown keys \['column'\]"),
        (["data.path=BUFFER", "data.action.shape=[2,1]"], r"data.action.shape is \[2, 1\]"),
        (["data.path=BUFFER", "data.action.shape=[3]"], r"data/action has the shape \(2,\) per step, .* \(3,\)"),
        (["data.path=BUFFER", "data.env=maze"], "env is 'maze', expected one of"),
        (["data.path=BUFFER", "+score.options.color=red"], r"env pusht does not have the options .*'color'"),
        (["data.path=BUFFER", "score.options.max_episode_steps=0"], "max_episode_steps is 0"),
        (["data.path=BUFFER", "score.episodes=-1"], "score.episodes is -1"),
        (["data.path=nowhere", "device=cpu"], "no data set at 'nowhere'"),
        (["train.steps=4"], "data.path is not set"),
        (["train.stepz=4"], "stepz"),
    ],
)
def test_train_errors_name_the_value(overrides: list[str], message: str, tmp_path: Path) -> None:
    """Before any training: nothing is written."""
    overrides = [word.replace("BUFFER", str(made_up_buffer(tmp_path))) for word in overrides]
    overrides = ["data=pusht_state", f"output={tmp_path / 'policy'}", *overrides]
    with pytest.raises((ValueError, HydraException), match=message):
        train.run(configured("train", *overrides))
    assert not (tmp_path / "policy").exists()


@pytest.mark.parametrize("env", ["pusht", "pusht_image", "lift"])
def test_an_environments_shipped_policy_is_what_is_evaluated(env: str) -> None:
    folder = ROOT / configured("eval", f"env={env}").checkpoint
    assert parapolicy.load_policy(folder, device="cpu", engine="eager").spec.control_hz == {"lift": 20}.get(env, 10)
