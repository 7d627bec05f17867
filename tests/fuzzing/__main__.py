"""Try all cases in turn until the time is up, with a fixed seed and then with a random one.

    python -m tests.fuzzing [--seconds 60] [--seed N] [--case NAME]
    python -m tests.fuzzing --seed N --case NAME --number K      one try again, with its traceback

Ends with a table, also when interrupted, and with exit code 1 where anything was found.
"""

import argparse
import itertools
import secrets
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from tqdm import tqdm

from tests.fuzzing import Case, Finding, find_cases, run_case, try_case

FIXED_SEED = 0
SHOWN = 3  # findings per case


class Tally:
    """What came of all tries."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.findings: dict[str, list[Finding]] = defaultdict(list)

    def add(self, name: str, outcome: str | Finding) -> None:
        self.outcomes[name]["finding" if isinstance(outcome, Finding) else outcome] += 1
        if isinstance(outcome, Finding):
            self.findings[name].append(outcome)

    def __str__(self) -> str:
        total = sum(self.outcomes.values(), Counter())
        width = max(map(len, [*self.outcomes, "all"]))
        lines = [
            f"{'':{width}}  {'tried':>7}  {'refused by name':>15}  {'accepted as equal':>17}  {'anything else':>13}"
        ]
        for name, counts in [*self.outcomes.items(), ("all", total)]:
            refused, equal, found = (counts[kind] for kind in ("refused", "equal", "finding"))
            lines.append(f"{name:{width}}  {counts.total():7}  {refused:15}  {equal:17}  {found:13}")
        for found in self.findings.values():
            lines += ["", *map(str, found[:SHOWN])]
            lines += [f"  and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        return "\n".join(lines)


def fuzz(cases: Mapping[str, Case], seed: int, seconds: float, tally: Tally) -> None:
    """Try the cases in turn, each at least once, for some seconds."""
    begin = time.monotonic()
    with tqdm(
        total=seconds, desc=f"seed {seed}", unit="s", bar_format="{desc}: {percentage:3.0f}% |{bar}|{postfix}"
    ) as bar:
        for number in itertools.count():
            for name, case in cases.items():
                tally.add(name, try_case(name, case, seed, number))
                passed = time.monotonic() - begin
                bar.update(min(passed, seconds) - bar.n)
                bar.set_postfix_str(
                    f"{number + 1} of each, {sum(map(len, tally.findings.values()))} findings", refresh=False
                )
                if number and passed > seconds:
                    break
            if passed > seconds:
                return


def main(arguments: Sequence[str] | None = None, cases: Mapping[str, Case] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser("python -m tests.fuzzing")
    parser.add_argument("--seconds", type=float, default=60.0, help="of all seeds together (default 60)")
    parser.add_argument("--seed", type=int, help=f"only this one (default {FIXED_SEED} and then a random one)")
    parser.add_argument("--case", help="only the cases whose name begins so")
    parser.add_argument("--number", type=int, help="repeat one try, with --seed and the whole name as --case")
    options = parser.parse_args(arguments)
    every = find_cases() if cases is None else cases
    chosen = {name: case for name, case in every.items() if name.startswith(options.case or "")}
    if not chosen:
        parser.error(f"--case is {options.case!r}, expected the beginning of one of {list(every)}")
    if options.number is not None:
        if options.seed is None or options.case not in every:
            parser.error(f"--number needs --seed and a whole name as --case, one of {list(every)}")
        print(run_case(options.case, every[options.case], options.seed, options.number))
        return 0
    seeds = [FIXED_SEED, secrets.randbelow(2**32)] if options.seed is None else [options.seed]
    tally = Tally()
    try:
        for seed in seeds:
            fuzz(chosen, seed, options.seconds / len(seeds), tally)
    except KeyboardInterrupt:
        print("interrupted; until then:", file=sys.stderr)
    print(f"seeds {', '.join(map(str, seeds))}\n{tally}")
    return 1 if any(tally.findings.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
