"""Where an environment runs: in this process, or in one of its own, whose death costs only the episode in it.

gymnasium's ``AsyncVectorEnv`` steps all its environments together and is over when one of them dies; here each has a
process and a pipe of its own. A process that dies closes its pipe, so that nothing ever waits for it.
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
    """What one control step, or a reset, gives.

    Attributes:
        observation: after it.
        reward: of the step.
        over: whether the episode has ended.
        success: whether the environment reports success.
        frame: the scene after it, where it is filmed.
    """

    observation: dict[str, np.ndarray]
    reward: float = 0.0
    over: bool = False
    success: bool = False
    frame: np.ndarray | None = None


def reset(env: gymnasium.Env, seed: int, film: bool) -> list[Transition]:
    """Begin an episode."""
    observation, _ = env.reset(seed=seed)
    return [Transition(observation, frame=_frame(env, film))]


def execute(env: gymnasium.Env, actions: Sequence[np.ndarray], film: bool) -> list[Transition]:
    """Run a chunk's actions one by one, until the episode is over."""
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
    """The process of an environment has ended by itself."""


class Place(Protocol):
    """An environment, wherever it runs."""

    def submit(self, function: Callable[..., list[Transition]], *arguments: Any) -> None:
        """Have ``function(env, *arguments)`` run."""

    def receive(self) -> list[Transition]:
        """What the function submitted last gives, or raises.

        Raises:
            WorkerDied: the process ended before it.
        """

    def close(self) -> None:
        """Close the environment."""


class Here:
    """An environment in this process; what is submitted runs when it is asked for."""

    def __init__(self, make_env: Callable[[], gymnasium.Env]) -> None:
        self.env = make_env()

    def submit(self, function: Callable[..., list[Transition]], *arguments: Any) -> None:
        self._call = function, arguments

    def receive(self) -> list[Transition]:
        function, arguments = self._call
        return function(self.env, *arguments)

    def close(self) -> None:
        self.env.close()


class Worker:
    """An environment in a process of its own, which runs what is submitted while this one goes on.

    Args:
        make_env: builds the environment, over there; its own errors come from :meth:`receive`.
    """

    def __init__(self, make_env: Callable[[], gymnasium.Env]) -> None:
        # Not forked from here: this process has threads and maybe a GPU. The server imports what they need, once.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", __name__])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, cloudpickle.dumps(make_env)), daemon=True)
        self._process.start()
        theirs.close()

    def submit(self, function: Callable[..., list[Transition]], *arguments: Any) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # receive() tells
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
        self._pipe.close()  # which ends it
        self._process.join(timeout=5)
        self._process.kill()


def _serve(pipe: Connection, pickled: bytes) -> None:
    """A worker's life: it ends when the pipe does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it closes the pipe
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
