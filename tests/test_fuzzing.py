"""A short slice of ``make fuzz`` with a fixed seed, and the runner itself."""

from pathlib import Path

import numpy as np
import pytest

from tests.fuzzing import Case, Finding, find_cases, run_case, try_case
from tests.fuzzing.__main__ import main

SLICE = 5  # tries per case


@pytest.mark.parametrize("name", find_cases())
def test_hostile_input_is_refused_by_name_or_taken_rightly(name: str) -> None:
    outcomes = [try_case(name, find_cases()[name], seed=0, number=number) for number in range(SLICE)]
    findings = [str(outcome) for outcome in outcomes if isinstance(outcome, Finding)]
    assert not findings, "\n".join(findings)


def sometimes(rng: np.random.Generator, folder: Path) -> str:
    """A third refused, a third equal, a third broken in one way or the other."""
    assert not list(folder.iterdir())
    (folder / "left").touch()
    match int(rng.integers(6)):
        case 0 | 1:
            return "refused"
        case 2 | 3:
            return "equal"
        case 4:
            return "fine"
    raise SystemExit("gone")


def test_what_is_found_can_be_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    cases: dict[str, Case] = {"toy.sometimes": sometimes, "toy.never": lambda rng, folder: "equal"}
    assert main(["--seconds", "0", "--seed", "3", "--case", "toy.never"], cases) == 0
    found = [try_case("toy.sometimes", sometimes, 3, number) for number in range(60)]
    assert {outcome for outcome in found if isinstance(outcome, str)} == {"refused", "equal"}
    findings = [outcome for outcome in found if isinstance(outcome, Finding)]
    assert {finding.what for finding in findings} == {"returned 'fine'", "SystemExit: gone"}
    for finding in findings:
        assert try_case(finding.case, sometimes, finding.seed, finding.number) == finding
    gone = next(finding for finding in findings if "gone" in finding.what)
    with pytest.raises(SystemExit, match="gone"):
        main(["--seed", "3", "--case", gone.case, "--number", str(gone.number)], cases)
    capsys.readouterr()


def test_a_finding_is_shown_and_ends_with_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(rng: np.random.Generator, folder: Path) -> str:
        raise OSError("lost")

    assert main(["--seconds", "0"], {"toy.broken": broken, "toy.fine": lambda rng, folder: "refused"}) == 1
    printed = capsys.readouterr().out
    seeds = printed.splitlines()[0].removeprefix("seeds ").split(", ")
    assert seeds[0] == "0"
    assert seeds[1] != "0"
    assert [line.split() for line in printed.splitlines()[2:5]] == [
        ["toy.broken", "2", "0", "0", "2"],
        ["toy.fine", "2", "2", "0", "0"],
        ["all", "4", "2", "0", "2"],
    ]
    for seed in seeds:
        assert f"repeat it: python -m tests.fuzzing --seed {seed} --case toy.broken --number 0" in printed


def test_an_interruption_ends_with_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(rng: np.random.Generator, folder: Path) -> str:
        raise KeyboardInterrupt

    assert main([], {"toy.fine": lambda rng, folder: "equal", "toy.stop": interrupted}) == 0
    assert "toy.fine" in capsys.readouterr().out


def test_the_same_number_gives_the_same_input() -> None:
    def draw(name: str, seed: int, number: int) -> str:
        return run_case(name, lambda rng, folder: str(rng.random()), seed, number)

    assert draw("a", 1, 2) == draw("a", 1, 2)
    assert len({draw("a", 1, 2), draw("b", 1, 2), draw("a", 2, 2), draw("a", 1, 3)}) == 4
