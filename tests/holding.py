"""An environment that waits, so that a run can be hit at a known place on a machine of any speed."""

import os
from pathlib import Path

MODULE = """
import time
from pathlib import Path
import gymnasium
from envs import make_env

class Holding(gymnasium.Wrapper):
    def reset(self, *, seed=None, options=None):
        while seed >= 100_002 and not Path({go!r}).exists():
            time.sleep(0.01)
        return self.env.reset(seed=seed, options=options)

def make(spec, **options):
    return Holding(make_env("pusht", spec, **options))
"""


def holding_env(folder: Path) -> dict[str, str]:
    """What ``os.environ`` must be for commands to know ``env.name=holding``: Push-T whose third episode, of seed
    100002, and later ones begin when there is a file ``folder / "go"``."""
    about = folder / "holding-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: holding\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[parapolicy.envs]\nholding = holding:make\n")
    (folder / "holding.py").write_text(MODULE.format(go=str(folder / "go")))
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
