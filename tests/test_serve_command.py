"""``parapolicy serve`` as a process of its own, and the published client against it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from parapolicy.cli import main
from parapolicy.loading import save_policy
from parapolicy.policy import Policy
from tests.conftest import PATIENCE, ROOT
from tests.helpers import some_observation
from tests.server_load import end, load
from tests.serving import expected_episode, infer, running, served_policy

CLIENT_PYTHON = Path(os.environ.get("PARAPOLICY_CLIENT_PYTHON", ROOT / ".venv-client" / "bin" / "python"))


@pytest.fixture(scope="module")
def policy() -> Policy:
    return served_policy()


def start_command(*settings: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "parapolicy.cli", "serve", *settings]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


@pytest.fixture
def command(policy: Policy, tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], int]]]:
    save_policy(policy, tmp_path / "policy")
    started = []

    def start(*settings: str) -> tuple[subprocess.Popen[str], int]:
        process = start_command(
            f"checkpoint={tmp_path / 'policy'}", "port=0", "sampler=semi_implicit", "engine=eager", *settings
        )
        started.append(process)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("serving on"):
                return process, int(line.split(";")[0].rsplit(":", 1)[1])
        raise AssertionError("the server has not started")

    yield start
    for process in started:
        process.kill()


def test_the_published_client(command: Callable, policy: Policy, tmp_path: Path) -> None:
    """openpi-client as it is published, in a process and an environment of its own."""
    if not CLIENT_PYTHON.is_file() or subprocess.run([CLIENT_PYTHON, "-c", "import openpi_client"]).returncode:
        pytest.skip(f"no openpi-client at {CLIENT_PYTHON}; make test installs it where its own pins can be had")
    (tmp_path / "key").write_text("k3y\n")
    process, port = command(f"api_key_file={tmp_path / 'key'}")
    histories = [some_observation(policy.spec, seed=i) for i in range(3)]
    script = (
        "import json, sys, numpy as np\n"
        "from openpi_client.websocket_client_policy import WebsocketClientPolicy\n"
        "client = WebsocketClientPolicy('127.0.0.1', int(sys.argv[1]), api_key='k3y')\n"
        "assert client.get_server_metadata()['policy'] == 'parapolicy'\n"
        "for line in sys.stdin:\n"
        "    message = {k: np.asarray(v, np.float32) for k, v in json.loads(line).items()}\n"
        "    print(json.dumps(client.infer(message)['actions'].tolist()))\n"
        "try:\n"
        "    client.infer({'nothing': 1})\n"
        "except RuntimeError as error:\n"
        "    print(json.dumps(str(error)))\n"
        "print(json.dumps(client.infer({**message, 'reset': True})['actions'].tolist()))\n"
    )
    lines = "\n".join(json.dumps({k: v.tolist() for k, v in history.items()}) for history in histories)
    done = subprocess.run(
        [CLIENT_PYTHON, "-c", script, str(port)], input=lines, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    *answers, error, again = map(json.loads, done.stdout.splitlines())
    for actions, expected in zip(answers, expected_episode(policy, histories, warm_start=False), strict=True):
        np.testing.assert_allclose(actions, expected, rtol=1e-5, atol=1e-4)
    assert "lacks ['position', 'points']" in error
    (expected,) = expected_episode(policy, histories[-1:])
    np.testing.assert_allclose(again, expected, rtol=1e-5, atol=1e-4)  # on the same connection
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0


def test_closing_finishes_what_was_asked(command: Callable, policy: Policy) -> None:
    process, port = command()
    with connect(f"ws://127.0.0.1:{port}", compression=None, open_timeout=PATIENCE) as client:
        client.recv()
        infer(client, some_observation(policy.spec))
        process.send_signal(signal.SIGINT)
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=PATIENCE)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1001
    assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["prot=1"], r"no settings \['prot'\], expected some of \['checkpoint', 'host', 'port'"),
        (["--prot", "1"], r"no settings \['prot'\]"),
        (["--port"], "'port' has no value"),
        (["port=high"], "high"),
        (["checkpoint=nowhere"], "no checkpoint at 'nowhere'"),
        (["sampler=fast"], "sampler is 'fast'"),
        (["max_batch=0"], "max_batch is 0"),
        (["api_key="], "'api_key=' has no value"),
        (["api_key_file=nowhere"], "nowhere"),
    ],
)
def test_the_command_names_bad_settings(settings: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["serve", *settings])


def test_a_taken_port_is_named(policy: Policy, tmp_path: Path) -> None:
    save_policy(policy, tmp_path / "policy")
    with running(policy) as server, pytest.raises(SystemExit, match=r"error: .*address already in use"):
        main(["serve", f"checkpoint={tmp_path / 'policy'}", f"port={server.port}"])


def test_a_loaded_server_keeps_its_promises(policy: Policy, tmp_path: Path) -> None:
    """A slice of tests/server_load.py, which says how fast, too."""
    save_policy(policy, tmp_path)
    loaded = load(str(tmp_path), malformed=200, giant=4, connections=40)
    assert loaded["refused"] + loaded["answered"] == 200
    assert loaded["giant refused"] == 4
    assert loaded["good equal"] >= 1
    assert "good different" not in loaded
    assert loaded["health failed"] == 0
    assert loaded["memory peak / idle"] < 1.5
    ended = end(str(tmp_path))
    assert ended["delivered"] >= 1
    assert ended["dropped"] >= 1
    assert ended["delivered"] + ended["dropped"] == 11
    assert ended["exit code"] == 0


def test_a_control_rate_adds_to_the_checkpoint_and_contradicts_none(policy: Policy, tmp_path: Path) -> None:
    save_policy(policy, tmp_path / "policy")
    settings = [f"checkpoint={tmp_path / 'policy'}", "port=0", "engine=eager"]
    with pytest.raises(SystemExit, match="control_hz is 20, but the file says 10"):
        main(["serve", *settings, "control_hz=20"])
    with pytest.raises(SystemExit, match="control_hz is -1"):
        main(["serve", *settings, "control_hz=-1"])
