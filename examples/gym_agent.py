"""A policy as the agent of a gymnasium environment.

python -m examples.gym_agent [checkpoint=checkpoints/pusht_lowdim] [episodes=3]
"""

import sys

import parapolicy
from envs import make_env


def main(checkpoint: str = "checkpoints/pusht_lowdim", episodes: str = "3") -> None:
    policy = parapolicy.load_policy(checkpoint)
    env = make_env("pusht", policy.spec)
    controller = parapolicy.Controller(policy)
    for seed in range(100_000, 100_000 + int(episodes)):
        observation, _ = env.reset(seed=seed)
        controller.reset(seed=seed)
        best, over = 0.0, False
        while not over:
            observation, reward, terminated, truncated, _ = env.step(controller.act(observation))
            best, over = max(best, float(reward)), terminated or truncated
        chunk = controller.latency["times"]["chunk"]
        print(f"seed {seed}: reward {best:.3f}, chunk {chunk['p50']:.0f} ms (p99 {chunk['p99']:.0f} ms)")


if __name__ == "__main__":
    main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
