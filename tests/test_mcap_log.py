"""MCAP logs: what a file says is what the environment, the controller and the results say."""

import base64
import itertools
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

import parapolicy
from envs import make_env
from envs.inference_delay import InferenceDelay
from parapolicy.control import SimulatedClock
from parapolicy.evaluate.run.evaluation import evaluate
from parapolicy.evaluate.run.watchers import open_watcher
from parapolicy.image_file import decode_image
from parapolicy.spec import Feature
from tests.helpers import configured, small_policy

pytest.importorskip("mcap", reason="mcap is not installed")

from mcap.reader import make_reader

from parapolicy.control.mcap_log import SCHEMAS, McapLog

STEPS, EPISODES = 12, 2
PIXELS = {"image": Feature((96, 96, 3), "image"), "agent_pos": Feature((2,))}
CAMERA = {"width": 16, "levels": 2, "keypoints": 8, "features": 6}
NETWORK = {"name": "unet1d", "down_dims": [16], "encoder": {"cameras": {"image": CAMERA}}}


class Remembers(gymnasium.Wrapper):
    """Keeps what the environment has given and taken."""

    def __init__(self, env: gymnasium.Env, kept: dict[str, list[Any]]) -> None:
        super().__init__(env)
        self.kept = kept

    def reset(self, **options: Any) -> Any:
        observation, info = self.env.reset(**options)
        self.kept["observation"].append(observation)
        return observation, info

    def step(self, action: Any) -> Any:
        result = self.env.step(action)
        self.kept["action"].append(np.array(action))
        self.kept["reward"].append(result[1])
        if not (result[2] or result[3]):
            self.kept["observation"].append(result[0])
        return result


