"""The picture of README: reward and fidelity against chunk latency, of some samplers of a report.

python -m tools.frontier_picture REPORT/samplers.csv --samplers sequential collocation-24 … --output FILE.png
"""

import argparse
from pathlib import Path

import pandas as pd

from parapolicy.evaluate.report.plots import plot_pareto


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="samplers.csv of a report on one task")
    parser.add_argument("--samplers", nargs="+", required=True, metavar="NAME", help="samplers to show")
    parser.add_argument("--output", type=Path, required=True)
    parsed = parser.parse_args()
    table = pd.read_csv(parsed.table)
    if unknown := sorted(set(parsed.samplers) - set(table["sampler"])):
        raise SystemExit(f"error: --samplers has {', '.join(unknown)}, expected some of {', '.join(table['sampler'])}")
    shown = table[table["sampler"].isin(parsed.samplers)]
    env, checkpoint = shown[["env", "checkpoint"]].iloc[0]
    plot_pareto(shown, None, f"{env}, {checkpoint}", parsed.output, ("difference", "energy"))


if __name__ == "__main__":
    main()
