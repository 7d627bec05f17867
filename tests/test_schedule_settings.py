"""Settings of schedules: which are taken, and which are refused by name; and where steps are spaced."""

import json
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from omegaconf import OmegaConf

from parapolicy.schedule import make_schedule
from tests.helpers import DDPM_CONFIG, FLOW_CONFIG, configured


def config_of(**changes: Any) -> dict[str, Any]:
    return {**DDPM_CONFIG, **changes}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "euler"}, "solver is 'euler'"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 101}, "steps is 101, expected 1 to 100"),
        ({"eta": 0.5}, "only ddim takes it"),
        ({"solver": "ddim", "eta": 2.0}, "eta is 2.0"),
        ({"order": 2}, "only dpmsolver"),
        ({"solver": "dpmsolver++", "order": 3}, "solver_order 3"),
        (
            {"solver": "flow"},
            "solver is 'flow', which is for flow matching, but the config .'DDPMScheduler'. is of var",
        ),
    ],
)
def test_bad_settings_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(DDPM_CONFIG, **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"thresholding": True}, "thresholding is on"),
        ({"variance_type": "learned"}, "variance_type is 'learned'"),
        ({"prediction_type": "flow"}, "prediction_type is 'flow'"),
        ({"_class_name": "PNDMScheduler"}, "PNDMScheduler"),
        ({"steps_offset": 5}, "distinct timesteps"),
    ],
)
def test_unsupported_configs_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(config_of(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"predction_type": "sample"}, "'predction_type' is unknown to diffusers' DDPMScheduler; did you mean 'pred"),
        ({"clip_samples": False}, "did you mean 'clip_sample'"),
        ({"_clas_name": "DDIMScheduler"}, "'_clas_name' is unknown"),
        ({"shift": 3.0}, "'shift' is unknown to diffusers' DDPMScheduler"),
        ({"prediction_type": None}, "prediction_type is None, expected text"),
        ({"num_train_timesteps": True}, "num_train_timesteps is True, expected a whole number"),
        ({"num_train_timesteps": 100.0}, "num_train_timesteps is 100.0, expected a whole number"),
        ({"num_train_timesteps": "100"}, "num_train_timesteps is '100'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0, expected 1 to"),
        ({"num_train_timesteps": 10_001}, "num_train_timesteps is 10001, expected 1 to"),
        ({"clip_sample": 1}, "clip_sample is 1, expected true or false"),
        ({"clip_sample": "no"}, "clip_sample is 'no'"),
        ({"clip_sample": None}, "clip_sample is None"),
        ({"clip_sample_range": 0}, "clip_sample_range is 0 with clip_sample on"),
        ({"clip_sample_range": -1.0}, "clip_sample_range is -1.0 with"),
        ({"clip_sample_range": None}, "clip_sample_range is None with"),
        ({"clip_sample_range": True}, "clip_sample_range is True, expected a finite number"),
        ({"clip_sample_range": float("inf")}, "clip_sample_range is inf"),
        ({"clip_sample_range": 10**400}, "clip_sample_range is 1000"),
        ({"beta_start": 0.0}, "beta_start is 0.0, expected a number above 0 and below 1"),
        ({"beta_end": 1}, "beta_end is 1, expected a number above 0 and below 1"),
        ({"beta_end": float("nan")}, "beta_end is nan"),
        ({"beta_end": False}, "beta_end is False"),
        ({"beta_schedule": "cosine"}, "beta_schedule is 'cosine', expected one of"),
        ({"trained_betas": [0.1] * 99}, "trained_betas has 99 numbers, expected 100"),
        ({"trained_betas": [0.1] * 99 + [1.0]}, r"trained_betas.99. is 1.0"),
        ({"trained_betas": [-0.1] + [0.1] * 99}, r"trained_betas.0. is -0.1"),
        ({"trained_betas": [True] * 100}, "expected a list of numbers"),
        ({"trained_betas": 0.1}, "trained_betas is 0.1, expected a list of numbers"),
        ({"trained_betas": [0.9999999] * 100}, "no signal is left"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is on with prediction_type 'epsilon'"),
        ({"variance_type": "learned_range"}, "variance_type is 'learned_range'"),
        ({"timestep_spacing": "even"}, "timestep_spacing is 'even'"),
        ({"steps_offset": -1}, "steps_offset is -1, expected 0 to 100"),
        ({"steps_offset": 10**30}, "steps_offset is 1000"),
        ({"thresholding": 0}, "thresholding is 0, expected true or false"),
    ],
)
@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmsolver++"])
def test_doubtful_settings_are_named(solver: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(config_of(**changes), solver)


@pytest.mark.parametrize("name", ["num_train_timesteps", "prediction_type", "beta_schedule", "beta_start", "beta_end"])
def test_missing_settings_are_named(name: str) -> None:
    config = config_of(beta_schedule="linear")
    make_schedule(config)
    del config[name]
    with pytest.raises(ValueError, match=f"lacks {name}"):
        make_schedule(config)


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmsolver++"])
def test_the_clipping_range_is_the_configs(solver: str) -> None:
    assert make_schedule(config_of(clip_sample_range=2.5), solver, steps=20).clip == 2.5
    config = config_of()
    del config["clip_sample"]
    assert make_schedule(config, solver, steps=20).clip == (None if solver == "dpmsolver++" else 1.0)


def test_ten_thousand_timesteps_and_steps_are_taken() -> None:
    assert make_schedule(config_of(num_train_timesteps=10_000), "dpmsolver++", steps=2).timesteps[0] == 9_999
    assert len(make_schedule(FLOW_CONFIG, steps=10_000)) == 10_000
    with pytest.raises(ValueError, match="steps is 10001, expected 1 to 10000"):
        make_schedule(FLOW_CONFIG, steps=10_001)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shift": True}, "shift is True"),
        ({"shift": "3"}, "shift is '3'"),
        ({"shift": None}, "shift is None"),
        ({"shift_terminal": "x"}, "shift_terminal is 'x'"),
        ({"beta_start": 0.1}, "'beta_start' is unknown to diffusers' FlowMatchEulerDiscreteScheduler"),
        ({"clip_sample": True, "clip_sample_range": 0.0}, "clip_sample_range is 0.0 with"),
        ({"use_karras_sigmas": 1}, "use_karras_sigmas is 1"),
    ],
)
def test_doubtful_flow_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule({**FLOW_CONFIG, **changes})


