"""Who is let in: API keys, browsers' origins and hosts, the number of connections."""

import http.client
import urllib.error
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus

from parapolicy.policy import Policy
from parapolicy.serve.settings import KEY_VARIABLE, ServeConfig
from tests.helpers import some_observation
from tests.serving import Running, infer, running, served_policy

KEY = {"Authorization": "Api-Key s3cret"}


@pytest.fixture(scope="module")
def policy() -> Policy:
    return served_policy()


def refusal(server: Running, **options: Any) -> int:
    with pytest.raises(InvalidStatus) as refused:
        server.connect(**options)
    return int(refused.value.response.status_code)


def test_health_is_open_the_rest_needs_the_key(policy: Policy) -> None:
    with running(policy, api_key="s3cret", max_connections=1) as server:
        assert server.get("/healthz") == "OK\n"
        wrong = {"Authorization": "Api-Key wr\u00f6ng"}
        assert refusal(server) == refusal(server, additional_headers=wrong) == 401
        with server.connect(additional_headers=KEY) as client:
            client.recv()
            infer(client, some_observation(policy.spec))
            text = server.get("/metrics", **KEY)
            assert "parapolicy_connections 1.0" in text
            assert 'parapolicy_requests_total{result="ok"} 1.0' in text
            assert "parapolicy_rounds_bucket" in text
            assert refusal(server, additional_headers=KEY) == 503
        for path, headers in (("/metrics", {}), ("/metrics", wrong), ("/elsewhere", KEY)):
            with pytest.raises(urllib.error.HTTPError):
                server.get(path, **headers)


def test_web_pages_are_kept_out(policy: Policy) -> None:
    with running(policy, origins=["https://robot.example"]) as server:
        assert refusal(server, origin="https://evil.example") == refusal(server, origin="null") == 403
        with pytest.raises(urllib.error.HTTPError, match="403"):
            server.get("/metrics", Origin="https://evil.example")
        with server.connect(origin="https://robot.example") as client:
            client.recv()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("0.0.0.0:8000", 200),  # where openpi-client connects by default
        ("robot.example", 200),
        ("evil.example:8000", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1@evil.example", 403),
        ("[evil", 403),
        ("", 403),
    ],
)
def test_a_name_that_points_at_this_machine_is_not_enough(policy: Policy, host: str, status: int) -> None:
    """DNS rebinding: a page of evil.example, whose name was given the address 127.0.0.1."""
    with running(policy, origins=["https://robot.example"]) as server:
        request = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        request.request("GET", "/metrics", headers={"Host": host})
        assert request.getresponse().status == status


def test_the_key_comes_from_a_setting_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    file = tmp_path / "key"
    file.write_text("from-file\n")
    assert ServeConfig().read_api_key() is None
    monkeypatch.setenv(KEY_VARIABLE, "from-environment")
    assert ServeConfig().read_api_key() == "from-environment"
    assert ServeConfig(api_key_file=str(file)).read_api_key() == "from-file"
    assert ServeConfig(api_key="given").read_api_key() == "given"
    for text in ("", "\n", "two\nlines", "schl\u00fcssel"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"the file '.*' holds \d+ characters that are not a valid key"):
            ServeConfig(api_key_file=str(file)).read_api_key()
    monkeypatch.setenv(KEY_VARIABLE, "")
    with pytest.raises(ValueError, match=f"{KEY_VARIABLE} holds 0 characters"):
        ServeConfig().read_api_key()
    with pytest.raises(OSError, match="nowhere"):
        ServeConfig(api_key_file="nowhere").read_api_key()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_batch": 0}, "max_batch is 0"),
        ({"max_message_bytes": 0}, "max_message_bytes is 0"),
        ({"deadline_ms": 0.0}, "deadline_ms is 0.0"),
        ({"episode_pause_s": float("nan")}, "episode_pause_s is nan"),
        ({"ping_timeout": -1.0}, "ping_timeout is -1.0"),
        ({"api_key": "a", "api_key_file": "b"}, "both given"),
    ],
)
def test_bad_settings_are_named(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServeConfig(**settings)
