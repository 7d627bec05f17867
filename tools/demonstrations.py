"""Files of scripted demonstrations in robomimic's layout; an interrupted collection goes on."""

import argparse
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from tqdm import tqdm

from parapolicy.noise import mix_seeds

VALID_SHARE = 0.1  # of the demonstrations, in robomimic's validation split mask/valid
Attempt = Callable[[int], tuple[bool, dict[str, np.ndarray]]]  # seed -> whether it succeeded, arrays over its steps
Generate = Callable[[str, Path, int, int], tuple[int, list[int]]]


class Recording:
    """The steps of an attempt, with the names of a robomimic file.

    Attributes:
        success: whether the last step ended in success.
    """

    def __init__(self) -> None:
        self.success = False
        self._rows: dict[str, list[Any]] = {}

    def step(
        self, env: gymnasium.Env, observation: Mapping[str, np.ndarray], action: np.ndarray, state: np.ndarray
    ) -> tuple[dict[str, np.ndarray], bool]:
        """Take an action, and keep it with the observation and the simulator's state before it.

        Returns:
            The next observation, and whether the episode is over.
        """
        row: dict[str, Any] = {"actions": action, "states": state}
        row |= {f"obs/{key}": value for key, value in observation.items()}
        following, reward, self.success, truncated, _ = env.step(action)
        for name, value in (row | {"rewards": reward, "dones": int(self.success)}).items():
            self._rows.setdefault(name, []).append(value)
        return following, self.success or truncated

    def arrays(self) -> dict[str, np.ndarray]:
        """name -> (T, …)."""
        return {name: np.asarray(values) for name, values in self._rows.items()}


def check(output: Path, demonstrations: int) -> None:
    """Refuse what :func:`collect` cannot do.

    Raises:
        ValueError: the file exists, or there are too few demonstrations.
    """
    if output.exists():
        raise ValueError(f"{output} exists; give another name, or delete it to write it anew")
    if demonstrations < 2:
        raise ValueError(f"demonstrations is {demonstrations}, expected at least 2: some are held out")


def collect(
    attempt: Attempt, task: str, output: Path, demonstrations: int, seed: int, about: Mapping[str, Any], doubt: str
) -> tuple[int, list[int]]:
    """Write the first successful attempts as a robomimic HDF5 file.

    Args:
        attempt: called with ``mix_seeds(seed, n)`` for attempt n.
        task: its name.
        output: the file; ``output.parts`` has the attempts until it is complete.
        demonstrations: their number.
        seed: of the attempts.
        about: the file's ``env_args``.
        doubt: a question for whoever sees most attempts fail.

    Returns:
        The number of attempts, and the demonstrations' lengths.

    Raises:
        RuntimeError: more than half of the attempts failed.
    """
    parts = output.with_name(f"{output.name}.parts") / f"{task}-{seed}"  # other settings use other folders
    parts.mkdir(parents=True, exist_ok=True)
    done: list[tuple[int, Path]] = []
    number = 0
    with tqdm(total=demonstrations, desc=task, unit="demo") as bar:
        while len(done) < demonstrations:
            path, own = parts / f"{number}.npz", mix_seeds(seed, number)
            if not path.is_file():
                success, arrays = attempt(own)
                partial = path.with_suffix(".partial")
                kept: dict[str, Any] = dict(arrays) if success else {}
                with partial.open("wb") as file:
                    np.savez_compressed(file, **kept)
                partial.replace(path)
            with np.load(path) as stored:
                if stored.files:
                    done.append((own, path))
                    bar.update()
            number += 1
            bar.set_postfix(attempts=number)
            if number >= 20 and len(done) < number / 2:
                raise RuntimeError(f"of {number} attempts at {task} only {len(done)} succeeded; {doubt}")
    lengths = _assemble(done, output, seed, about)
    shutil.rmtree(parts.parent)
    return number, lengths


def _assemble(done: list[tuple[int, Path]], output: Path, seed: int, about: Mapping[str, Any]) -> list[int]:
    """Write the attempts as one file; returns the lengths of the demonstrations."""
    import h5py

    lengths = []
    partial = output.with_name(f".{output.name}.partial")
    with h5py.File(partial, "w") as file:
        for number, (own, path) in enumerate(done):
            with np.load(path) as arrays:
                for key in arrays.files:
                    file[f"data/demo_{number}/{key}"] = arrays[key]
                lengths.append(len(arrays["actions"]))
            file[f"data/demo_{number}"].attrs["num_samples"] = lengths[-1]
            file[f"data/demo_{number}"].attrs["seed"] = own
        file["data"].attrs["total"] = sum(lengths)
        file["data"].attrs["env_args"] = json.dumps(about)
        names = np.array([f"demo_{number}".encode() for number in range(len(done))])
        held_out = np.random.default_rng(seed).permutation(len(done))[: max(1, round(VALID_SHARE * len(done)))]
        file["mask/valid"] = names[np.sort(held_out)]
        file["mask/train"] = np.delete(names, held_out)
    partial.replace(output)
    return lengths


def run_command(name: str, tasks: Iterable[str], generate: Generate) -> None:
    """The command ``python -m NAME TASK FILE.hdf5``."""
    parser = argparse.ArgumentParser(f"python -m {name}", description="Demonstrations of a scripted expert.")
    parser.add_argument("task", choices=list(tasks))
    parser.add_argument("output", type=Path, metavar="FILE.hdf5")
    parser.add_argument("--demonstrations", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args()
    try:
        attempts, lengths = generate(parsed.task, parsed.output, parsed.demonstrations, parsed.seed)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on") from None
    share, mean = len(lengths) / attempts, np.mean(lengths)
    print(f"wrote {parsed.output}: {len(lengths)} demonstrations of {attempts} attempts ({share:.1%} succeeded)")
    print(f"{min(lengths)} to {max(lengths)} steps, {mean:.0f} in the mean")
