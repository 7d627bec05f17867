"""Run a command of LeRobot with its diffusion policies sampled in parallel.

    python -m parapolicy.lerobot [--sampler auto] [--engine auto] [--verify] lerobot-eval --policy.path=…

Works for every command that LeRobot installs, the asynchronous policy server too, and for every diffusion policy that
the command builds or loads. Arguments after the command's name are the command's own.
"""

import argparse
import atexit
import importlib
import os
import shlex
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points

from parapolicy.adapters.live import Accelerated
from parapolicy.adapters.live_lerobot import REPLACED, replace_methods

MODULE = "lerobot.policies.diffusion.modeling_diffusion"
SERVER = "lerobot.async_inference.policy_server"  # LeRobot installs no command for it
VARIABLE = "PARAPOLICY_LEROBOT"  # read by the plug-in lerobot_policy_parapolicy


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m parapolicy.lerobot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_options(parser)
    parser.add_argument("command", help=f"such as lerobot-eval, or the name of a module, such as {SERVER}")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="the command's own arguments")
    given = parser.parse_args(arguments)
    _replace(given)
    sys.argv = [given.command, *given.rest]
    found = [entry for entry in entry_points(group="console_scripts") if entry.name == given.command]
    if found:
        sys.exit(found[0].load()())
    try:
        module = importlib.import_module(given.command)
        run = next(getattr(module, name) for name in ("main", "serve") if hasattr(module, name))
    except (ImportError, StopIteration) as error:
        raise SystemExit(
            f"error: {given.command!r} is neither an installed command nor a module with main()"
        ) from error
    sys.exit(run())


def accelerate_by_environment() -> None:
    """Sample all of LeRobot's diffusion policies in this process as the variable ``PARAPOLICY_LEROBOT`` says.

    Its value is ``1``, or options of :func:`main` such as ``--sampler secant``. If it is empty or ``0``, or if
    :func:`main` has already replaced the methods, nothing happens.

    Raises:
        SystemExit: the value is wrong. LeRobot would only log any other error of a plug-in and use its own sampling.
    """
    value = os.environ.get(VARIABLE, "").strip()
    if value in ("", "0") or REPLACED:
        return
    parser = argparse.ArgumentParser(prog=f"{VARIABLE}=1, or {VARIABLE}=", add_help=False, allow_abbrev=False)
    _add_options(parser)
    try:
        words = shlex.split(value)
    except ValueError as error:
        raise SystemExit(f"error: {VARIABLE} is {value!r}: {error}") from error
    _replace(parser.parse_args([] if value == "1" else words))


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sampler", default="auto", help="one of parapolicy.list_samplers(), or auto")
    parser.add_argument("--engine", default="auto", help="one of parapolicy.engine.ENGINES")
    parser.add_argument("--tolerance", type=float, help="of the sampler; left out: the sampler's default")
    parser.add_argument("--verify", action="store_true", help="compare the first chunk with LeRobot's own")


def _replace(given: argparse.Namespace) -> None:
    """Replace the methods of LeRobot's classes, and report the chunks' cost at exit."""
    try:
        module = importlib.import_module(MODULE)
    except ImportError as error:
        raise SystemExit(
            f"error: LeRobot is not installed in this environment ({error}); pip install lerobot"
        ) from error
    parameters = {} if given.tolerance is None else {"tolerance": given.tolerance}
    try:
        made = replace_methods(
            module.DiffusionModel, module.DiffusionPolicy, given.sampler, given.engine, given.verify, **parameters
        )
    except (TypeError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    atexit.register(report, made)


def report(made: Sequence[Accelerated]) -> None:
    """Print the cost of each policy's chunks."""
    for accelerated in made:
        if recent := accelerated.recent:
            seconds = statistics.median(cost.seconds for cost in recent)
            rounds = statistics.fmean(float(cost.rounds.mean()) for cost in recent)
            evaluations = statistics.fmean(float(cost.evaluations.mean()) for cost in recent)
            print(
                f"parapolicy: the last {len(recent)} chunks took {1e3 * seconds:.1f} ms (median), {rounds:.1f} rounds "
                f"and {evaluations:.0f} network evaluations each, sampled by {accelerated.settings[0]}",
                file=sys.stderr,
            )


if __name__ == "__main__":
    main()
