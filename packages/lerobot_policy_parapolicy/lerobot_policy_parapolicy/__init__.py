"""LeRobot's commands import this package, because its name begins with ``lerobot_policy_``.

If the variable ``PARAPOLICY_LEROBOT`` is set, all diffusion policies of the process are then sampled by parapolicy.
"""

from parapolicy.lerobot import accelerate_by_environment

accelerate_by_environment()
