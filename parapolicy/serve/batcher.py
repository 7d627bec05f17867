"""Requests of many clients, computed together: one thread, one batch of whatever waits when it is free."""

import asyncio
import dataclasses
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from parapolicy.episode import Request, group_requests, predict_together
from parapolicy.policy import Chunk, Policy
from parapolicy.serve.metrics import ServerMetrics


class Batcher:
    """Answers each request with the chunk it would get alone.

    Args:
        policy: run with ``reproducible=True``.
        max_batch: most requests per batch.
        deadline_ms: time for a batch; sampling ends after the round in which it has passed.
        metrics: counts batches.
    """

    def __init__(self, policy: Policy, max_batch: int, deadline_ms: float | None, metrics: ServerMetrics) -> None:
        self.policy = dataclasses.replace(policy, reproducible=True)
        self.max_batch, self.deadline_ms, self.metrics = max_batch, deadline_ms, metrics
        self._thread = ThreadPoolExecutor(1, "parapolicy-infer")
        self._waiting: asyncio.Queue[tuple[Request, asyncio.Future[Chunk]]] = asyncio.Queue()

    async def infer(self, request: Request) -> Chunk:
        """The chunk of one request; raises what computing it raised."""
        future: asyncio.Future[Chunk] = asyncio.get_running_loop().create_future()
        await self._waiting.put((request, future))
        return await future

    async def run(self) -> None:
        """Compute batches until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                batch = [await self._waiting.get()]
                while not self._waiting.empty() and len(batch) < self.max_batch:
                    batch.append(self._waiting.get_nowait())
                outcomes = await loop.run_in_executor(self._thread, self._compute, [request for request, _ in batch])
                for (_, future), outcome in zip(batch, outcomes, strict=True):
                    if future.done():  # its client has gone
                        continue
                    if isinstance(outcome, Exception):
                        future.set_exception(outcome)
                    else:
                        future.set_result(outcome)
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _compute(self, requests: Sequence[Request]) -> list[Chunk | Exception]:
        """Each request's chunk, or what went wrong with it alone."""
        outcomes: dict[int, Chunk | Exception] = {}
        for members in group_requests(requests):
            try:
                chunks = self._predict([requests[i] for i in members])
                outcomes |= dict(zip(members, chunks, strict=True))
            except Exception as error:
                if len(members) == 1:
                    outcomes[members[0]] = error
                    continue
                for i in members:  # one bad element must not take the others with it
                    (outcomes[i],) = self._compute([requests[i]])
        return [outcomes[i] for i in range(len(requests))]

    def _predict(self, requests: Sequence[Request]) -> list[Chunk]:
        deadline = None if self.deadline_ms is None else time.monotonic() + self.deadline_ms / 1e3
        chunks = predict_together(self.policy, requests, deadline)
        self.metrics.batch([chunk.stats for chunk in chunks])
        return chunks
