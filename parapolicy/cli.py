"""The command ``parapolicy``."""

import re
import sys
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from parapolicy import commands

USAGE = """usage: parapolicy eval [env=pusht checkpoint=FOLDER samplers=[sequential,collocation] episodes=20 …]
       parapolicy train data.path=FOLDER [data=pusht_state output=FOLDER …]
       parapolicy bench [CHECKPOINT] [--engines eager compiled] [--chunks 20] [--widen 4] [--scaling]
       parapolicy inspect CHECKPOINT [--json]
       parapolicy check CHECKPOINT [--chunks 5] [--engine auto] [--device auto] [--json]
       parapolicy convert CHECKPOINT OUT [--control-hz HZ]
       parapolicy export CHECKPOINT OUT [--format fused|onnx|openvino|aoti] [--sampler sequential] [--engine fused]
       parapolicy calibrate FOLDER [--observations FILE.npz…] [--chunks 60] [--draws 60]
       parapolicy serve [checkpoint=FOLDER port=8000 …]
       parapolicy ros2 SETTINGS.yaml [--ros-args …]
       parapolicy report FOLDER… [--output FOLDER] [--margin 0.03 --success-margin 0.05]

  eval     compare samplers on a policy: reward in closed loop, latency, chunk error; -m sweeps
  train    train a policy on demonstrations, score it, write its model card
  bench    network calls and chunks on this machine against its floor
  inspect  describe a policy: its observations, actions, schedule and warnings
  check    run every sampler on made-up observations: rounds, evaluations, errors, latency
  convert  write a policy as config.json and model.safetensors; its chunks stay the same to the bit
  export   write a policy with its schedule and sampler as one file, for control stacks without Python; or its network
           and image encoder for ONNX, OpenVINO or AOTInductor
  calibrate  measure at which steps the sampler collocation should ask the network, and its distance from the policy
  serve    answer openpi clients with action chunks of a policy; its settings: parapolicy.serve.settings.ServeConfig
  ros2     run a ROS 2 node between topics of observations and of actions; its settings: docs/ros2.md
  report   combine evaluation runs in one page, with tables and plots

parapolicy COMMAND --help has every option, parapolicy --version the version. An option is --key value, --key=value or
key=value. eval and train are hydra applications: key=value only, and --cfg job shows all.
Exit codes: 0 done, 1 failed, with the reason on stderr, 2 unknown command or flag, 130 interrupted.

A CHECKPOINT is a folder of parapolicy or LeRobot, hf://owner/name[@revision], a .ckpt of Diffusion Policy's published
code, or a .pth of robomimic. Averaged weights beside a LeRobot folder: --ema.
"""


def as_flags(arguments: Sequence[str]) -> list[str]:
    """``key=value`` as ``--key=value``, unless it is the name of a file or folder."""
    return [
        f"--{found[1].replace('_', '-')}={found[2]}"
        if (found := re.fullmatch(r"([a-z][\w-]*)=(.*)", argument, re.DOTALL)) and not Path(argument).exists()
        else argument
        for argument in arguments
    ]


COMMANDS = {
    "eval": commands.evaluate,
    "train": commands.train,
    "bench": commands.bench,
    "inspect": commands.inspect,
    "check": commands.check,
    "convert": commands.convert,
    "export": commands.export,
    "calibrate": commands.calibrate,
    "serve": commands.serve,
    "ros2": commands.ros2,
    "report": commands.report,
}
SETTINGS = ("eval", "train", "serve", "ros2")  # commands that take key=value themselves
# The package extra that a command needs.
EXTRAS = dict.fromkeys(("eval", "train", "bench", "calibrate", "report"), "eval") | {"serve": "serve", "ros2": "ros2"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    if arguments[0] == "--version":
        print(f"parapolicy {metadata.version('parapolicy')}")
        return
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"{USAGE}\nerror: command is {name!r}, expected one of {list(COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
            COMMANDS[name](rest if name in SETTINGS else as_flags(rest))
    except ImportError as error:
        extra = f"[{EXTRAS[name]}]" if name in EXTRAS else ""
        raise SystemExit(f"error: {error.name} is missing; pip install 'parapolicy{extra}'") from error
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
