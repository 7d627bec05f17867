"""Run the measurements behind README and docs on this machine, and fill their tables.

    python -m tools.make_results [--quick] [--only STEP…] [--output outputs/results] [--fill]

The steps and the blocks that they fill are in ``make_results.yaml``. A step with output from this code and these
settings is not run again, and an interrupted step continues. A step that fails is named, the others continue, and the
command ends with status 1. A full run fills README.md and docs/*.md. A quick run has few episodes and chunks, and
writes its pages to its own folder. ``--fill`` runs nothing.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml

from parapolicy.evaluate.measure.machine import describe_git, describe_machine, describe_versions
from tools import fill_docs, fill_speed, fill_tasks

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_suffix(".yaml")
TOOLS = ("time_calls", "time_frames", "lerobot_table", "measure_rounding", "observation_history")  # that measure
LIVE = ("tests/stanford_live.py", "tests/robomimic_live.py", "tests/camera_load.py")
CODE = (
    *("parapolicy", "envs", "conf", "checkpoints", "examples", "eval.py"),
    *(f"tools/{name}.py" for name in TOOLS),
    *LIVE,
    ":!*.md",
)
THREADS = re.compile(r"(?:OMP_NUM_THREADS=|threads[= ])(\d+)")  # in a command
RECORD = "step.json"  # of a finished step, in its folder
USED = re.compile(r"\$RESULTS/(\w+)")  # the steps whose output a command reads
PLACES = re.compile(r" (?:> |--output |output=|hydra\.(?:run|sweep)\.dir=)\$(?:OUT|RESULTS)\S*")  # removed in captions

Step = Mapping[str, Any]


def read_table(path: Path = TABLE) -> tuple[dict[str, Step], dict[str, Mapping[str, Any]]]:
    """The steps and the blocks, by name."""
    content = yaml.safe_load(path.read_text())
    return content["steps"], content["blocks"]


def pages(root: Path = ROOT) -> list[Path]:
    """The files that have blocks."""
    return [root / "README.md", *sorted(root.glob("docs/*.md"))]


def code_digest(root: Path = ROOT) -> str:
    """A digest of all files that results depend on, in their present state, committed or not."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *CODE],
        cwd=root,
        capture_output=True,
        check=True,
    ).stdout.split(b"\0")
    total = hashlib.sha256()
    for name in sorted({name for name in names if name}):
        path = root / os.fsdecode(name)
        total.update(name + b"\0" + hashlib.sha256(path.read_bytes() if path.is_file() else b"").digest())
    return total.hexdigest()


def command_of(step: Step, quick: bool) -> str:
    """The step's shell command."""
    return f"{step['run']} {step['quick']}" if quick else str(step["run"])


def missing(step: Step, root: Path = ROOT) -> str | None:
    """The first module, file or variable (``$NAME``) that the step needs but that is missing."""
    for need in str(step.get("needs", "")).split():
        if need.startswith("$"):
            found = bool(os.environ.get(need[1:]))
        else:
            found = (root / need).exists() if "/" in need else importlib.util.find_spec(need) is not None
        if not found:
            return need
    return None


