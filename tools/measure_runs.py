"""Measure the samplers of finished runs: latency side by side, and distance from the policy in distribution.

    python -m tools.measure_runs RUN_OR_SWEEP_FOLDER… --output FOLDER [--latency-chunks 40] [--observations 16]

Writes ``latency.json`` and ``fidelity.json`` to the output folder, for ``parapolicy report`` together with the folders
of the runs. Existing measurements in them are not repeated. Latencies need an otherwise idle machine.
"""

import argparse
from pathlib import Path

from parapolicy.evaluate.report.gather import gather_runs
from parapolicy.evaluate.report.sweep import measure_fidelities, measure_latencies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--latency-chunks", type=int, default=0, help="timed chunks per sampler; 0: none")
    parser.add_argument("--engine", help="engine of these chunks; left out: the runs' own")
    parser.add_argument("--observations", type=int, default=0, help="at which distributions are compared; 0: none")
    parser.add_argument("--draws", type=int, default=100, help="chunks per observation and sampler")
    parsed = parser.parse_args()
    try:
        runs = gather_runs(parsed.folders)
        parsed.output.mkdir(parents=True, exist_ok=True)
        if parsed.latency_chunks:
            measure_latencies(runs, parsed.output / "latency.json", parsed.latency_chunks, parsed.engine)
        if parsed.observations:
            measure_fidelities(runs, parsed.output / "fidelity.json", parsed.observations, parsed.draws)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"wrote {parsed.output}")


if __name__ == "__main__":
    main()