def read(path: Path) -> dict[str, list[tuple[int, dict[str, Any]]]]:
    """Topic -> (time in ns, message), in the file's order; every message's fields are those of its schema."""
    messages: dict[str, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
    with path.open("rb") as file:
        for schema, channel, message in make_reader(file).iter_messages(log_time_order=False):
            assert (channel.message_encoding, schema.encoding) == ("json", "jsonschema")
            assert json.loads(schema.data) == {"title": schema.name, **SCHEMAS[schema.name]}
            content = json.loads(message.data)
            assert content.keys() == SCHEMAS[schema.name]["properties"].keys()
            messages[channel.topic].append((message.log_time, content))
    return dict(messages)


def pixels(message: dict[str, Any]) -> np.ndarray:
    assert message["format"] == "png"
    return decode_image(base64.b64decode(message["data"]), ("L", "RGB", "RGBA"))


@pytest.mark.filterwarnings("ignore:act was called")  # a simulated control step is later by the latency
def test_the_log_of_an_evaluation_says_what_the_environment_and_the_results_say(tmp_path: Path) -> None:
    path, policy = tmp_path / "run.mcap", tmp_path / "policy"
    parapolicy.save_policy(small_policy(observation=PIXELS, network=NETWORK), policy)
    config = configured(
        "eval",
        "env=pusht_image",
        f"checkpoint={policy}",
        "samplers=[{name: sequential, solver: ddim, steps: 2, label: ddim, latency: 'fixed:50ms'}]",
        f"env.options.max_episode_steps={STEPS}",
        f"episodes={EPISODES}",
        "latency_chunks=0",
        "videos=0",
        "engine=eager",
        f"watch={path}",
    )
    kept: dict[str, list[Any]] = defaultdict(list)

    def build(spec: parapolicy.PolicySpec, clock: SimulatedClock) -> gymnasium.Env:
        env = InferenceDelay(make_env("pusht", spec, max_episode_steps=STEPS), clock, spec.control_hz)
        return Remembers(env, kept)

    results = evaluate(config, tmp_path / "run", build)["samplers"]["ddim"]
    episodes = [json.loads(line) for line in (tmp_path / "run" / "episodes.jsonl").read_text().splitlines()]
    log = read(path)
    steps = len(kept["action"])
    assert steps == results["control"]["steps"] > STEPS
    assert {topic: len(messages) for topic, messages in log.items()} == {
        "/episode": EPISODES,
        "/observation/image": steps,
        "/observation/agent_pos": steps,
        "/action": steps,
        "/reward": steps,
        "/scene": steps,
        "/scene/chunk": steps,
        "/chunk": sum(len(episode["control"]["chunk_seconds"]) for episode in episodes),
    }
    for messages in log.values():
        times = [time for time, _ in messages]
        assert all(before < after for before, after in itertools.pairwise(times))
    for key, expected in (("agent_pos", "values"), ("image", "data")):
        for (_, message), observation in zip(log[f"/observation/{key}"], kept["observation"], strict=True):
            given = message["values"] if expected == "values" else pixels(message)
            np.testing.assert_array_equal(given, np.asarray(observation[key]))
    np.testing.assert_array_equal([message["values"] for _, message in log["/action"]], kept["action"])
    assert [message["reward"] for _, message in log["/reward"]] == kept["reward"]
    assert [message["seed"] for _, message in log["/episode"]] == [config.seed, config.seed + 1]
    assert {round(message["latency_ms"], 6) for _, message in log["/chunk"]} == {50}
    assert {message["evaluations"] for _, message in log["/chunk"]} == {2}
    # Executed actions are those of the chunk, and the robot waits for each chunk.
    planned = {}
    for _, message in log["/chunk"]:
        planned.update({(message["number"], action["step"]): action["values"] for action in message["actions"]})
    for _, message in log["/action"][-STEPS // 2 :]:
        assert message["values"] == planned[message["chunk"], message["step"]]
    waits = [a - o for (a, _), (o, _) in zip(log["/action"], log["/observation/image"], strict=True)]
    assert {round(wait / 1e6) for wait in waits} == {0, 50}
    rewards = [message["reward"] for _, message in log["/reward"]]
    assert max(rewards) == max(episode["max_reward"] for episode in episodes)


@pytest.mark.filterwarnings("ignore:act was called")
@pytest.mark.parametrize("floats", [False, True])
def test_a_control_loop_of_ones_own_is_logged(floats: bool, tmp_path: Path) -> None:
    """By the clock of the loop, with pictures as bytes or as floats, and shapes that are not of one axis."""
    spec = {"camera": Feature((16, 24, 1), "image"), "points": Feature((3, 2))}
    policy = small_policy(observation=spec, network={**NETWORK, "encoder": {"cameras": {"camera": CAMERA}}})
    now, row = 100.0, {}
    rng = np.random.default_rng(0)
    path, given = tmp_path / "run.mcap", []
    controller = parapolicy.Controller(policy, log=row.update, clock=lambda: now)
    with McapLog(path) as log:
        log.begin("reach", seed=4)
        for _ in range(6):
            frame = rng.integers(256, size=(16, 24, 1), dtype=np.uint8)
            given.append({"camera": frame, "points": rng.normal(size=(3, 2)).astype(np.float32)})
            seen = np.moveaxis(frame, -1, 0).astype(np.float32) / 255 if floats else frame
            controller.act({**given[-1], "camera": seen})
            log.step(controller, row)
            now += 0.1
        now -= 50.0  # a clock that is set back
        controller.act({**given[-1], "camera": seen})
        log.step(controller, row)
    read_back = read(path)
    for (_, picture), (_, points), expected in zip(
        read_back["/observation/camera"], read_back["/observation/points"], given, strict=False
    ):
        np.testing.assert_array_equal(pixels(picture), expected["camera"])
        np.testing.assert_array_equal(np.reshape(points["values"], (3, 2)), expected["points"])
    times = [time for time, _ in read_back["/action"]]
    np.testing.assert_allclose(np.diff(times), 1e8, rtol=1e-6)
    assert [message["seed"] for _, message in read_back["/episode"]] == [4]
    with path.open("rb") as file:
        shapes = {channel.topic: channel.metadata for channel in make_reader(file).get_summary().channels.values()}
    assert shapes["/observation/points"] == {"shape": "[3, 2]"}


def test_what_cannot_be_logged_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"cannot write the MCAP log '.*nowhere/run\.mcap'"):
        McapLog(tmp_path / "nowhere" / "run.mcap")
    with McapLog(tmp_path / "run.mcap") as log, pytest.raises(ValueError, match=r"of /scene has 2 channels"):
        log.image("/scene", np.zeros((4, 4, 2), np.uint8))
    monkeypatch.setitem(sys.modules, "mcap.writer", None)
    with (
        pytest.raises(ValueError, match=r"pip install 'parapolicy\[mcap\]'"),
        open_watcher(str(tmp_path / "b.mcap"), []),
    ):
        pass
    assert not (tmp_path / "b.mcap").exists()
