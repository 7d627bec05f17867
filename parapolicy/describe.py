"""A policy described for people: its observations, its actions, its schedule and its runtime."""

import math
from typing import Any

import torch

from parapolicy.policy import Policy

STILL = 1e-3, 1e5  # scales outside of this range belong to numbers that never move, see Normalizer.fit


def describe(policy: Policy) -> dict[str, Any]:
    """The facts of a policy as a dictionary for JSON."""
    spec, schedule = policy.spec, policy.schedule
    network = {k: v for k, v in spec.network.items() if k not in ("name", "encoder") and v is not None}
    encoder = spec.network.get("encoder")
    parts = {"network": 0, "encoder": 0}
    for name, parameter in policy.network.named_parameters():
        parts["encoder" if "encoder.cameras." in name else "network"] += parameter.numel()
    observation = [
        {"key": key, "kind": f.kind, "shape": list(f.shape), "dtype": "uint8" if f.kind == "image" else "float32"}
        | ({} if f.steps is None else {"steps": f.steps})
        | ({} if f.kind == "image" else _range(policy, key))
        for key, f in spec.observation.items()
    ]
    return {
        "format": spec.provenance.get("format", "parapolicy"),
        "network": {"name": spec.network["name"], "parameters": parts["network"], "settings": network},
        "encoder": None if encoder is None else {"parameters": parts["encoder"], "settings": encoder},
        "observation": observation,
        "n_obs_steps": spec.n_obs_steps,
        "action": {"shape": [spec.horizon, spec.action_dim], **_range(policy, "action")},
        "executed": [spec.executed.start, spec.executed.stop],
        "control_hz": spec.control_hz,
        "schedule": {
            "solver": schedule.solver,
            "steps": len(schedule),
            "training_steps": spec.scheduler["num_train_timesteps"],
            "timesteps": [float(schedule.timesteps[0]), float(schedule.timesteps[-1])],
            "predicts": schedule.prediction,
            "clip": schedule.clip,
        },
        "runtime": {"device": str(policy.device), "engine": policy.engine.name, "sampler": repr(policy.sampler)},
        "warnings": [*spec.provenance.get("warnings", []), *_warnings(policy)],
    }


def present(path: str, facts: dict[str, Any]) -> str:
    """The facts of :func:`describe` as text."""
    network, encoder, schedule, action = (facts[key] for key in ("network", "encoder", "schedule", "action"))
    first, last = facts["executed"]
    rate = "unknown" if facts["control_hz"] is None else f"{facts['control_hz']:g} Hz"
    lines = [
        f"{path}: {facts['format']}",
        f"  network      {network['name']}, {_millions(network['parameters'])} {_settings(network['settings'])}",
    ]
    if encoder is not None:
        lines.append(
            f"  encoder      {_millions(encoder['parameters'])}"
            + (", shared" if encoder["settings"].get("shared", False) else "")
        )
        lines += [f"    {key}: {_settings(value)}" for key, value in encoder["settings"]["cameras"].items()]
    lines.append(f"  observation  {facts['n_obs_steps']} steps, oldest first; in this order:")
    for feature in facts["observation"]:
        shape = "x".join(map(str, feature["shape"])) or "1"
        steps = f", {feature['steps']} steps" if "steps" in feature else ""
        span = "" if feature["kind"] == "image" else _span(feature)
        lines.append(f"    {feature['key']}: {feature['kind']} {shape} {feature['dtype']}{steps}{span}")
    horizon, length = action["shape"]
    lines += [
        f"  action       {length} numbers{_span(action)}",
        f"  chunk        {horizon} actions, numbers {first} to {last - 1} are executed; control rate {rate}",
        f"  schedule     {schedule['solver']}, {schedule['steps']} of {schedule['training_steps']} steps, predicts "
        f"{schedule['predicts']}, " + ("no clipping" if schedule["clip"] is None else f"clips to {schedule['clip']:g}"),
        "  runtime      {sampler} on {device}, engine {engine}".format(**facts["runtime"]),
    ]
    return "\n".join([*lines, *(f"  warning: {warning}" for warning in facts["warnings"])])


def _range(policy: Policy, key: str) -> dict[str, Any]:
    """The values in the environment's units that map to -1 and 1; empty for keys that are not normalised."""
    scale, offset, centre = policy.normalizer.maps[key]
    if bool((scale == 1).all()) and not offset.any() and (centre is None or not centre.any()):
        return {}
    shape = scale.shape
    low, high = (
        policy.normalizer.unnormalize(key, torch.full(shape, value, device=policy.device)) for value in (-1.0, 1.0)
    )
    return {"low": low.flatten().tolist(), "high": high.flatten().tolist()}


def _warnings(policy: Policy) -> list[str]:
    found = []
    if policy.spec.control_hz is None:
        found.append(
            "the file does not say the control rate; give control_hz=… to Controller or parapolicy serve, or "
            "--control-hz to parapolicy convert"
        )
    for key, affine in policy.normalizer.maps.items():
        scale = affine.scale.flatten().abs()
        still = ((scale < STILL[0]) | (scale > STILL[1])).nonzero().flatten().tolist()
        if still and key in policy.spec.observation and policy.spec.observation[key].kind == "state":
            found.append(
                f"numbers {still[:8]} of {key!r} hardly moved in training: the policy has not learned what they mean"
            )
    return found


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M parameters"


def _settings(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items() if value is not None)


def _span(values: dict[str, Any]) -> str:
    """The ranges of a few numbers, or the widest range of many."""
    low, high = values.get("low", []), values.get("high", [])
    if not low:
        return ", not normalised"
    if len(low) <= 4:
        return ", mapped from " + ", ".join(f"[{a:.4g}, {b:.4g}]" for a, b in zip(low, high, strict=True))
    widths = [abs(b - a) if math.isfinite(b - a) else 0.0 for a, b in zip(low, high, strict=True)]
    widest = max(range(len(low)), key=lambda i: widths[i])
    return f", mapped from [{min(low):.4g}, {max(high):.4g}] overall, number {widest} the widest"
