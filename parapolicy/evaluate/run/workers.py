"""Environments in this process or in worker processes. The death of a worker costs only the episode that ran in it.

gymnasium's ``AsyncVectorEnv`` steps all its environments together and fails when one of them dies. Here each
environment has its own process and pipe. A process that dies closes its pipe, so nothing waits for it forever.
"""

import contextlib
import multiprocessing
import pickle
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import cloudpickle
import gymnasium
import numpy as np


@dataclass(frozen=True)
class Transition:
    """The outcome of one control step or of a reset.

    Attributes:
        observation: after the step.
        reward: of the step; 0 for a reset.
        over: whether the episode has ended.
        success: whether the environment reports success.
        frame: the rendered scene after the step, (H, W, 3) uint8; None unless the episode is filmed.
    """

    observation: dict[str, np.ndarray]
    reward: float = 0.0
    over: bool = False
    success: bool = False
    frame: np.ndarray | None = None


def reset(env: gymnasium.Env, seed: int, film: bool) -> list[Transition]:
    """Start an episode."""
    observation, _ = env.reset(seed=seed)
    return [Transition(observation, frame=_frame(env, film))]


def execute(env: gymnasium.Env, actions: Sequence[np.ndarray], film: bool) -> list[Transition]:
    """Execute a chunk's actions (n, Da) one by one, until the episode is over."""
    done: list[Transition] = []
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action)
        over, success = bool(terminated or truncated), bool(info.get("is_success", False))
        done.append(Transition(observation, float(reward), over, success, _frame(env, film)))
        if over:
            break
    return done


def _frame(env: gymnasium.Env, film: bool) -> np.ndarray | None:
    return np.asarray(env.render()) if film else None


class WorkerDied(RuntimeError):
    """The process of an environment ended unexpectedly."""


class EnvHandle(Protocol):
    """An environment in this process or in another one."""

    def submit(self, function: Callable[..., list[Transition]], *arguments: Any) -> None:
        """Request ``function(env, *arguments)``."""

    def receive(self) -> list[Transition]:
        """Return the result of the last request, or raise its error.

        Raises:
            WorkerDied: the process ended before it answered.
        """

    def close(self) -> None:
        """Close the environment."""


class LocalEnv:
    """An environment in this process; a request runs when its result is received."""

    def __init__(self, make_env: Callable[[], gymnasium.Env]) -> None:
        self.env = make_env()

    def submit(self, function: Callable[..., list[Transition]], *arguments: Any) -> None:
        self._call = function, arguments

    def receive(self) -> list[Transition]:
        function, arguments = self._call
        return function(self.env, *arguments)

    def close(self) -> None:
        self.env.close()


class ProcessEnv:
    """An environment in a worker process, which runs requests while this process continues.

    Args:
        make_env: builds the environment in the worker; :meth:`receive` raises its errors.
    """

    def __init__(self, make_env: Callable[[], gymnasium.Env]) -> None:
        # Do not fork this process: it has threads and maybe a GPU. The fork server imports the modules once.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", __name__])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, cloudpickle.dumps(make_env)), daemon=True)
        self._process.start()
        theirs.close()

    def submit(self, function: Callable[..., list[Transition]], *arguments: Any) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # receive() raises WorkerDied
            self._pipe.send((function, arguments))

    def receive(self) -> list[Transition]:
        try:
            result, error = self._pipe.recv()
        except (EOFError, ConnectionResetError) as closed:
            self._process.join()
            code = self._process.exitcode or 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise WorkerDied(f"the process of its environment {how}") from closed
        if error is not None:
            raise error
        return list(result)

    def close(self) -> None:
        self._pipe.close()  # ends the process
        self._process.join(timeout=5)
        self._process.kill()


def _serve(pipe: Connection, pickled: bytes) -> None:
    """Answer requests until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and closes the pipe
    env, failure = None, None
    try:
        env = pickle.loads(pickled)()
    except Exception as error:
        failure = error
    while True:
        try:
            function, arguments = pipe.recv()
        except (EOFError, ConnectionResetError):
            break
        result = None
        if env is not None:
            try:
                result, failure = function(env, *arguments), None
            except Exception as error:
                failure = error
        try:
            pipe.send((result, failure))
        except (BrokenPipeError, ConnectionResetError):
            break
        except Exception:  # an error that cannot be pickled
            pipe.send((None, RuntimeError(f"{type(failure).__name__}: {failure}")))
    if env is not None:
        env.close()
