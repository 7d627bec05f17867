"""A robot's loop around a policy server, with openpi-client's ``ActionChunkBroker``: a chunk, then its actions.

    parapolicy serve checkpoint=checkpoints/pusht_lowdim port=8000
    python examples/openpi_broker.py [port=8000] [steps=30] [history=true]

Needs openpi-client (pip install openpi-client) and nothing of parapolicy. The broker asks the server once per chunk,
with the observation of that step. Without ``history`` it sends only the present step, as most programs do, and the
policy sees a robot that stands still; with it, it sends the last steps too, and more episodes succeed. The "robot" here
is a point that follows its target; replace ``Robot`` by your drivers.
"""

import collections
import sys

import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy


class Robot:
    """A stand-in with a driver's two calls."""

    def __init__(self, shapes: dict) -> None:
        rng = np.random.default_rng(0)
        self.observation = {key: rng.uniform(150, 350, shape).astype(np.float32) for key, shape in shapes.items()}

    def observe(self) -> dict:
        """The present step, {key: (...)}."""
        return {key: value.copy() for key, value in self.observation.items()}

    def send(self, action: np.ndarray) -> bool:
        """Follow an action (Da,) for a control step; returns whether the episode continues."""
        self.observation["agent_pos"] += 0.2 * (action - self.observation["agent_pos"])
        return True


def play(policy: WebsocketClientPolicy, robot: Robot, steps: int, history: bool = True) -> None:
    """Run one episode of at most ``steps`` control steps."""
    metadata = policy.get_server_metadata()
    broker = ActionChunkBroker(policy, action_horizon=metadata["n_action_steps"])
    seen: collections.deque = collections.deque(maxlen=metadata["n_obs_steps"])
    for step in range(steps):
        now = robot.observe()
        seen.extend([now] * (seen.maxlen if not seen else 1))  # the first step is repeated for those before it
        past = {k: np.stack([each[k] for each in seen][-n:]) for k, n in metadata["obs_steps"].items()}
        # Announce a new episode: reset() of the broker and of the client send nothing.
        answer = broker.infer({**(past if history else now), "reset": step == 0})
        if not robot.send(answer["actions"]):
            return


def main(port: str = "8000", steps: str = "30", history: str = "true") -> None:
    policy = WebsocketClientPolicy("127.0.0.1", int(port))
    robot = Robot(policy.get_server_metadata()["observation"])
    play(policy, robot, int(steps), history == "true")
    print(f"{steps} control steps; the robot is at {robot.observation['agent_pos'].round(1).tolist()}")


if __name__ == "__main__":
    main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
