"""Damaged run folders: what is read from them is refused in a sentence, or is what was written.

Each case damages a small run at random and returns ``refused`` or ``equal``; anything else is an AssertionError.
"""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

import parapolicy
from parapolicy.digest import digest
from parapolicy.evaluate.report.gather import chunk_table, episode_table, gather_latencies, gather_runs
from parapolicy.evaluate.run.evaluation import evaluate
from parapolicy.evaluate.run.records import write_records
from parapolicy.train.state import STATE, TrainingFolder
from tests.helpers import configured, process_folder, small_policy

SEEDS = (3, 4, 5)
LINES = 4  # of episodes.jsonl that an interrupted run has
JUNK: tuple[Any, ...] = (None, True, -1, 1e300, "", "text", [], {}, [None], {"a": 1})


class Drift(gymnasium.Env):
    """Adds up actions, for six control steps."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        self.state, self.steps = np.full(5, float(seed or 0)), 0
        return {"state": self.state.copy()}, {}

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        self.steps += 1
        self.state[:2] += action
        return {"state": self.state.copy()}, float(np.tanh(self.state[0])), False, self.steps == 6, {}


@functools.cache
def base() -> Path:
    """Undamaged runs: ``finished`` and ``half`` of an evaluation, ``training`` of one step, and the policy."""
    place = process_folder()
    torch.manual_seed(0)
    parapolicy.save_policy(small_policy(observation={"state": (5,)}), place / "policy")
    run(place / "finished", place / "policy")
    records = [
        {"env": "pusht", "checkpoint": str(place / "policy"), "sampler": label, "chunk_ms": {"p50": 1.5 + number}}
        for number, label in enumerate(("ddim", "short"))
    ]
    write_records(place / "finished" / "latency.json", records)
    shutil.copytree(place / "finished", place / "half")
    (place / "half" / "results.json").unlink()
    lines = place / "half" / "episodes.jsonl"
    lines.write_text("".join(lines.read_text().splitlines(keepends=True)[:LINES]))
    TrainingFolder(place / "training", {"seed": 0}).save({"step": 3, "network": {"weight": torch.randn(40, 5)}})
    return place


@functools.cache
def config_for(checkpoint: Path) -> Any:
    return configured(
        "eval",
        f"checkpoint={checkpoint}",
        "samplers=[{name: sequential, solver: ddim, steps: 3, label: ddim},"
        "{name: sequential, solver: ddim, steps: 1, label: short}]",
        f"seed={SEEDS[0]}",
        f"episodes={len(SEEDS)}",
        "num_envs=1",
        "latency_chunks=0",
        "videos=0",
        "device=cpu",
        "env.options.max_episode_steps=6",
    )


def run(folder: Path, checkpoint: Path) -> dict[str, Any]:
    """The table of an evaluation, without its times."""
    samplers = evaluate(config_for(checkpoint), folder, lambda spec, clock: Drift())["samplers"]
    table = {label: {key: row[key] for key in row if key != "overall"} for label, row in samplers.items()}
    return dict(json.loads(json.dumps(table)))  # a tuple is a list there


def gather(folder: Path) -> list[Any]:
    """All that a report shows."""
    runs = gather_runs([folder])
    tables = [table.drop(columns="folder", errors="ignore") for table in (episode_table(runs), chunk_table(runs))]
    measured = folder if (folder / "latency.json").is_file() else base() / "finished"  # or it is measured again
    latencies = sorted(map(str, gather_latencies(runs, [measured]).items()))
    return [*(table.to_json() for table in tables), latencies]


def load_training(folder: Path) -> str:
    if not (folder / STATE).is_file():
        folder = base() / "training"  # it begins anew
    return digest(TrainingFolder(folder, {"seed": 0}).load(torch.device("cpu")))


@functools.cache
def expected(read: Callable[..., Any], name: str, *arguments: Any) -> Any:
    return read(base() / name, *arguments)


def damage(rng: np.random.Generator, folder: Path) -> None:
    """Damage one to three files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    contents = [path.read_bytes() for path in files]
    for path in {files[i] for i in rng.integers(len(files), size=rng.integers(1, 4))}:
        content = path.read_bytes()
        match rng.choice(["cut", "flip", "remove", "empty", "extend", "swap", "retype", "zero"]):
            case "cut":
                path.write_bytes(content[: rng.integers(len(content) + 1)])
            case "flip":
                damaged = bytearray(content)
                for place in rng.integers(len(content), size=rng.integers(1, 5)) if content else ():
                    damaged[place] ^= 1 << rng.integers(8)
                path.write_bytes(damaged)
            case "remove":
                path.unlink()
            case "empty":
                path.write_bytes(b"")
            case "extend":
                path.write_bytes(content + rng.bytes(rng.integers(1, 50)))
            case "swap":
                path.write_bytes(contents[rng.integers(len(files))])
            case "retype":
                path.write_bytes(b"\n".join(retype(rng, line) for line in split(path, content)))
            case "zero":
                start = rng.integers(len(content) + 1)
                path.write_bytes(content[:start] + bytes(len(content) - start))


def split(path: Path, content: bytes) -> list[bytes]:
    return content.split(b"\n") if path.suffix == ".jsonl" else [content]


def retype(rng: np.random.Generator, text: bytes) -> bytes:
    """JSON with one value replaced by another, or one key gone."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    node, parent = value, None
    while isinstance(node, dict | list) and node and rng.random() < 0.8:
        key = list(node)[rng.integers(len(node))] if isinstance(node, dict) else int(rng.integers(len(node)))
        parent, node = (node, key), node[key]
    if parent is None:
        return json.dumps(JUNK[rng.integers(len(JUNK))]).encode()
    if rng.random() < 0.3:
        del parent[0][parent[1]]
    else:
        parent[0][parent[1]] = JUNK[rng.integers(len(JUNK))]
    return json.dumps(value).encode()


def outcome(read: Callable[..., Any], name: str, rng: np.random.Generator, place: Path, *arguments: Any) -> str:
    """Read a damaged copy of one of the runs."""
    whole, folder = expected(read, "finished" if name == "half" else name, *arguments), place / name
    shutil.copytree(base() / name, folder)
    damage(rng, folder)
    try:
        found = read(folder, *arguments)
    except ValueError as error:
        if type(error) is not ValueError or len(str(error).split()) < 5:
            raise AssertionError(f"no sentence: {error!r}") from error
        return "refused"
    except Exception as error:
        raise AssertionError(f"{name}: {error!r}") from error
    assert found == whole, f"{name}: another table"
    return "equal"


def resume(rng: np.random.Generator, place: Path) -> str:
    """The interrupted run goes on, and ends with the table of the finished one."""
    return outcome(run, "half", rng, place, base() / "policy")


def rerun(rng: np.random.Generator, place: Path) -> str:
    """The finished run is asked for again."""
    return outcome(run, "finished", rng, place, base() / "policy")


def report(rng: np.random.Generator, place: Path) -> str:
    """The finished run is put into a report."""
    return outcome(gather, "finished", rng, place)


def training(rng: np.random.Generator, place: Path) -> str:
    """The training goes on."""
    return outcome(load_training, "training", rng, place)


CASES: dict[str, Callable[[np.random.Generator, Path], str]] = {
    "resume": resume,
    "rerun": rerun,
    "report": report,
    "training": training,
}
