"""The server's metrics, in Prometheus' text format."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from parapolicy.policy import ChunkStats

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_ROUNDS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 15, 20, 30, 50, 100)


class ServerMetrics:
    """The metrics of one server, in its own registry."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.connections = Gauge("parapolicy_connections", "Open connections", registry=registry)
        self.requests = Counter(
            "parapolicy_requests", "Messages by result: ok, refused or error", ["result"], registry=registry
        )
        self.incomplete = Counter("parapolicy_incomplete", "Chunks that a deadline cut short", registry=registry)
        self.request_seconds = self._histogram("request_seconds", "From a message to its reply", _SECONDS)
        self.batch_seconds = self._histogram("batch_seconds", "Time to compute a batch of chunks", _SECONDS)
        self.batch_size = self._histogram("batch_size", "Chunks per batch", (1, 2, 4, 8, 16, 32, 64))
        self.rounds = self._histogram("rounds", "Rounds per chunk", _ROUNDS)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"parapolicy_{name}", text, registry=self._registry, buckets=buckets)

    def batch(self, chunks: Sequence[ChunkStats]) -> None:
        """Count the chunks of a computed batch."""
        self.batch_size.observe(len(chunks))
        self.batch_seconds.observe(chunks[0].seconds)
        for stats in chunks:
            self.rounds.observe(stats.rounds)
            if not stats.complete:
                self.incomplete.inc()

    def text(self) -> bytes:
        """All metrics, for ``GET /metrics``."""
        return generate_latest(self._registry)
