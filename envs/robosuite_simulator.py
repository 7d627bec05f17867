"""robosuite's simulators with the settings of robomimic's data sets, and a renderer if needed."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parapolicy.errors import DataError

CONTROL_HZ = 20
# The operational-space controller of the published demonstrations: deltas of the gripper's pose, in the base's frame.
CONTROLLER: Mapping[str, Any] = {
    "type": "OSC_POSE",
    "input_max": 1,
    "input_min": -1,
    "output_max": [0.05, 0.05, 0.05, 0.5, 0.5, 0.5],
    "output_min": [-0.05, -0.05, -0.05, -0.5, -0.5, -0.5],
    "kp": 150,
    "damping_ratio": 1,
    "impedance_mode": "fixed",
    "kp_limits": [0, 300],
    "damping_ratio_limits": [0, 10],
    "position_limits": None,
    "orientation_limits": None,
    "uncouple_pos_ori": True,
    "input_type": "delta",
    "input_ref_frame": "base",
    "interpolation": None,
    "ramp_ratio": 0.2,
    "gripper": {"type": "GRIP"},
}
# The way out if there is no renderer.
RENDERERS = "install EGL (packages libegl1 and libgl1-mesa-dri), or OSMesa (libosmesa6) and set MUJOCO_GL=osmesa"


def default_arguments(robots: int) -> dict[str, Any]:
    """The arguments of robosuite without a data set."""
    controller = {"type": "BASIC", "body_parts": {"right": dict(CONTROLLER)}}
    return {
        "robots": ["Panda"] * robots,
        "controller_configs": controller if robots == 1 else [controller] * robots,
        "control_freq": CONTROL_HZ,
    }


def read_arguments(path: Path, name: str) -> dict[str, Any]:
    """``env_kwargs`` of a robomimic HDF5 file.

    Raises:
        DataError: no such file, not robomimic's, or for another task.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            about = json.loads(file["data"].attrs["env_args"])
            found, arguments = str(about["env_name"]), dict(about["env_kwargs"])
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path} is not a robomimic data set with env_args: {error}") from error
    if found != name:
        raise DataError(f"{path} has the task {found!r}, expected {name!r}")
    return arguments


def absolute_controllers(config: Any) -> Any:
    """The configuration of controllers with target poses in the world's frame."""
    if isinstance(config, list):
        return [absolute_controllers(part) for part in config]
    if not isinstance(config, dict):
        return config
    changes = {"input_type": "absolute", "input_ref_frame": "world"} if config.get("type") == "OSC_POSE" else {}
    return {key: absolute_controllers(value) for key, value in config.items()} | changes


def make_simulator(
    name: str, arguments: Mapping[str, Any], render_size: int, cameras: Mapping[str, tuple[int, int]]
) -> Any:
    """A robosuite environment.

    Args:
        name: of robosuite's environment.
        arguments: of it, except those of the observations.
        render_size: of frames, pixels; 0: no frames.
        cameras: name -> height and width of the observed images, pixels.

    Raises:
        ValueError: robosuite is not installed, a camera is unknown, or a GL library is needed but missing.
    """
    renders = bool(render_size or cameras)
    if not renders:
        os.environ.setdefault("MUJOCO_GL", "disable")
    try:
        import robosuite
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error.name} is not installed; pip install 'parapolicy[robomimic]' (it needs numpy below 2)"
        ) from error
    except Exception as error:  # mujoco loads the library that MUJOCO_GL names
        chosen = os.environ.get("MUJOCO_GL")
        raise ValueError(f"robosuite cannot be loaded with MUJOCO_GL={chosen} ({error}); {RENDERERS}") from error
    robosuite.macros.CONSOLE_LOGGING_LEVEL = "ERROR"
    robosuite.macros.IMAGE_CONVENTION = "opengl"  # the first row of an image is the bottom one
    fixed = {
        "has_renderer": False,
        "has_offscreen_renderer": renders,
        "use_camera_obs": bool(cameras),
        "use_object_obs": True,
        "reward_shaping": False,
        "ignore_done": True,
    }
    sizes = {
        "camera_names": [*cameras],
        "camera_heights": [height for height, _ in cameras.values()],
        "camera_widths": [width for _, width in cameras.values()],
        "camera_depths": False,
        "camera_segmentations": None,
    }
    try:
        return robosuite.make(name, **{**arguments, **fixed, **(sizes if cameras else {})})
    except Exception as error:  # PyOpenGL raises many kinds of errors
        if not renders:
            raise
        if cameras:
            fixed |= {"has_offscreen_renderer": False, "use_camera_obs": False}
            known = robosuite.make(name, **{**arguments, **fixed}).sim.model.camera_names
            if unknown := [camera for camera in cameras if camera not in known]:
                raise ValueError(
                    f"the policy observes the cameras {unknown}, expected some of {[*known]} for {name}"
                ) from error
        reason = f"the policy observes the cameras {[*cameras]}" if cameras else f"render_size is {render_size}"
        raise ValueError(
            f"{reason}, but {name} could not be made with a renderer ({type(error).__name__}: {error}); {RENDERERS}"
            + ("" if cameras else ", or set render_size to 0")
        ) from error


def use_renderer(simulator: Any) -> None:
    """Make the simulator's GL context current; robosuite leaves this to its caller."""
    context = simulator.sim._render_context_offscreen
    if context is not None:
        context.gl_ctx.make_current()


def free_renderer(simulator: Any) -> None:
    """Free the renderer's resources while its own GL context is current.

    robosuite leaves this to the garbage collector, which would free the same numbers in whatever context is current
    then, and corrupt another episode's images.
    """
    context = simulator.sim and simulator.sim._render_context_offscreen
    if context is not None:
        context.gl_ctx.make_current()
        context.con.free()
        context.gl_ctx.free()


def placement_samplers(sampler: Any) -> list[Any]:
    """A placement sampler and its parts."""
    children = getattr(sampler, "samplers", {}).values()
    return [sampler, *(part for child in children for part in placement_samplers(child))]
