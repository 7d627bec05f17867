"""The websocket server: connections in, batches through one policy, replies out."""

import asyncio
import contextlib
import hmac
import http
import logging
import signal
import time
from dataclasses import dataclass
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response

from parapolicy.loading import load_policy
from parapolicy.planner import made_up_observations
from parapolicy.policy import Policy
from parapolicy.serve.batcher import Batcher
from parapolicy.serve.metrics import ServerMetrics
from parapolicy.serve.session import Session
from parapolicy.serve.wire import pack, unpack

log = logging.getLogger("parapolicy.serve")


@dataclass
class ServeConfig:
    """Settings of ``parapolicy serve``, each given as ``key=value``.

    Attributes:
        checkpoint: the policy folder.
        host, port: where to listen; 0.0.0.0 for every network, port 0 for any free one.
        sampler, device, engine: see :func:`parapolicy.load_policy`.
        warm_start: start each chunk of an episode from the one before.
        deadline_ms: time for a batch of chunks; None: none.
        api_key: asked of clients as ``Authorization: Api-Key …``; None: none is asked.
        max_batch: most clients computed together.
        max_connections: further ones are refused with 503.
        max_message_bytes: longer messages close their connection.
    """

    checkpoint: str = "checkpoints/pusht_lowdim"
    host: str = "127.0.0.1"
    port: int = 8000
    sampler: str = "secant"
    device: str = "auto"
    engine: str = "eager"
    warm_start: bool = False
    deadline_ms: float | None = None
    api_key: str | None = None
    max_batch: int = 16
    max_connections: int = 64
    max_message_bytes: int = 16 * 2**20


class PolicyServer:
    """Serves one policy to many clients by the openpi protocol.

    Each connection is an episode. Its messages are answered one after the other; those of different connections are
    computed together, each to the result that it would have alone. ``GET /healthz`` and ``GET /metrics`` are answered
    on the same port.

    Args:
        policy: see :class:`parapolicy.serve.batcher.Batcher`.
        config: ``checkpoint``, ``sampler``, ``device`` and ``engine`` are not looked at.
    """

    def __init__(self, policy: Policy, config: ServeConfig) -> None:
        if config.deadline_ms is not None and not config.deadline_ms > 0:
            raise ValueError(f"deadline_ms is {config.deadline_ms}, expected a positive number, or null for none")
        for name in ("max_batch", "max_connections", "max_message_bytes"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name} is {getattr(config, name)}, expected at least 1")
        Session(policy.spec, config.warm_start)  # the policy's keys fit
        self.policy, self.config = policy, config
        self.metrics = ServerMetrics()
        self.batcher = Batcher(policy, config.max_batch, config.deadline_ms, self.metrics)
        self._connections = 0

    @contextlib.asynccontextmanager
    async def running(self) -> Any:
        """The server listens; at the end it finishes what it is computing and closes every connection."""
        compute = asyncio.create_task(self.batcher.run())
        server: Server = await serve(
            self._converse,
            self.config.host,
            self.config.port,
            process_request=self._answer_http,
            compression=None,
            max_size=self.config.max_message_bytes,
            max_queue=4,  # a client that floods waits in its own socket
            logger=logging.getLogger("parapolicy.serve.websockets"),
        )
        try:
            yield server
        finally:
            server.close()
            await server.wait_closed()
            compute.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await compute

    def describe(self) -> dict[str, Any]:
        """The first frame of every connection."""
        spec = self.policy.spec
        return {
            "policy": "parapolicy",
            "observation": {key: list(feature.shape) for key, feature in spec.observation.items()},
            "n_obs_steps": spec.n_obs_steps,
            "n_action_steps": spec.n_action_steps,
            "action_horizon": spec.horizon - spec.n_obs_steps + 1,
            "action_dim": spec.action_dim,
            "control_hz": spec.control_hz,
        }

    def _answer_http(self, connection: ServerConnection, request: HttpRequest) -> Response | None:
        """Health, metrics and refusals; None lets the websocket handshake go on."""
        path = request.path.split("?")[0]
        if path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if path == "/metrics":
            headers = Headers({"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
            return Response(200, "OK", headers, self.metrics.text())
        expected = self.config.api_key
        if expected is not None:
            given = request.headers.get_all("Authorization")
            if len(given) != 1 or not hmac.compare_digest(given[0].encode(), f"Api-Key {expected}".encode()):
                return connection.respond(
                    http.HTTPStatus.UNAUTHORIZED, "expected the header Authorization: Api-Key …\n"
                )
        if self._connections >= self.config.max_connections:
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "all connections are taken\n")
        return None

    async def _converse(self, connection: ServerConnection) -> None:
        """One client, from its first frame to its last."""
        self._connections += 1
        self.metrics.connections.set(self._connections)
        session = Session(self.policy.spec, self.config.warm_start)
        previous_ms: float | None = None
        try:
            await connection.send(pack(self.describe()))
            async for message in connection:
                begin = time.perf_counter()
                try:
                    reply = await self._reply(session, message, previous_ms)
                except Exception as error:
                    self.metrics.requests.labels("error").inc()
                    log.info("%s: %s: %s", connection.remote_address, type(error).__name__, error)
                    await connection.send(f"{type(error).__name__}: {error}")
                    await connection.close(1011, "error; the last frame tells it")
                    return
                await connection.send(reply)
                seconds = time.perf_counter() - begin
                previous_ms = 1e3 * seconds
                self.metrics.requests.labels("ok").inc()
                self.metrics.request_seconds.observe(seconds)
        except ConnectionClosed:
            pass  # a client may leave at any time
        finally:
            self._connections -= 1
            self.metrics.connections.set(self._connections)

    async def _reply(self, session: Session, message: str | bytes, previous_ms: float | None) -> bytes:
        begin = time.perf_counter()
        if isinstance(message, str):
            raise ValueError("the message is a text frame, expected a binary one")
        chunk = await self.batcher.infer(session.request(unpack(message)))
        timing = {"infer_ms": 1e3 * (time.perf_counter() - begin)}
        if previous_ms is not None:
            timing["prev_total_ms"] = previous_ms
        policy_timing = {"infer_ms": 1e3 * chunk.stats.seconds}
        return pack({**session.answer(chunk), "policy_timing": policy_timing, "server_timing": timing})


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
        OSError: the port is taken.
    """
    policy = load_policy(config.checkpoint, config.sampler, config.device, config.engine)
    server = PolicyServer(policy, config)
    policy.predict(made_up_observations(policy, 1)[0])
    asyncio.run(_serve_until_told(server))