def test_settings_that_are_out_of_use_may_be_anything_of_their_kind() -> None:
    make_schedule(config_of(clip_sample=False, clip_sample_range=None))
    make_schedule(config_of(rescale_betas_zero_snr=True, prediction_type="v_prediction"), "ddim")
    make_schedule(config_of(trained_betas=[0.01] * 100))
    make_schedule(config_of(clip_sample_range=2))


@pytest.mark.parametrize("source", [*DDPMScheduler._compatibles, "FlowMatchEulerDiscreteScheduler"])
def test_what_diffusers_writes_is_taken(source: str) -> None:
    """Its own configs as text and as a map, with the settings that it keeps of the scheduler converted from."""
    targets = [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler]
    try:
        made = getattr(diffusers, source)(num_train_timesteps=100)
    except ImportError as error:
        pytest.skip(str(error).strip())
    for target in [FlowMatchEulerDiscreteScheduler] if source.startswith("Flow") else targets:
        converted = target.from_config(made.config)
        text = json.loads(converted.to_json_string())
        make_schedule(text, steps=10)
        make_schedule({**converted.config, "_class_name": text["_class_name"]}, steps=10)


def test_the_training_configuration_is_taken() -> None:
    scheduler = OmegaConf.to_container(configured("train").policy.scheduler)
    assert len(make_schedule(scheduler)) == 100


DPM_CONFIG = {
    "_class_name": "DPMSolverMultistepScheduler",
    "num_train_timesteps": 100,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, "algorithm_type is 'dpmsolver'"),
        ({"solver_order": 3}, "solver_order 3"),
        ({"use_flow_sigmas": True}, "variance-preserving"),
        ({"thresholding": True}, "thresholding is on"),
    ],
)
def test_other_forms_of_dpmsolver_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule({**DPM_CONFIG, **changes}, steps=20)


