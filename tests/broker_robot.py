"""Runs in openpi-client's environment: examples/openpi_broker.py with a robot at the other end of its pipes.

python tests/broker_robot.py PORT STEPS HISTORY   (an observation as JSON in, an action as JSON out, per line)
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.openpi_broker import WebsocketClientPolicy, play


class PipedRobot:
    def observe(self) -> dict:
        return {key: np.asarray(value, np.float32) for key, value in json.loads(self._line).items()}

    def send(self, action: np.ndarray) -> bool:
        print(json.dumps(action.tolist()), flush=True)
        self._line = sys.stdin.readline()
        return bool(self._line.strip())

    def begin(self) -> bool:
        self._line = sys.stdin.readline()
        return bool(self._line.strip())


client, robot = WebsocketClientPolicy("127.0.0.1", int(sys.argv[1])), PipedRobot()
while robot.begin():
    play(client, robot, int(sys.argv[2]), sys.argv[3] == "true")
