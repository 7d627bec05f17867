"""The subcommands of ``parapolicy``; each takes its arguments."""

import argparse
import dataclasses
import json
import logging
import os
import runpy
import sys
from collections.abc import Sequence
from inspect import getdoc
from pathlib import Path


def run_application(name: str, arguments: Sequence[str]) -> None:
    """``parapolicy eval`` and ``parapolicy train``: run the program beside the package, or the one in the wheel."""
    package = Path(__file__).parent
    folder = next((p for p in (package / "application", package.parent) if (p / f"{name}.py").is_file()), None)
    if folder is None:
        raise ValueError(f"there is no {name}.py in {package / 'application'} or {package.parent}; install the wheel")
    sys.path.insert(0, str(folder))
    # Processes that it starts, such as Slurm jobs of a sweep, must import the same environments.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    sys.argv = [str(folder / f"{name}.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def evaluate(arguments: Sequence[str]) -> None:
    """``parapolicy eval``."""
    run_application("eval", arguments)


def train(arguments: Sequence[str]) -> None:
    """``parapolicy train``."""
    run_application("train", arguments)


def bench(arguments: Sequence[str]) -> None:
    """``parapolicy bench``."""
    from parapolicy.bench.__main__ import main as run_bench

    run_bench(arguments)


def inspect(arguments: Sequence[str]) -> None:
    """``parapolicy inspect``."""
    parser = _checkpoint_parser("inspect")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parsed = parser.parse_args(arguments)

    from parapolicy import load_policy
    from parapolicy.describe import describe, present

    facts = describe(load_policy(parsed.checkpoint, ema=parsed.ema))
    print(json.dumps(facts, indent=2) if parsed.json else present(parsed.checkpoint, facts))


def check(arguments: Sequence[str]) -> None:
    """``parapolicy check``."""
    parser = _checkpoint_parser("check")
    parser.add_argument("--chunks", type=int, default=5, help="observations per sampler")
    parser.add_argument("--engine", default="auto", help="auto: the one that load_policy takes")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parsed = parser.parse_args(arguments)
    if parsed.chunks < 1:
        raise ValueError(f"chunks is {parsed.chunks}, expected at least 1")

    from tqdm import tqdm

    from parapolicy import list_samplers, load_policy
    from parapolicy.bench.compare import compare_samplers, present
    from parapolicy.engine import make_engine
    from parapolicy.planner import made_up_observations

    policy = load_policy(parsed.checkpoint, device=parsed.device, engine=parsed.engine, ema=parsed.ema)
    count = (parsed.chunks + 1) * len(list_samplers())
    with tqdm(total=count, unit="chunk", leave=False, disable=None) as bar:  # only on a terminal
        rows = compare_samplers(policy, made_up_observations(policy, parsed.chunks), bar.update)
    where = f"{parsed.chunks} made-up observations, engine {policy.engine.name} on {policy.device}"
    if parsed.json:
        settings = {"checkpoint": parsed.checkpoint, "chunks": parsed.chunks, "engine": policy.engine.name}
        print(json.dumps({**settings, "samplers": rows}))
    else:
        print(f"{where}; error: largest difference from the sequential chunk, normalised\n{present(rows)}")
    usual = make_engine("auto", policy.device).name
    if policy.engine.name != usual:
        print(f"load_policy takes engine {usual} here: --engine {usual} measures what you will see", file=sys.stderr)


def convert(arguments: Sequence[str]) -> None:
    """``parapolicy convert``."""
    parser = _checkpoint_parser("convert")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--control-hz", type=float, help="control rate of the demonstrations, if the file has none")
    parsed = parser.parse_args(arguments)
    if parsed.out.exists() and (not parsed.out.is_dir() or any(parsed.out.iterdir())):
        raise ValueError(f"{parsed.out} exists and is not an empty folder; choose another name")

    from parapolicy import load_policy, save_policy

    policy = load_policy(parsed.checkpoint, device="cpu", engine="eager", ema=parsed.ema)
    if parsed.control_hz is not None:
        policy = dataclasses.replace(policy, spec=policy.spec.with_control_hz(parsed.control_hz))
    save_policy(policy, parsed.out)
    print(f"wrote {parsed.out}")


