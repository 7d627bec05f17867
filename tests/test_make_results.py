"""`make results`: steps run once per code and settings, go on after a failure, and fill their blocks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from parapolicy.engine import ENGINES
from tests.conftest import ROOT
from tools import fill_docs, make_results
from tools.make_results import RECORD, command_of, fill, missing, read_table, run_step, torch_of
from tools.time_calls import STATIC

STEPS, BLOCKS = read_table()
STEP = {
    "run": "echo run >> $OUT/runs; echo out > $OUT/output",
    "quick": "; echo quick >> $OUT/runs",
    "output": "output",
}


def test_the_table_hangs_together() -> None:
    for block in BLOCKS.values():
        assert "file" in block or set(block["from"]) <= STEPS.keys()
        assert callable(make_results.find_table(block["table"]))
    used = {step for block in BLOCKS.values() for step in block.get("from", ())}
    assert {name for name, step in STEPS.items() if name not in used and "figures" not in step} == set()
    for name, step in STEPS.items():
        assert step["quick"] is False or isinstance(step["quick"], str)
        for needed in make_results.USED.findall(step["run"]):
            assert list(STEPS).index(needed) < list(STEPS).index(name)
            assert step.get("timed", True) or not STEPS[needed].get("timed", True)
        for figure in step.get("figures", {}).values():
            assert (ROOT / "docs" / figure).is_file()


def test_the_timed_engines_are_those_that_can_be_had() -> None:
    """``openvino`` is the engine of that name, as ``load_policy`` takes it."""
    named: set[str] = set()
    for step in STEPS.values():
        if "tools.time_calls" in step["run"]:
            named |= set(step["run"].split("--engines ")[1].split(" --")[0].split())
    assert named - {*ENGINES} == {STATIC}
    assert {"openvino", "fused"} <= named


def test_a_step_runs_once_for_its_code_and_settings(tmp_path: Path) -> None:
    def runs() -> str:
        return (tmp_path / "a" / "runs").read_text()

    assert run_step("a", STEP, tmp_path, False, "code") == "done"
    assert run_step("a", STEP, tmp_path, False, "code") == "done before"
    assert runs() == "run\n"
    record = json.loads((tmp_path / "a" / RECORD).read_text())
    assert {"date", "commit", "machine", "versions"} <= record.keys()
    assert run_step("a", STEP, tmp_path, False, "other code") == "done"
    assert runs() == "run\n"  # of other code, so that the folder was emptied
    assert run_step("a", STEP, tmp_path, True, "other code") == "done"
    assert runs() == "run\nquick\n"


def test_an_interrupted_step_keeps_its_folder(tmp_path: Path) -> None:
    broken = {
        **STEP,
        "run": "echo part >> $OUT/runs; test -f $OUT/second || { touch $OUT/second; exit 3; }; touch $OUT/output",
    }
    outcome = run_step("a", broken, tmp_path, False, "code")
    assert outcome.startswith("failed with status 3")
    assert not (tmp_path / "a" / RECORD).exists()
    assert run_step("a", broken, tmp_path, False, "code") == "done"
    assert (tmp_path / "a" / "runs").read_text() == "part\npart\n"


def test_a_step_without_its_output_has_failed(tmp_path: Path) -> None:
    outcome = run_step("a", {**STEP, "run": "echo what went wrong"}, tmp_path, False, "code")
    assert outcome.startswith("failed with status 0: what went wrong")
    begun = run_step(
        "b", {**STEP, "run": f"(echo one; exit 3) | tail -n 1 > $OUT/{STEP['output']}"}, tmp_path, False, ""
    )
    assert begun.startswith("failed with status 3")


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing({"needs": "json"}) is None
    assert missing({"needs": "no_such_module"}) == "no_such_module"
    assert missing({"needs": "bin/python"}, tmp_path) == "bin/python"
    assert missing(STEP) is None
    monkeypatch.delenv("CHECKOUT", raising=False)
    assert missing({"needs": "json $CHECKOUT"}) == "$CHECKOUT"
    monkeypatch.setenv("CHECKOUT", "folder")
    assert missing({"needs": "json $CHECKOUT"}) is None
    assert missing({"needs": "$CHECKOUT no_such_module"}) == "no_such_module"


def test_blocks_are_filled_where_their_steps_are_done(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("<!-- frames -->\nold\n<!-- end -->\n<!-- soak -->\nkept\n<!-- end -->\n")
    results, frames = tmp_path / "results", json.dumps([{"encoder": "e", "two": 4.0, "one": 2.0}])
    step = {"run": f"echo '{frames}' > $OUT/frames.json", "quick": "# --output $OUT/x", "output": "frames.json"}
    assert run_step("frames", step, results, True, "code") == "done"
    blocks = {name: BLOCKS[name] for name in ("frames", "soak")}
    filled, errors = fill(blocks, results, tmp_path / "copies", tmp_path)
    assert (filled, errors) == (["frames"], {})
    assert "old" in page.read_text()
    copy = (tmp_path / "copies" / "README.md").read_text()
    assert "| e | 4.0 ms | 2.0 ms | 2.0× |" in copy
    assert "A quick run" in copy
    assert "--output" not in copy  # of no interest to a reader
    assert "kept" in copy
    (results / "frames" / "frames.json").write_text("[{}]")
    assert fill(blocks, results, None, tmp_path) == ([], {"frames": "KeyError: 'encoder'"})


def test_a_failing_step_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = {"bad": {**STEP, "run": "exit 5"}, "absent": {**STEP, "needs": "no_such_module"}, "good": STEP}
    monkeypatch.setattr(make_results, "read_table", lambda: (steps, {}))
    monkeypatch.setattr(sys, "argv", ["make_results", "--output", str(tmp_path), "--quick"])
    with pytest.raises(SystemExit) as ended:
        make_results.main()
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert "error: bad: failed with status 5" in printed.err
    assert "absent: left out, no_such_module is missing" in printed.out
    assert "[2/2] good: done" in printed.out
    assert (tmp_path / "good" / RECORD).is_file()
    monkeypatch.setattr(sys, "argv", ["make_results", "--only", "unknown"])
    with pytest.raises(SystemExit, match="--only has unknown, expected some of bad, absent, good"):
        make_results.main()


def test_untimed_steps_run_together_and_timed_ones_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    meets = "touch $OUT/here; for i in {1..300}; do test -e $RESULTS/%s/here && break; sleep 0.1; done; test $i != 300"
    alone = "ls $RESULTS/*/busy && exit 1; touch $OUT/busy; sleep 0.2; rm $OUT/busy; touch $OUT/output"
    untimed = {**STEP, "timed": False}
    steps = {
        "first": {**STEP, "run": alone},
        "second": {**STEP, "run": alone},
        "a": {**untimed, "run": f"touch $OUT/busy; {meets % '[b]'}; sleep 0.2; rm $OUT/busy; touch $OUT/output"},
        "b": {**untimed, "run": f"{meets % '[a]'}; touch $OUT/output"},
        "after": {**untimed, "run": "test -e $RESULTS/a/output && echo $OMP_NUM_THREADS > $OUT/output"},
    }
    assert make_results.run_steps(steps, tmp_path, False) == {}
    assert (tmp_path / "after" / "output").read_text() == "1\n"
    assert ", 1 thread, " in make_results.caption([tmp_path / "after"])
    steps["after"] = {**untimed, "run": "test -e $RESULTS/none/output"}
    assert make_results.run_steps(steps, tmp_path, False).keys() == {"after"}


def test_the_digest_is_of_the_code_that_measures(tmp_path: Path) -> None:
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / "parapolicy").mkdir()
    empty = make_results.code_digest(tmp_path)
    (tmp_path / "README.md").write_text("prose")
    assert make_results.code_digest(tmp_path) == empty
    (tmp_path / "parapolicy" / "policy.py").write_text("a = 1")
    changed = make_results.code_digest(tmp_path)
    assert changed != empty
    (tmp_path / "parapolicy" / "policy.py").write_text("a = 2")
    assert make_results.code_digest(tmp_path) != changed


def test_a_caption_names_command_machine_and_commit(tmp_path: Path) -> None:
    command = f"{STEP['run']} # x --output $OUT output=$OUT/a.json"
    assert run_step("a", {**STEP, "run": command}, tmp_path, False, "code") == "done"
    caption = make_results.caption([tmp_path / "a"])
    assert "torch" in caption
    assert "commit" in caption
    assert caption.endswith("# x`")
    assert run_step("b", {**STEP, "run": f"{STEP['run']} # --threads 7"}, tmp_path, False, "code") == "done"
    assert ", 7 threads, " in make_results.caption([tmp_path / "b"])
    assert command_of(STEP, True).endswith("quick >> $OUT/runs")
    assert fill_docs.block_names(f"<!-- a -->\n{caption}\n<!-- end -->") == ["a"]


def test_another_environment_s_torch_is_named(tmp_path: Path) -> None:
    python = tmp_path / ".venv-other" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho 2.10.0\n")
    python.chmod(0o755)
    assert torch_of("PYTHONPATH=x .venv-other/bin/python run.py", tmp_path) == {"torch": "2.10.0"}
    assert torch_of("python run.py", tmp_path) == torch_of(".venv-none/bin/python run.py", tmp_path) == {}