def run_step(name: str, step: Step, results: Path, quick: bool, digest: str, root: Path = ROOT) -> str:
    """Run one step, unless it is done.

    Returns:
        ``done``, ``done before``, or why there is no output.
    """
    folder, command = results / name, command_of(step, quick)
    key = {"command": command, "code": digest}
    started = folder / "started.json"
    if (folder / step["output"]).is_file() and _matches(folder / RECORD, key):
        return "done before"
    if folder.is_dir() and not _matches(started, key):  # from other code or settings
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    started.write_text(json.dumps(key))
    (folder / RECORD).unlink(missing_ok=True)
    begin = time.time()
    paths = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(root)}
    threads = {} if step.get("timed", True) else {"OMP_NUM_THREADS": "1"}
    with (folder / "log.txt").open("a") as log:
        code = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            cwd=root,
            env={**os.environ, **paths, **threads, "OUT": str(folder), "RESULTS": str(results)},
            stdout=log,
            stderr=subprocess.STDOUT,
        ).returncode
    if code != 0 or not (folder / step["output"]).is_file():
        last = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-1:]
        return f"failed with status {code}: {last[0] if last else ''}; see {folder / 'log.txt'}"
    git = describe_git(root) or {}
    machine = describe_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if threads:
        machine["threads"] = 1
    elif found := THREADS.search(command):
        machine["threads"] = int(found[1])
    record = {
        **key,
        "quick": quick,
        "date": time.strftime("%Y-%m-%d", time.gmtime(begin)),
        "seconds": time.time() - begin,
        "commit": git.get("commit"),
        "changed": git.get("changed"),
        "machine": machine,
        "versions": describe_versions() | torch_of(command, root),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return "done"


def run_steps(chosen: Mapping[str, Step], results: Path, quick: bool) -> dict[str, str]:
    """Run the steps: first those that time nothing, as many at once as there are cores; then the others, each alone.

    Returns:
        Step -> how it failed.
    """
    digest, outcomes, failed = code_digest(), dict[str, Future[str]](), dict[str, str]()
    ended, runnable = list[str](), dict[str, Step]()

    def run(name: str, step: Step) -> str:
        for needed in USED.findall(step["run"]):
            if needed in outcomes:
                outcomes[needed].result()
        print(f"{name} …", flush=True)
        begin = time.perf_counter()
        outcome = run_step(name, step, results, quick, digest)
        if not outcome.startswith("done"):
            failed[name] = outcome
        ended.append(name)
        print(f"[{len(ended)}/{len(runnable)}] {name}: {outcome}, {time.perf_counter() - begin:.0f} s", flush=True)
        return outcome

    for name, step in chosen.items():
        if quick and step["quick"] is False:
            print(f"{name}: left out of a quick run")
        elif (need := missing(step)) is not None:
            print(f"{name}: left out, {need} is missing")
        else:
            runnable[name] = step
    for timed, workers in ((False, os.cpu_count()), (True, 1)):
        with ThreadPoolExecutor(workers) as executor:
            for name, step in runnable.items():
                if step.get("timed", True) is timed:
                    outcomes[name] = executor.submit(run, name, step)
            try:
                for outcome in outcomes.values():
                    outcome.result()
            except BaseException:
                executor.shutdown(cancel_futures=True)
                raise
    return failed


def torch_of(command: str, root: Path = ROOT) -> dict[str, str]:
    """The version of torch in the other environment, such as LeRobot's, whose Python a command runs."""
    found = re.search(r"\.venv-\w+/bin/", command)
    if found is None or not (python := root / found[0] / "python").is_file():
        return {}
    version = "from importlib.metadata import version; print(version('torch'))"
    return {"torch": subprocess.run([python, "-c", version], capture_output=True, text=True).stdout.strip()}


def _matches(path: Path, key: Mapping[str, str]) -> bool:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return all(found.get(name) == value for name, value in key.items())


def caption(folders: Sequence[Path]) -> str:
    """Commands, machine, date and commit of a block's steps."""
    records = [json.loads((folder / RECORD).read_text()) for folder in folders]
    commands = dict.fromkeys(f"`{PLACES.sub('', ' '.join(record['command'].split()))}`" for record in records)
    facts = dict.fromkeys(
        f"{record['machine']['cpu']}, {_threads(record['machine']['threads'])}, {record['machine']['device']}, torch "
        f"{record['versions']['torch']}, {record['date']}, commit {(record['commit'] or 'unknown')[:10]}"
        + (" with changes" if record["changed"] else "")
        for record in records
    )
    quick = "A quick run: few episodes and chunks. " if any(record["quick"] for record in records) else ""
    return f"{quick}{'; '.join(facts)}: {', '.join(commands)}"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def fill(
    blocks: Mapping[str, Mapping[str, Any]], results: Path, target: Path | None, root: Path = ROOT
) -> tuple[list[str], dict[str, str]]:
    """Fill the blocks whose steps are all done.

    Args:
        target: folder for filled copies of the pages; None: the pages themselves.

    Returns:
        Names of the blocks that were filled, and block -> error of those whose tables could not be made.
    """
    texts: dict[str, str] = {}
    errors: dict[str, str] = {}
    for name, block in blocks.items():
        measured = root / block.get("file", "")  # a file outside of the step's folder; its table has its own caption
        folders = [measured.parent] if "file" in block else [results / step for step in block["from"]]
        if not all(path.is_file() for path in ([measured] if "file" in block else [f / RECORD for f in folders])):
            continue
        try:
            texts[name] = find_table(block["table"])(folders)
            texts[name] += "" if "file" in block else f"\n\n{caption(folders)}"
        except (ValueError, KeyError, IndexError, OSError) as error:
            errors[name] = f"{type(error).__name__}: {error}"
    for page in pages(root):
        text = page.read_text()
        path = page if target is None else target / page.relative_to(root)
        if set(fill_docs.block_names(text)) & texts.keys():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(fill_docs.fill_page(text, texts))
    return list(texts), errors


def find_table(name: str) -> Callable[[Sequence[Path]], str]:
    """A block's function, from :mod:`tools.fill_docs`, :mod:`tools.fill_tasks` or :mod:`tools.fill_speed`."""
    found: Callable[[Sequence[Path]], str] = (vars(fill_docs) | vars(fill_tasks) | vars(fill_speed))[name]
    return found


def copy_figures(steps: Mapping[str, Step], results: Path, docs: Path) -> None:
    """Copy the figures of finished steps into the folder of the pages."""
    for name, step in steps.items():
        if (results / name / RECORD).is_file():
            for source, figure in step.get("figures", {}).items():
                docs.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(results / name / source, docs / figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few episodes and chunks")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="run only these steps")
    parser.add_argument("--output", type=Path, help="outputs/results, or outputs/results_quick")
    parser.add_argument("--fill", action="store_true", help="fill the blocks from existing output, and run nothing")
    given = parser.parse_args()
    steps, blocks = read_table()
    if unknown := sorted(set(given.only or ()) - steps.keys()):
        raise SystemExit(f"error: --only has {', '.join(unknown)}, expected some of {', '.join(steps)}")
    results = (given.output or ROOT / f"outputs/results{'_quick' if given.quick else ''}").resolve()
    chosen = {} if given.fill else {name: steps[name] for name in given.only or steps}
    try:
        failed = run_steps(chosen, results, given.quick)
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        raise SystemExit(130) from None
    target = results / "pages" if given.quick else None
    filled, errors = fill(blocks, results, target)
    copy_figures(steps, results, (ROOT if target is None else target) / "docs")
    print(f"filled {len(filled)} of {len(blocks)} blocks in {target or 'README.md and docs'}: {', '.join(filled)}")
    for name, error in (failed | errors).items():
        print(f"error: {name}: {error}", file=sys.stderr)
    if failed or errors:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
