"""A client of a policy server that reconnects after a lost connection, and a policy that is computed by a server.

It speaks the protocol of openpi's client. Needs the extra ``serve``.
"""

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from websockets.exceptions import InvalidHandshake, InvalidURI, WebSocketException
from websockets.sync.client import ClientConnection, connect

from parapolicy.episode import checked_actions
from parapolicy.policy import Chunk, ChunkStats
from parapolicy.serve.encoded_images import encode_images
from parapolicy.serve.wire import WireError, pack, unpack
from parapolicy.spec import Feature, PolicySpec
from parapolicy.warm import WarmState

MAX_REPLY_BYTES = 1 << 24


class PolicyClient:
    """One robot's connection to a policy server.

    If the connection is lost, or no answer arrives in time, it is closed, and ``infer`` raises ``ConnectionError``. The
    next ``infer`` connects again, with its own observation. An observation is never sent twice, because it would be
    old, and a late answer is never taken for the answer to another observation. The first message of each connection
    announces a new episode, so that the server does not join it with earlier observations.

    Not thread-safe.

    Args:
        uri: such as ``ws://127.0.0.1:8000``.
        api_key: if the server requires one.
        timeout: seconds, for an answer.
        connect_timeout: seconds, for a connection.
        jpeg_quality: 1 to 100: send uint8 images as JPEG files of this quality, if the server accepts them. They have a
            tenth of the bytes, for slow networks, but not exactly the camera's pixels. None: send arrays.

    Attributes:
        metadata: the server's metadata from the last connection; empty before the first, see :meth:`connect`.
        connections: number of connections made.

    Raises:
        ValueError: a timeout or ``jpeg_quality`` is out of range.
    """

    def __init__(
        self,
        uri: str,
        api_key: str | None = None,
        timeout: float = 10.0,
        connect_timeout: float = 3.0,
        jpeg_quality: int | None = None,
    ) -> None:
        for name, value in (("timeout", timeout), ("connect_timeout", connect_timeout)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}, expected a positive number of seconds")
        if jpeg_quality is not None and not 1 <= jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality is {jpeg_quality}, expected 1 to 100, or None for arrays")
        self.uri, self.timeout, self.connect_timeout, self.jpeg_quality = uri, timeout, connect_timeout, jpeg_quality
        self._headers = None if api_key is None else {"Authorization": f"Api-Key {api_key}"}
        self._open = contextlib.ExitStack()
        self._connection: ClientConnection | None = None
        self._options: dict[str, Any] = {}
        self.connections = 0
        self.metadata: dict[str, Any] = {}

    def connect(self) -> None:
        """Connect, unless connected.

        Raises:
            ConnectionError: the server cannot be reached.
            PermissionError: the server refuses this client.
            ValueError: ``uri`` is not a websocket URI.
        """
        if self._connection is not None:
            return
        end = time.monotonic() + self.connect_timeout
        try:
            self._connection = self._open.enter_context(
                connect(
                    self.uri,
                    compression=None,
                    max_size=MAX_REPLY_BYTES,
                    open_timeout=self.connect_timeout,
                    close_timeout=0.2,
                    additional_headers=self._headers,
                    proxy=None,
                )
            )
            self.metadata = self._receive(end - time.monotonic())
        except InvalidURI as error:
            raise ValueError(f"uri is {self.uri!r}, expected ws://host:port") from error
        except InvalidHandshake as error:
            self.close()
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status in (401, 403):
                raise PermissionError(f"{self.uri} refuses this client: {error}; check api_key") from error
            raise ConnectionError(f"{self.uri} refuses the connection: {error}") from error
        except (OSError, WebSocketException, WireError, RuntimeError) as error:
            self.close()
            raise ConnectionError(f"{self.uri} cannot be reached: {error or type(error).__name__}") from error
        self.connections += 1
        self._options = {**self._options, "reset": True}

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """The server's answer to an observation, or to a stacked history; ``actions`` are (n, Da).

        Raises:
            ConnectionError: the connection was lost or could not be made; call again with a new observation.
            RuntimeError: the server refused the observation, with its reason; the connection stays open.
        """
        self.connect()
        assert self._connection is not None  # otherwise connecting has raised
        if self.jpeg_quality is not None:
            observation = encode_images(observation, self.metadata.get("image_files", {}), self.jpeg_quality)
        try:
            self._connection.send(pack({**observation, **self._options}))
            answer = self._receive(self.timeout)
        except (OSError, WebSocketException, WireError) as error:
            self.close()
            raise ConnectionError(f"the connection to {self.uri} is lost: {error or type(error).__name__}") from error
        if not isinstance(answer.get("actions"), np.ndarray):
            self.close()
            raise ConnectionError(f"{self.uri} answered without actions, expected a policy server")
        self._options = {}
        return answer

    def reset(self, seed: int | None = None) -> None:
        """Announce a new episode with the next observation, with noise of ``seed`` if given."""
        self._options = {"reset": True} if seed is None else {"reset": True, "seed": seed}

    def close(self) -> None:
        """Close the connection, if any; ``infer`` opens a new one."""
        self._connection = None
        self._open.close()

    def __enter__(self) -> "PolicyClient":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _receive(self, timeout: float) -> dict[str, Any]:
        """The next frame, unpacked."""
        assert self._connection is not None
        frame = self._connection.recv(timeout=max(timeout, 0.001))
        if isinstance(frame, str):
            raise RuntimeError(f"the server answered: {frame}")
        message = unpack(frame)
        if not isinstance(message, dict):
            raise WireError(f"the server answered with a {type(message).__name__}, expected a map")
        return message