def test_repeated_timesteps_are_refused() -> None:
    config = {**DDPM_CONFIG, "_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "linspace"}
    with pytest.raises(ValueError, match="take another number of steps or timestep_spacing"):
        make_schedule(config, steps=100)


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {"solver": "ddim"}, "solver is 'ddim', which is for variance-preserving diffusion, but the config"),
        ({}, {"order": 3}, "order is 3, expected 1 or 2"),
        ({}, {"eta": 1.0}, "only ddim takes it"),
        ({}, {"steps": 0}, "steps is 0"),
        ({"prediction_type": "epsilon"}, {}, "prediction_type is 'epsilon'"),
        ({"use_dynamic_shifting": True}, {}, "use_dynamic_shifting is on"),
        ({"stochastic_sampling": True}, {}, "stochastic_sampling is on"),
        ({"shift": -0.5}, {}, "shift -0.5"),
    ],
)
def test_unsupported_flow_settings_are_named(changes: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule({**FLOW_CONFIG, **changes}, **arguments)


def test_flow_takes_more_steps_than_training_has_timesteps() -> None:
    schedule = make_schedule({**FLOW_CONFIG, "num_train_timesteps": 1}, steps=4)
    assert schedule.timesteps.tolist() == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(("steps", "expected"), [(100, 100), (16, 17), (60, 100), (8, 9)])
def test_the_spacing_of_diffusers_0_11_takes_ddpm_steps_to_the_next_lower_timestep(steps: int, expected: int) -> None:
    schedule = make_schedule(DDPM_CONFIG, steps=steps, spacing="diffusers-0.11")
    stride = 100 // steps
    assert schedule.timesteps.tolist() == list(range(0, 100, stride))[::-1]
    assert len(schedule) == expected
    cumulative = DDPMScheduler.from_config(DDPM_CONFIG).alphas_cumprod.double()
    for j, t in enumerate(schedule.timesteps.tolist()):
        now, after = cumulative[t], cumulative[t - 1] if t else torch.tensor(1.0)
        beta = 1 - now / after
        assert schedule.A[j].item() == pytest.approx(
            (1 - beta).sqrt().item() * ((1 - after) / (1 - now)).item(), abs=1e-5
        )
        assert schedule.B[j].item() == pytest.approx((after.sqrt() * beta / (1 - now)).item(), abs=1e-5)
        assert schedule.S[j].item() == pytest.approx(((1 - after) / (1 - now) * beta).sqrt().item(), abs=1e-5)


def test_the_spacing_of_diffusers_is_kept_to_the_letter_where_asked() -> None:
    config = config_of(_class_name="DDIMScheduler", timestep_spacing="leading")
    assert make_schedule(config, steps=60, spacing="diffusers").timesteps[0] == 59
    assert make_schedule(config, steps=60).timesteps[0] == 99
    former = make_schedule(config, steps=16, spacing="diffusers-0.11")
    assert former.timesteps.tolist() == [6 * k for k in range(16)][::-1]
    torch.testing.assert_close(former.A, make_schedule(config, steps=16, spacing="diffusers").A, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("config", "settings", "words"),
    [
        (DDPM_CONFIG, {"spacing": "odd"}, "spacing is 'odd'"),
        (DDPM_CONFIG, {"solver": "dpmsolver++", "spacing": "diffusers"}, "take 'even'"),
        (config_of(_class_name="DDIMScheduler", steps_offset=50), {"spacing": "diffusers-0.11"}, "steps_offset is 50"),
    ],
)
def test_a_spacing_that_does_not_fit_is_refused(config: dict, settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_schedule(config, **settings)


def leading(offset: int) -> dict[str, Any]:
    return {**DDPM_CONFIG, "_class_name": "DDIMScheduler", "timestep_spacing": "leading", "steps_offset": offset}


@pytest.mark.parametrize("spacing", ["diffusers", "diffusers-0.11"])
def test_a_timestep_one_beyond_the_last_is_refused(spacing: str) -> None:
    assert make_schedule(leading(9), steps=10, spacing=spacing).timesteps[0] == 99
    with pytest.raises(ValueError, match=r"steps_offset (10 do not give|is 10: the first timestep is beyond)"):
        make_schedule(leading(10), steps=10, spacing=spacing)


@pytest.mark.parametrize("setting", ["use_dynamic_shifting", "stochastic_sampling", "invert_sigmas"])
def test_what_flow_matching_does_not_support_is_named(setting: str) -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 100, setting: True}
    with pytest.raises(ValueError, match=f"{setting} is on"):
        make_schedule(config, steps=10)


def test_times_of_flow_matching_that_fall_together_are_refused() -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 100, "shift": 1e9}
    with pytest.raises(ValueError, match="distinct times from 1 to 0"):
        make_schedule(config, steps=10)
