"""Measure the samplers of finished runs: latency side by side, and distance from the policy in distribution.

    python -m tools.measure_runs RUN_OR_SWEEP_FOLDER… --output FOLDER [--latency-chunks 40] [--observations 16]

Writes ``latency.json`` and ``fidelity.json`` to the output folder, which ``parapolicy report`` takes beside those
of the runs. What is in them already is not measured again. Latencies need a machine that is idle otherwise.
"""

import argparse
from pathlib import Path

from parapolicy.evaluate.report.gather import gather_runs
from parapolicy.evaluate.report.sweep import measure_fidelities, measure_latencies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--latency-chunks", type=int, default=0, help="chunks that are timed per sampler; 0: none")
    parser.add_argument("--engine", help="of these; the runs' own if it is left out")
    parser.add_argument("--observations", type=int, default=0, help="where distributions are compared; 0: nowhere")
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
