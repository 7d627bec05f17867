"""Checks of a diffusers scheduler's config.

diffusers ignores unknown settings and uses its defaults for missing ones: a misspelt ``prediction_type`` would silently
give another policy. The known settings and their kinds are read from the signatures of diffusers' own schedulers.
"""

import difflib
import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any, get_args

MAX_TRAIN_TIMESTEPS = 10_000  # ten times the largest in use; more means a damaged config
LARGEST = 1e30  # of any number: float32 must hold it
NOTES = {
    "_class_name",
    "_diffusers_version",
    "_use_default_values",
    "_name_or_path",
}  # not settings; diffusers writes them too
# Settings that any scheduler's config may have here, with an example value of each kind.
OURS: dict[str, Any] = {"prediction_type": "epsilon", "clip_sample": True, "clip_sample_range": 1.0}
CHOICES = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "time_shift_type": ("exponential", "linear"),
}


def check_config(config: Mapping[str, Any], scheduler: type) -> None:
    """Refuse a config that does not say unambiguously what the network was trained with.

    Args:
        config: a diffusers scheduler's config.
        scheduler: the config's diffusers class.

    Raises:
        ValueError: an unknown, missing or contradictory setting, or a value of the wrong kind.
    """
    own = _parameters(scheduler)
    known = own if set(config) <= own.keys() | OURS.keys() | NOTES else {**_converted(scheduler), **own}
    for name, value in config.items():
        if name in known:
            _check_kind(name, value, known[name].default, type(None) in get_args(known[name].annotation))
        elif name in OURS:
            _check_kind(name, value, OURS[name])
        elif name not in NOTES:
            near = difflib.get_close_matches(str(name), {*known, *OURS}, 1)
            hint = f"did you mean {near[0]!r}?" if near else "leave it out"
            raise ValueError(f"the setting {name!r} is unknown to diffusers' {scheduler.__name__}; {hint}")
    for name, choices in CHOICES.items():
        if config.get(name, choices[0]) not in choices:
            raise ValueError(f"{name} is {config[name]!r}, expected one of {choices}")
    count = _required(config, "num_train_timesteps")
    if not 1 <= count <= MAX_TRAIN_TIMESTEPS:
        raise ValueError(f"num_train_timesteps is {count!r}, expected 1 to {MAX_TRAIN_TIMESTEPS}")
    if not 0 <= config.get("steps_offset", 0) <= count:
        raise ValueError(f"steps_offset is {config['steps_offset']!r}, expected 0 to {count}, num_train_timesteps")
    if "beta_schedule" in own:  # absent in flow matching
        _check_betas(config, count)
        _check_prediction(config)
    default = own["clip_sample"].default if "clip_sample" in own else False
    clip = config.get("clip_sample_range", 1.0)
    if config.get("clip_sample", default) and (clip is None or not clip > 0):
        raise ValueError(f"clip_sample_range is {clip!r} with clip_sample on, expected a number above 0")


def _check_betas(config: Mapping[str, Any], count: int) -> None:
    betas = config.get("trained_betas")
    if betas is None and _required(config, "beta_schedule") != "squaredcos_cap_v2":
        _required(config, "beta_start")
        _required(config, "beta_end")
    if betas is not None and len(betas) != count:
        raise ValueError(f"trained_betas has {len(betas)} numbers, expected {count}, num_train_timesteps")
    named = {f"trained_betas[{i}]": beta for i, beta in enumerate([] if betas is None else betas)}
    for name, beta in {**named, **{key: config[key] for key in ("beta_start", "beta_end") if key in config}}.items():
        if not 0 < beta < 1:
            raise ValueError(f"{name} is {beta!r}, expected a number above 0 and below 1")


def _check_prediction(config: Mapping[str, Any]) -> None:
    prediction = _required(config, "prediction_type")
    if prediction == "epsilon" and config.get("rescale_betas_zero_snr"):
        raise ValueError(
            "rescale_betas_zero_snr is on with prediction_type 'epsilon', which carries no information where no signal "
            "is left; expected 'sample' or 'v_prediction'"
        )
    if str(config.get("variance_type")).startswith("learned"):
        raise ValueError(
            f"variance_type is {config['variance_type']!r}, expected a fixed one: no network here learns variances"
        )


def _check_kind(name: str, value: Any, example: Any, nullable: bool = False) -> None:
    """Check that a value is of the kind of diffusers' default or of the example. Whole numbers may stand for floats."""
    if value is None and (example is None or nullable or name == "clip_sample_range"):
        return
    if name == "trained_betas":
        fits, expected = _is_list(value) and all(map(_is_number, value)), "a list of numbers, or null"
    elif name == "lambda_min_clipped" and value == -float("inf"):
        return  # diffusers' default: no bound
    elif isinstance(example, bool):
        fits, expected = isinstance(value, bool), "true or false"
    elif isinstance(example, int):
        fits, expected = _is_number(value) and isinstance(value, int), "a whole number"
    elif isinstance(example, str) or name == "variance_type":
        fits, expected = isinstance(value, str), "text"
    elif isinstance(example, list):
        fits, expected = isinstance(value, list), "a list"
    else:  # a float, or null for none
        fits, expected = _is_number(value), "a finite number"
    if not fits:
        raise ValueError(f"{name} is {value!r}, expected {expected}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) <= MAX_TRAIN_TIMESTEPS


def _required(config: Mapping[str, Any], name: str) -> Any:
    if name not in config:
        raise ValueError(f"the scheduler's config lacks {name}; add the value that the network was trained with")
    return config[name]


@cache
def _parameters(scheduler: type) -> dict[str, inspect.Parameter]:
    """The settings of a scheduler: its arguments with their defaults."""
    found = inspect.signature(scheduler).parameters
    return {name: p for name, p in found.items() if p.default is not p.empty}


@cache
def _converted(scheduler: type) -> dict[str, inspect.Parameter]:
    """The settings of compatible schedulers, which diffusers keeps when it converts a config."""
    import diffusers  # loaded already: the scheduler is one of its classes

    classes = [getattr(diffusers, name, None) for name in getattr(scheduler, "_compatibles", ())]
    return {name: p for found in classes if found is not None for name, p in _parameters(found).items()}