def export(arguments: Sequence[str]) -> None:
    """``parapolicy export``."""
    parser = _checkpoint_parser("export")
    parser.add_argument("out", type=Path, metavar="OUT")
    forms = ["fused", "onnx", "openvino", "aoti"]
    parser.add_argument("--format", choices=forms, default="fused", help="fused: a plan file of parapolicy_fused.h")
    fused = parser.add_argument_group("options of the format fused")
    fused.add_argument("--sampler", help="sequential (default) or collocation")
    fused.add_argument("--nodes", type=int, help="of collocation")
    fused.add_argument("--window", type=int, help="of collocation")
    fused.add_argument("--solver", help="instead of the policy's own, such as ddim")
    fused.add_argument("--steps", type=int, help="of the solver")
    fused.add_argument("--engine", help="fused (default), or fused_bfloat16 for processors with bfloat16 instructions")
    parsed = parser.parse_args(arguments)

    from parapolicy import load_policy

    if parsed.format != "fused":
        from parapolicy.export_graph import export_graphs

        settings = ("sampler", "nodes", "window", "solver", "steps", "engine")
        unused = [name for name in settings if getattr(parsed, name) is not None]
        if unused:
            raise ValueError(f"{unused} are options of the format fused; leave them out for {parsed.format}")
        policy = load_policy(parsed.checkpoint, "sequential", device="cpu", engine="eager", ema=parsed.ema)
        found = export_graphs(policy, parsed.out, parsed.format)
        errors = ", ".join(f"{name} within {error:.1g}" for name, error in found.items())
        print(f"wrote {parsed.out}: {errors} of its largest output")
        return
    if parsed.out.is_dir():
        raise ValueError(f"{parsed.out} is a folder, expected a file name")

    from parapolicy.export import write_plan

    given = {name: getattr(parsed, name) for name in ("nodes", "window") if getattr(parsed, name) is not None}
    how = {"device": "cpu", "engine": parsed.engine or "fused", "ema": parsed.ema}
    policy = load_policy(parsed.checkpoint, parsed.sampler or "sequential", **how, **given)
    if parsed.solver is not None or parsed.steps is not None:
        policy = policy.with_schedule(parsed.solver, parsed.steps)
    write_plan(policy, parsed.out)
    print(f"wrote {parsed.out}")


def calibrate(arguments: Sequence[str]) -> None:
    """``parapolicy calibrate``."""
    parser = argparse.ArgumentParser("parapolicy calibrate")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--observations",
        type=Path,
        nargs="+",
        help="arrays {key: (N, To, …)}, as eval.py saves them; half are held out",
    )
    parser.add_argument("--chunks", type=int, default=60, help="sequential chunks to calibrate on, and to measure")
    parser.add_argument("--draws", type=int, default=60, help="chunks per observation for the energy distance")
    parser.add_argument("--engine", default="eager", help="engine that computes the chunks")
    parser.add_argument(
        "--keep", action="store_true", help="measure the existing calibration, on observations it has not seen"
    )
    parsed = parser.parse_args(arguments)
    if parsed.chunks < 2 or parsed.draws < 2:
        raise ValueError(f"chunks is {parsed.chunks} and draws is {parsed.draws}, expected at least 2 of each")

    if parsed.folder.is_file():
        raise ValueError(f"{parsed.folder} is a file, expected a policy folder; make one with parapolicy convert")

    from parapolicy import load_policy
    from parapolicy.calibrate import FILE, LEAST_DRAWS, LEAST_SITUATIONS, with_calibration, write_calibration
    from parapolicy.evaluate.measure.calibrated import measure_calibration, present, read_observations
    from parapolicy.planner import default_sampler, made_up_observations
    from parapolicy.samplers.collocation import BOUND, NODES

    policy = load_policy(parsed.folder, device="cpu", engine=parsed.engine)
    if parsed.observations is None:
        observations = made_up_observations(policy, 2 * parsed.chunks)
    else:
        observations = [one for path in parsed.observations for one in read_observations(path)]
    calibration, rows = measure_calibration(policy, observations, parsed.chunks, parsed.draws, parsed.keep)
    write_calibration(parsed.folder / FILE, policy, calibration, {"rows": rows, "made_up": parsed.observations is None})
    print(f"{present(rows)}\nwrote {parsed.folder / FILE}")
    read = with_calibration(policy, parsed.folder, measure=False)
    name = type(default_sampler(read)).__name__.lower()
    measured = {} if read.schedule.calibration is None else read.schedule.calibration.distances
    if NODES in measured:
        reason = f"{NODES} nodes are within {measured[NODES]:.2%} of the spread, {BOUND:.0%} is allowed"
    else:
        reason = (
            f"a distance for {NODES} nodes counts if it is measured on --observations of closed loops, in at least "
            f"{LEAST_SITUATIONS} situations, with --draws of at least {LEAST_DRAWS}"
        )
    print(f"load_policy takes {name} for this policy: {reason}")


