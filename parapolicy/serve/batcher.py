"""Batching of many clients' requests: one thread computes all waiting requests together."""

import asyncio
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from parapolicy.episode import Request, group_requests, predict_together
from parapolicy.policy import Chunk, Policy
from parapolicy.serve.metrics import ServerMetrics


class DroppedError(Exception):
    """A request that will not be computed: its client has disconnected, or the server is closing."""


@dataclass(frozen=True)
class _Waiting:
    request: Request
    wanted: Callable[[], bool]
    future: asyncio.Future[Chunk]


class Batcher:
    """Answers each request with the same chunk as if it were computed alone.

    Args:
        policy: run with ``reproducible=True``.
        max_batch: most requests per batch.
        deadline_ms: time for a batch; sampling ends after the round in which it has passed. None: no deadline.
        metrics: counts batches.
    """

    def __init__(self, policy: Policy, max_batch: int, deadline_ms: float | None, metrics: ServerMetrics) -> None:
        self.policy = dataclasses.replace(policy, reproducible=True)
        self.max_batch, self.deadline_ms, self.metrics = max_batch, deadline_ms, metrics
        self._thread = ThreadPoolExecutor(1, "parapolicy-infer")
        self._waiting: deque[_Waiting] = deque()
        self._changed = asyncio.Event()
        self._stopped = False

    async def infer(self, request: Request, wanted: Callable[[], bool] = lambda: True) -> Chunk:
        """The chunk of one request.

        Args:
            request: from an episode.
            wanted: whether its client is still connected; called when the batch begins.

        Raises:
            DroppedError: it was not wanted, or :meth:`stop` was called before its batch began.
            Exception: any error of its computation.
        """
        if self._stopped:
            raise DroppedError("the server is closing")
        future: asyncio.Future[Chunk] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(request, wanted, future))
        self._changed.set()
        return await future

    def stop(self) -> None:
        """Drop waiting requests; :meth:`run` ends after the present batch."""
        self._stopped = True
        while self._waiting:
            self._waiting.popleft().future.set_exception(DroppedError("the server is closing"))
        self._changed.set()

    async def run(self) -> None:
        """Compute batches until stopped."""
        loop = asyncio.get_running_loop()
        try:
            while not self._stopped:
                batch = self._take()
                if not batch:
                    self._changed.clear()
                    await self._changed.wait()
                    continue
                outcomes = await loop.run_in_executor(self._thread, self._compute, [entry.request for entry in batch])
                for entry, outcome in zip(batch, outcomes, strict=True):
                    if isinstance(outcome, Exception):
                        entry.future.set_exception(outcome)
                    else:
                        entry.future.set_result(outcome)
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _take(self) -> list[_Waiting]:
        """The next batch, without the requests of disconnected clients."""
        batch: list[_Waiting] = []
        while self._waiting and len(batch) < self.max_batch:
            entry = self._waiting.popleft()
            if entry.wanted():
                batch.append(entry)
            else:
                entry.future.set_exception(DroppedError("the client has disconnected"))
        return batch

    def _compute(self, requests: Sequence[Request]) -> list[Chunk | Exception]:
        """Each request's chunk, or its own error."""
        outcomes: dict[int, Chunk | Exception] = {}
        for members in group_requests(requests):
            try:
                chunks = self._predict([requests[i] for i in members])
                outcomes |= dict(zip(members, chunks, strict=True))
            except Exception as error:
                if len(members) == 1:
                    outcomes[members[0]] = error
                    continue
                for i in members:  # compute one by one: a bad element must not fail the others
                    (outcomes[i],) = self._compute([requests[i]])
        return [outcomes[i] for i in range(len(requests))]

    def _predict(self, requests: Sequence[Request]) -> list[Chunk]:
        deadline = None if self.deadline_ms is None else time.monotonic() + self.deadline_ms / 1e3
        chunks = predict_together(self.policy, requests, deadline)
        self.metrics.batch([chunk.stats for chunk in chunks])
        return chunks
