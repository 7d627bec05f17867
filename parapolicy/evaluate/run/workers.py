"""Environments in this process or in worker processes. A failure in one costs only the episode that runs in it.

gymnasium's ``AsyncVectorEnv`` steps all its environments together and fails when one of them dies. Here each
environment has its own process and pipe. A process that dies closes its pipe, so nothing waits for it forever.
"""

import contextlib
import multiprocessing
import pickle
import signal
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
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
    _check(observation, 0.0)
    return [Transition(observation, frame=_frame(env, film))]


def execute(env: gymnasium.Env, actions: Sequence[np.ndarray], film: bool) -> list[Transition]:
    """Execute a chunk's actions (n, Da) one by one, until the episode is over."""
    done: list[Transition] = []
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action)
        _check(observation, float(reward))
        over, success = bool(terminated or truncated), bool(info.get("is_success", False))
        done.append(Transition(observation, float(reward), over, success, _frame(env, film)))
        if over:
            break
    return done


def _frame(env: gymnasium.Env, film: bool) -> np.ndarray | None:
    if not film:
        return None
    try:
        return np.asarray(env.render())
    except Exception as error:  # many kinds: from GL or the simulator
        warnings.warn(f"the environment cannot render, the run continues without pictures: {error}", stacklevel=2)
        return None


def _check(observation: Mapping[str, Any], reward: float) -> None:
    if not np.isfinite(reward):
        raise ValueError(f"its reward is {reward}, expected a finite number")
    for key, value in observation.items():
        value = np.asarray(value)
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise ValueError(f"its observation {key!r} holds {value[~np.isfinite(value)][0]}, expected finite numbers")


class EnvFailed(RuntimeError):
    """An environment raised an error, gave no answer in time, or gave numbers that are not finite."""


class WorkerDied(EnvFailed):
    """The process of an environment ended unexpectedly."""


def attempt(env: gymnasium.Env, function: Callable[..., list[Transition]], *arguments: Any) -> list[Transition]:
    """Return ``function(env, *arguments)``.

    Raises:
        EnvFailed: the environment raised an error.
    """
    try:
        return function(env, *arguments)
    except Exception as error:
        raise EnvFailed(f"the environment failed with {type(error).__name__}: {error}") from error


def close(env: gymnasium.Env) -> None:
    """Close an environment, and ignore errors of one that has failed."""
    with contextlib.suppress(Exception):
        env.close()


class EnvHandle(Protocol):
    """An environment in this process or in another one."""

    def submit(self, function: Callable[..., list[Transition]], *arguments: Any) -> None:
        """Request ``function(env, *arguments)``."""

    def receive(self) -> list[Transition]:
        """Return the result of the last request.

        Raises:
            EnvFailed: the environment failed.
            WorkerDied: the process ended before it answered.
            Exception: any error of building the environment.
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
        return attempt(self.env, function, *arguments)

    def close(self) -> None:
        close(self.env)


class ProcessEnv:
    """An environment in a worker process, which runs requests while this process continues.

    Args:
        make_env: builds the environment in the worker; :meth:`receive` raises its errors.
        timeout: seconds that a request may take; then the process is killed. None: no limit.
    """

    def __init__(self, make_env: Callable[[], gymnasium.Env], timeout: float | None = None) -> None:
        # Do not fork this process: it has threads and maybe a GPU. The fork server imports the modules once.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", __name__])
        self._timeout = timeout
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, cloudpickle.dumps(make_env)), daemon=True)
        self._process.start()
        theirs.close()

    def submit(self, function: Callable[..., list[Transition]], *arguments: Any) -> None:
        self._submitted = time.monotonic()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # receive() raises WorkerDied
            self._pipe.send((function, arguments))

    def receive(self) -> list[Transition]:
        left = None if self._timeout is None else max(0.0, self._submitted + self._timeout - time.monotonic())
        if not self._pipe.poll(left):
            self._process.kill()
            raise EnvFailed(f"the environment gave no answer within {self._timeout:g} s")
        try:
            kind, result = self._pipe.recv()
        except (EOFError, ConnectionResetError) as closed:
            self._process.join()
            code = self._process.exitcode or 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise WorkerDied(f"the process of its environment {how}") from closed
        if kind == "unbuilt":
            raise result
        if kind == "failed":
            raise EnvFailed(result)
        return list(result)

    def close(self) -> None:
        self._pipe.close()  # ends the process
        self._process.join(timeout=5)
        self._process.kill()


def _serve(pipe: Connection, pickled: bytes) -> None:
    """Answer requests until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and closes the pipe
    env: gymnasium.Env | None = None
    answer: tuple[str, Any] = ("unbuilt", None)
    try:
        env = pickle.loads(pickled)()
    except Exception as error:
        answer = ("unbuilt", _sendable(error))
    while True:
        try:
            function, arguments = pipe.recv()
        except (EOFError, ConnectionResetError):
            break
        try:
            if env is not None:
                answer = ("done", attempt(env, function, *arguments))
            pipe.send(answer)
        except EnvFailed as failure:
            pipe.send(("failed", str(failure)))
        except (BrokenPipeError, ConnectionResetError):
            break
        except Exception as error:  # a result that cannot be pickled
            pipe.send(("failed", f"the environment's result cannot be pickled: {error}"))
    if env is not None:
        env.close()


def _sendable(error: Exception) -> Exception:
    """The error, or a RuntimeError with its text if it cannot be pickled."""
    try:
        return error if isinstance(pickle.loads(pickle.dumps(error)), type(error)) else RuntimeError(str(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