def _checkpoint_parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(f"parapolicy {name}")
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--ema", action="store_true", help="use the averaged weights beside a LeRobot folder")
    return parser


def serve(arguments: Sequence[str]) -> None:
    """``parapolicy serve``: settings are ``key=value``, as hydra's overrides are, or ``--key value``."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from parapolicy.serve.server import run_server
    from parapolicy.serve.settings import ServeConfig

    if {"-h", "--help"} & set(arguments):
        defaults = OmegaConf.to_yaml(OmegaConf.structured(ServeConfig)).replace(": ", "=")
        print(f"usage: parapolicy serve [key=value …]\n\n{getdoc(ServeConfig)}\n\nDefaults:\n{defaults}", end="")
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    arguments = as_settings(arguments)
    for argument in arguments:
        if argument.endswith("="):  # OmegaConf reads it as null: an empty variable would turn the API key off
            raise ValueError(f"the setting {argument!r} has no value; give one, or null")
    try:
        given = OmegaConf.from_dotlist(list(arguments))
        settings = [field.name for field in dataclasses.fields(ServeConfig)]
        unknown = [key for key in given if key not in settings]
        if unknown:
            raise ValueError(f"there are no settings {unknown}, expected some of {settings}, each as key=value")
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ServeConfig), given))
    except OmegaConfBaseException as error:
        raise ValueError(error) from error
    assert isinstance(config, ServeConfig)
    run_server(config)


def ros2(arguments: Sequence[str]) -> None:
    """``parapolicy ros2``."""
    if arguments and arguments[0] in ("-h", "--help"):
        print("usage: parapolicy ros2 SETTINGS.yaml [--ros-args …]\n\nThe settings: docs/ros2.md")
        return
    if not arguments or arguments[0].startswith("-"):
        raise ValueError("no settings file is given; name a YAML file")

    from parapolicy.ros2.node import run_node

    run_node(arguments[0], arguments[1:])


def report(arguments: Sequence[str]) -> None:
    """``parapolicy report``."""
    parser = argparse.ArgumentParser("parapolicy report")
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    parser.add_argument("--output", type=Path, default=Path("report"))
    parser.add_argument("--margin", type=float, default=0.03, help="mean rewards within it count as equal")
    parser.add_argument("--success-margin", type=float, default=0.05, help="success rates within it count as equal")
    parser.add_argument(
        "--fidelity-margin", type=float, default=0.01, help="of energy distances, in mean distances between chunks"
    )
    parser.add_argument(
        "--other-distributions",
        action="store_true",
        help="also recommend samplers that do not keep the policy's distribution",
    )
    parsed = parser.parse_args(arguments)
    if not parsed.folders:
        raise ValueError("no folder is given; name the folders of runs or sweeps")
    for name in ("margin", "success_margin", "fidelity_margin"):
        if not getattr(parsed, name) > 0:
            raise ValueError(f"{name.replace('_', '-')} is {getattr(parsed, name):g}, expected a positive number")

    from parapolicy.evaluate.report.html_report import write_report
    from parapolicy.evaluate.report.summary import Margins

    margins = Margins(parsed.margin, parsed.success_margin, parsed.fidelity_margin, parsed.other_distributions)
    print(f"wrote {write_report(parsed.folders, parsed.output, margins)}")


def as_settings(arguments: Sequence[str]) -> list[str]:
    """``--key value`` and ``--key=value`` as ``key=value``; an argument that is neither stays as it is."""
    settings, left = list[str](), iter(arguments)
    for argument in left:
        if not argument.startswith("--"):
            settings.append(argument)
            continue
        name, given, value = argument[2:].partition("=")
        key = name.replace("-", "_")
        if not given and (value := next(left, "--")).startswith("--"):
            raise ValueError(f"the setting {key!r} has no value; give one, or null")
        settings.append(f"{key}={value}")
    return settings