class RemotePolicy:
    """A policy computed by a server, for :class:`parapolicy.Controller`, whose chunks bridge network stalls.

    An asynchronous controller requests the next chunk while it executes the previous one. While the network stalls, it
    continues with that chunk to its end, and counts this. A lost connection appears to it as a failed computation.

    Args:
        client: connects here, to get the policy's description.
        control_hz: the policy's control rate, if the server does not say it.

    Raises:
        ConnectionError, PermissionError: as :meth:`PolicyClient.connect`.
        ValueError: the server does not describe its policy.
    """

    def __init__(self, client: PolicyClient, control_hz: float | None = None) -> None:
        client.connect()
        self.client, self.spec = client, described_spec(client.metadata, control_hz)

    def predict(
        self,
        observation: Mapping[str, Any],
        *,
        seed: int = 0,
        deadline: Callable[[], bool] | None = None,
        warm: WarmState | None = None,
        executed: int | None = None,
    ) -> Chunk:
        """The chunk of a stacked history. The server decides about noise, deadline and warm starts.

        Raises:
            ConnectionError, RuntimeError: as :meth:`PolicyClient.infer`.
            ValueError, FloatingPointError: the answer is not a chunk of the policy.
        """
        begin = time.perf_counter()
        answer = self.client.infer(observation)
        seconds = time.perf_counter() - begin
        numbers = {name: answer.get(name) for name in ("rounds", "residual", "complete")}
        if any(not isinstance(value, int | float) for value in numbers.values()):
            raise ValueError(f"the server's answer has {numbers}, expected numbers")
        stats = ChunkStats(
            rounds=int(numbers["rounds"] or 0),
            evaluations=0,
            residual=float(numbers["residual"] or 0.0),
            complete=bool(numbers["complete"]),
            error=None,
            rejections=None,
            stages={},
            seconds=seconds,
        )
        actions = np.asarray(answer["actions"], np.float32)
        chunk = Chunk(actions[: self.spec.n_action_steps], actions, stats, _NOTHING)
        checked_actions(chunk, self.spec)
        return chunk

    def reset(self, seed: int | None = None) -> None:
        """Announce a new episode to the server; reset the controller as well."""
        self.client.reset(seed)


_NOTHING = WarmState(torch.empty(0), torch.empty(0))  # the server keeps the warm state


def described_spec(metadata: Mapping[str, Any], control_hz: float | None = None) -> PolicySpec:
    """The spec that a controller needs, from a server's first frame.

    Raises:
        ValueError: the frame does not describe a policy.
    """
    try:
        steps, kinds = metadata["obs_steps"], metadata["kinds"]
        observation = {
            key: Feature(tuple(shape), kinds[key], steps[key]) for key, shape in metadata["observation"].items()
        }
        return PolicySpec(
            observation=observation,
            n_obs_steps=metadata["n_obs_steps"],
            horizon=metadata["action_horizon"],
            n_action_steps=metadata["n_action_steps"],
            action_dim=metadata["action_dim"],
            network={},
            scheduler={},
            control_hz=metadata["control_hz"] if control_hz is None else control_hz,
            first_action=0,  # a server's actions begin with the present step
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the server does not describe its policy ({type(error).__name__}: {error}); expected parapolicy serve"
        ) from error
