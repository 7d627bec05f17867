"""The loss of a client that sends only the present observation, for a policy that takes several steps.

    python -m tools.observation_history [--episodes 20] [--steps 300] [--output FILE]

Push-T, the shipped policy, episodes from seed 100000, with the same noise both ways: with the last observations, and
with the present one repeated for all of them, which is what the server does with a single observation.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import parapolicy
from envs import make_env
from parapolicy.noise import mix_seeds

CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints/pusht_lowdim"
WAYS = ("stacked", "single")


def play(policy: parapolicy.Policy, seed: int, single: bool, steps: int) -> tuple[float, bool]:
    """Largest reward and success of an episode."""
    env = make_env("pusht", policy.spec, max_episode_steps=steps)
    history = parapolicy.ObservationHistory(policy.spec)
    observation, _ = env.reset(seed=seed)
    history.push(observation)
    best, success, over, chunk = 0.0, False, False, 0
    while not over:
        if single:
            history = parapolicy.ObservationHistory(policy.spec)
            history.push(observation)  # pads with it
        seeded = mix_seeds(seed, chunk)
        chunk += 1
        for action in policy.predict(history.stacked(), seed=seeded).actions:
            observation, reward, terminated, truncated, info = env.step(action)
            history.push(observation)
            best, success = max(best, float(reward)), success or bool(info["is_success"])
            over = terminated or truncated
            if over:
                break
    env.close()
    return best, success


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300, help="control steps of an episode")
    parser.add_argument("--output", type=Path, help="of the rows, JSON")
    given = parser.parse_args()
    policy = parapolicy.load_policy(CHECKPOINT, device="cpu")
    rows: list[dict[str, Any]] = []
    for way in WAYS:
        played = [play(policy, 100_000 + i, way == "single", given.steps) for i in range(given.episodes)]
        rewards, successes = zip(*played, strict=True)
        rows.append({"way": way, "reward": statistics.fmean(rewards), "success": statistics.fmean(successes)})
        print("{way:8} mean max reward {reward:.3f}, success {success:.2f}".format(**rows[-1]), flush=True)
    if given.output:
        given.output.write_text(json.dumps({"episodes": given.episodes, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
