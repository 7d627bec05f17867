"""The command ``parapolicy``."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

USAGE = """usage: parapolicy serve [checkpoint=FOLDER port=8000 …]
       parapolicy report FOLDER… [--output FOLDER] [--margin 0.03]

  serve    answer openpi clients with action chunks of a policy; its settings: parapolicy.serve.settings.ServeConfig
  report   put evaluation runs into one page, with tables and pictures
"""


def serve(arguments: Sequence[str]) -> None:
    """``parapolicy serve``: settings are ``key=value``, as hydra's overrides are."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from parapolicy.serve.server import run_server
    from parapolicy.serve.settings import ServeConfig

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    for argument in arguments:
        if argument.endswith("="):  # OmegaConf would take it for null: no key is asked where a variable is empty
            raise ValueError(f"the setting {argument!r} has no value, expected one, or null")
    try:
        given = OmegaConf.from_dotlist(list(arguments))
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ServeConfig), given))
    except OmegaConfBaseException as error:
        raise ValueError(error) from error
    assert isinstance(config, ServeConfig)
    run_server(config)


def report(arguments: Sequence[str]) -> None:
    """``parapolicy report``."""
    parser = argparse.ArgumentParser("parapolicy report")
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    parser.add_argument("--output", type=Path, default=Path("report"))
    parser.add_argument("--margin", type=float, default=0.03, help="of the equivalence tests, in units of reward")
    parsed = parser.parse_args(arguments)
    if not parsed.folders:
        raise ValueError("no folder is given, expected those of runs or sweeps")
    if not parsed.margin > 0:
        raise ValueError(f"margin is {parsed.margin:g}, expected a positive number")

    from parapolicy.evaluate.report.html_report import write_report

    print(f"wrote {write_report(parsed.folders, parsed.output, parsed.margin)}")


COMMANDS = {"serve": serve, "report": report}
EXTRAS = {"serve": "serve", "report": "eval"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    name, *rest = arguments
    if name not in COMMANDS:
        raise SystemExit(f"error: command is {name!r}, expected one of {list(COMMANDS)}\n{USAGE}")
    try:
        COMMANDS[name](rest)
    except ImportError as error:
        raise SystemExit(f"error: {error.name} is missing; pip install 'parapolicy[{EXTRAS[name]}]'") from error
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
