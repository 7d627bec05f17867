"""The websocket server: many connections, one policy, batched chunks."""

import asyncio
import contextlib
import hmac
import http
import ipaddress
import logging
import signal
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response
from websockets.protocol import State

from parapolicy.episode import Request
from parapolicy.errors import ObservationError
from parapolicy.loading import load_policy
from parapolicy.planner import made_up_observations
from parapolicy.policy import Policy
from parapolicy.serve.batcher import Batcher, DroppedError
from parapolicy.serve.connection import BoundedConnection
from parapolicy.serve.encoded_images import image_files
from parapolicy.serve.metrics import ServerMetrics
from parapolicy.serve.session import Session
from parapolicy.serve.settings import ServeConfig
from parapolicy.serve.wire import Limits, WireError, pack, unpack

log = logging.getLogger("parapolicy.serve")

CLOSE_S = 3.0  # at most, for closing connections after the last batch; the process must end within 5 s
_LONGEST_ERROR = 200  # characters; an error quotes the client's message


class PolicyServer:
    """Serves one policy to many clients by the openpi protocol.

    Each connection has one or more episodes, one after the other. Its messages are answered in order. Messages of
    different connections are computed together, each with the same result as if computed alone. ``GET /healthz`` and
    ``GET /metrics`` are answered on the same port.

    Args:
        policy: see :class:`parapolicy.serve.batcher.Batcher`.
        config: ``checkpoint``, ``sampler``, ``device`` and ``engine`` are ignored.

    Raises:
        ValueError: an observation key is also an option of messages, or the API key is not valid.
        OSError: the file of the API key cannot be read.
    """

    def __init__(self, policy: Policy, config: ServeConfig) -> None:
        spec = policy.spec
        self.policy, self.config, self.limits = policy, config, Limits.of(spec)
        self.pause_s = config.episode_pause_s or max(1.0, 4 * spec.n_action_steps / spec.require_control_hz())
        self._new_session()  # checks the policy's keys
        self._key = config.read_api_key()
        self._hosts = {"localhost", config.host.lower(), *(urlsplit(origin).hostname for origin in config.origins)}
        self.metrics = ServerMetrics()
        self.batcher = Batcher(policy, config.max_batch, config.deadline_ms, self.metrics)
        self._open: set[ServerConnection] = set()
        self._reader = ThreadPoolExecutor(
            1, "parapolicy-read"
        )  # unpacking and decoding must not block other connections

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Server]:
        """Listen while the context is open. At its end, accept no more connections, drop waiting requests, deliver the
        present batch and close every connection; this takes at most ``CLOSE_S`` after that batch."""
        compute = asyncio.create_task(self.batcher.run())
        config = self.config
        server: Server = await serve(
            self._converse,
            config.host,
            config.port,
            process_request=self._answer_http,
            create_connection=BoundedConnection,
            compression=None,
            max_size=config.max_message_bytes or self.limits.message_bytes,
            max_queue=1,  # messages sent before the last answer wait in the client's socket
            ping_interval=config.ping_interval,
            ping_timeout=config.ping_timeout,
            close_timeout=CLOSE_S / 2,
            logger=logging.getLogger("parapolicy.serve.websockets"),
        )
        try:
            yield server
        finally:
            server.close(close_connections=False)
            self.batcher.stop()
            await compute  # its clients' tasks wake before this one, so replies precede the close frames
            goodbyes = [asyncio.ensure_future(each.close(1001, "the server is closing")) for each in self._open]
            await asyncio.wait([*goodbyes, asyncio.ensure_future(server.wait_closed())], timeout=CLOSE_S)
            for connection in self._open:  # clients that do not read
                connection.transport.abort()
            self._reader.shutdown(wait=False, cancel_futures=True)

    def _new_session(self) -> Session:
        return Session(self.policy.spec, self.config.warm_start, self.pause_s)

    def describe(self) -> dict[str, Any]:
        """The metadata in the first frame of every connection."""
        spec = self.policy.spec
        return {
            "policy": "parapolicy",
            "observation": {key: list(feature.shape) for key, feature in spec.observation.items()},
            "n_obs_steps": spec.n_obs_steps,
            "obs_steps": {key: spec.obs_steps(key) for key in spec.observation},
            "kinds": {key: feature.kind for key, feature in spec.observation.items()},
            "image_files": image_files(spec),
            "n_action_steps": spec.n_action_steps,
            "action_horizon": spec.horizon - spec.executed.start,
            "action_dim": spec.action_dim,
            "control_hz": spec.control_hz,
            "history": (
                f"send the last {spec.n_obs_steps} control steps stacked (for each key its obs_steps), or one step at "
                "every control step with executed=1; one step alone is repeated for the whole history"
            ),
            "warm_start": self.config.warm_start,
            "episode_pause_s": self.pause_s,
        }

    def _answer_http(self, connection: ServerConnection, request: HttpRequest) -> Response | None:
        """Health, metrics and refusals; None lets the websocket handshake go on."""
        path = request.path.split("?")[0]
        refusal = self._refusal(connection, request.headers, path)
        if refusal is not None:
            status, text = refusal
            log.info("%s: refused: %d, %s", connection.remote_address, status, text)
            return connection.respond(status, f"{text}\n")
        if path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if path == "/metrics":
            headers = Headers({"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
            return Response(200, "OK", headers, self.metrics.text())
        return None

    def _refusal(self, connection: ServerConnection, headers: Headers, path: str) -> tuple[http.HTTPStatus, str] | None:
        """Why a request is refused; None: it is not. Web pages in a browser on this machine are refused by their origin
        and, if they give this machine's address to their own name (DNS rebinding), by the requested host."""
        hosts, origins, given = (headers.get_all(name) for name in ("Host", "Origin", "Authorization"))
        if ipaddress.ip_address(connection.local_address[0]).is_loopback and not (
            len(hosts) == 1 and self._is_own_name(hosts[0])
        ):
            named = sorted(filter(None, self._hosts))
            return http.HTTPStatus.FORBIDDEN, f"Host is {_short(hosts)}, expected an address or one of {named}"
        if any(origin not in self.config.origins for origin in origins):
            return (
                http.HTTPStatus.FORBIDDEN,
                f"Origin is {_short(origins)}, expected none, or one in the setting 'origins'",
            )
        if path == "/healthz":
            return None
        if self._key is not None:
            expected = f"Api-Key {self._key}".encode()
            if len(given) != 1 or not hmac.compare_digest(given[0].encode(errors="surrogateescape"), expected):
                return http.HTTPStatus.UNAUTHORIZED, "expected the header Authorization: Api-Key …"
        if path != "/metrics" and len(self._open) >= self.config.max_connections:
            return http.HTTPStatus.SERVICE_UNAVAILABLE, "all connections are in use"
        return None

    def _is_own_name(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return name in self._hosts or bool(ipaddress.ip_address(name))
        except ValueError:
            return False

    async def _converse(self, connection: ServerConnection) -> None:
        """One client, from its first frame to its last."""
        if len(self._open) >= self.config.max_connections:  # several handshakes may run at once
            await connection.close(1013, "all connections are in use")
            return
        self._open.add(connection)
        self.metrics.connections.set(len(self._open))
        try:
            await self._answer_messages(connection)
        except ConnectionClosed as closed:
            why = str(closed)
        except DroppedError as dropped:
            why = str(dropped)
            await connection.close(1001, why)
        except Exception as error:
            why = _short(f"{type(error).__name__}: {error}")
            self.metrics.requests.labels("error").inc()
            with contextlib.suppress(ConnectionClosed):
                await connection.send(why)
            await connection.close(1011, "error; see the last frame")
        finally:
            self._open.discard(connection)
            self.metrics.connections.set(len(self._open))
        log.info("%s: connection ended: %s", connection.remote_address, why)

    async def _answer_messages(self, connection: ServerConnection) -> None:
        """Answer until the connection ends. A refused message gets an error and does not end the connection."""
        session = self._new_session()
        await connection.send(pack(self.describe()))
        previous_ms: float | None = None
        replied = time.perf_counter()
        while True:
            message = await connection.recv()
            begin = time.perf_counter()
            try:
                request = await self._read(session, message, begin - replied)
                chunk = await self.batcher.infer(request, wanted=lambda: connection.state is State.OPEN)
            except (ObservationError, WireError, FloatingPointError) as error:  # FloatingPointError: of its actions
                text = _short(f"{type(error).__name__}: {error}")
                self.metrics.requests.labels("refused").inc()
                log.info("%s: refused: %s", connection.remote_address, text)
                await connection.send(text)
                replied = time.perf_counter()
                continue
            timing = {"infer_ms": 1e3 * (time.perf_counter() - begin)}
            if previous_ms is not None:
                timing["prev_total_ms"] = previous_ms
            policy_timing = {"infer_ms": 1e3 * chunk.stats.seconds}
            await connection.send(
                pack({**session.answer(chunk), "policy_timing": policy_timing, "server_timing": timing})
            )
            replied = time.perf_counter()
            previous_ms = 1e3 * (replied - begin)
            self.metrics.requests.labels("ok").inc()
            self.metrics.request_seconds.observe(replied - begin)

    async def _read(self, session: Session, message: str | bytes, silence_s: float) -> Request:
        """The request in a message."""
        if isinstance(message, str):
            raise WireError("the message is a text frame, expected a binary one")

        def read() -> Request:
            return session.request(unpack(message, self.limits), silence_s)

        return await asyncio.get_running_loop().run_in_executor(self._reader, read)


def _short(value: object) -> str:
    """A text to quote; the middle of a long one is left out."""
    text = str(value)
    half = _LONGEST_ERROR // 2 - 2
    return text if len(text) <= _LONGEST_ERROR else f"{text[:half]} … {text[-half:]}"


async def _serve_until_told(server: PolicyServer) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with server.running() as listening:
        host, port = listening.sockets[0].getsockname()[:2]
        print(f"serving on ws://{host}:{port}; health at http://{host}:{port}/healthz", flush=True)
        await stop.wait()
        print("closing", flush=True)


def run_server(config: ServeConfig) -> None:
    """Load the policy, run one chunk to warm up, and serve until SIGINT or SIGTERM.

    Raises:
        CheckpointError, ValueError: as :func:`parapolicy.load_policy` raises them.
        OSError: the port is taken, or the file of the API key cannot be read.
    """
    config.read_api_key()  # fail before the policy is loaded
    policy = load_policy(config.checkpoint, config.sampler, config.device, config.engine)
    if config.control_hz is not None:
        policy = replace(policy, spec=policy.spec.with_control_hz(config.control_hz))
    server = PolicyServer(policy, config)
    policy.predict(made_up_observations(policy, 1)[0])
    asyncio.run(_serve_until_told(server))
