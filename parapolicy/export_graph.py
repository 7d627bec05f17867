"""Writing a policy's network, and its image encoder, as files of ONNX, OpenVINO or AOTInductor."""

import importlib
import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from parapolicy.engine.checking import Function, check_equal
from parapolicy.engine.openvino import PRECISION, convert_rows, import_openvino
from parapolicy.networks import Network
from parapolicy.policy import Policy
from parapolicy.spec import Feature

FACTS = "policy.json"
Graph = tuple[nn.Module, dict[str, Tensor], tuple[str, ...]]  # module, example inputs of three rows, output names


class NetworkGraph(nn.Module):
    """Noisy sample (N, H, D), timestep (N,) and the observed keys (N, To, …) -> (N, H, D), as training calls it."""

    def __init__(self, network: Network, keys: Sequence[str]) -> None:
        super().__init__()
        self.network, self.keys = network, tuple(keys)

    def forward(self, sample: Tensor, timestep: Tensor, *observation: Tensor) -> tuple[Tensor, ...]:
        return (self.network.predict(sample, timestep, dict(zip(self.keys, observation, strict=True))),)


class EncoderGraph(nn.Module):
    """The images' keys (N, To, C, H, W), normalised -> their features (N, To, F), in the same order."""

    def __init__(self, network: Network, keys: Sequence[str]) -> None:
        super().__init__()
        self.network, self.keys = network, tuple(keys)

    def forward(self, *images: Tensor) -> tuple[Tensor, ...]:
        features = self.network.encode_images(dict(zip(self.keys, images, strict=True)))
        return tuple(features[key] for key in self.keys)


@torch.no_grad()
def export_graphs(policy: Policy, folder: Path, form: str) -> dict[str, float]:
    """Write ``network.*``, for images ``encoder.*``, and ``policy.json`` into a new folder, whole or not at all.

    Each file takes any number of rows. It is loaded in its own runtime and compared with the network on random rows;
    see :mod:`parapolicy.engine.checking`.

    Args:
        policy: on the CPU. Its sampler and schedule are not exported.
        folder: to write into; missing or empty.
        form: one of ``FORMS``.

    Returns:
        Name of each graph -> its largest difference from the network, relative to its largest output.

    Raises:
        ValueError: packages for the format are missing, the format does not support the network, or a written file
            gives other results than the network.
        OSError: ``folder`` exists and is not empty, or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder; choose another name")
    suffix, write = FORMS[form]
    found = {}
    with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=f".{folder.name}.") as place:
        part = Path(place) / "whole"
        part.mkdir()
        graphs = _graphs(policy)
        for name, (module, inputs, outputs) in graphs.items():
            try:
                run = write(module.eval(), inputs, outputs, part / f"{name}.{suffix}")
            except (ValueError, OSError):
                raise
            except Exception as error:  # exporters raise many kinds of errors
                raise ValueError(f"the format {form!r} does not support the {name}: {error!s:.500}") from error
            found[name] = check_equal(f"{name}.{suffix}", module, run, _drawer(inputs, policy.schedule.timesteps))
        (part / FACTS).write_text(json.dumps(_facts(policy, graphs), indent=2) + "\n")
        part.replace(folder)
    return found


def _graphs(policy: Policy) -> dict[str, Graph]:
    """The graphs to export, by file name."""
    spec, network, generator = policy.spec, policy.network, torch.Generator().manual_seed(0)
    observation = {
        key: torch.randn(3, spec.obs_steps(key), *_network_shape(feature), generator=generator)
        for key, feature in spec.observation.items()
    }
    if clash := observation.keys() & {"sample", "timestep"}:
        raise ValueError(
            f"the observation has the keys {sorted(clash)}, which are reserved for the network's other inputs"
        )
    images = {key: observation[key] for key, feature in spec.observation.items() if feature.kind == "image"}
    features = network.encode_images(images)
    encoded = {key: features[key] for key in images if features[key] is not images[key]}
    graphs: dict[str, Graph] = {}
    if encoded:
        names = tuple(f"{key}_features" for key in encoded)
        graphs["encoder"] = EncoderGraph(network, [*encoded]), {key: images[key] for key in encoded}, names
    inputs = {"sample": torch.randn(3, *spec.sample_shape, generator=generator)}
    inputs["timestep"] = policy.schedule.timesteps[torch.arange(3) % len(policy.schedule)]
    graphs["network"] = NetworkGraph(network, [*observation]), {**inputs, **observation, **encoded}, ("prediction",)
    return graphs


def _network_shape(feature: Feature) -> tuple[int, ...]:
    """Shape of one observed step as the network takes it: images are (C, H, W)."""
    return (feature.shape[-1], *feature.shape[:-1]) if feature.kind == "image" else feature.shape


def _drawer(inputs: Mapping[str, Tensor], timesteps: Tensor) -> Callable[[int], list[Tensor]]:
    """A function that draws random inputs like these, for a number of rows."""
    generator = torch.Generator().manual_seed(1)

    def draw(rows: int) -> list[Tensor]:
        drawn = {key: torch.randn(rows, *value.shape[1:], generator=generator) for key, value in inputs.items()}
        if "timestep" in inputs:
            drawn["timestep"] = timesteps[torch.randint(len(timesteps), (rows,), generator=generator)]
        return [*drawn.values()]

    return draw


def _trace(module: nn.Module, inputs: Mapping[str, Tensor]) -> ExportedProgram:
    rows = {0: Dim.DYNAMIC}
    names = [name for name in ("sample", "timestep") if name in inputs]
    shapes = (*(rows for _ in names), tuple(rows for _ in range(len(inputs) - len(names))))
    return torch.export.export(module, tuple(inputs.values()), dynamic_shapes=shapes)


def _write_onnx(module: nn.Module, inputs: Mapping[str, Tensor], outputs: tuple[str, ...], path: Path) -> Function:
    runtime = _import("onnxruntime", "onnx")
    _import("onnxscript", "onnx")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is not installed
    names = list(inputs)
    torch.onnx.export(
        _trace(module, inputs),
        tuple(inputs.values()),
        path,
        input_names=names,
        output_names=list(outputs),
        dynamo=True,
        verbose=False,
    )
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*given: Tensor) -> list[Tensor]:
        found = session.run(list(outputs), {name: value.numpy() for name, value in zip(names, given, strict=True)})
        return [torch.from_numpy(value) for value in found]

    return run


def _write_openvino(module: nn.Module, inputs: Mapping[str, Tensor], outputs: tuple[str, ...], path: Path) -> Function:
    openvino = import_openvino()
    model = convert_rows(module, tuple(inputs.values()))
    for places, names in ((model.inputs, inputs), (model.outputs, outputs)):
        for place, name in zip(places, names, strict=True):
            place.get_tensor().set_names({name})
    openvino.save_model(model, path, compress_to_fp16=False)
    compiled = openvino.Core().compile_model(path, "CPU", PRECISION)

    def run(*given: Tensor) -> list[Tensor]:
        found = compiled({name: value.numpy() for name, value in zip(inputs, given, strict=True)})
        return [torch.from_numpy(found[name]) for name in outputs]

    return run


def _write_aoti(module: nn.Module, inputs: Mapping[str, Tensor], outputs: tuple[str, ...], path: Path) -> Function:
    inductor: Any = importlib.import_module("torch._inductor")
    inductor.aoti_compile_and_package(_trace(module, inputs), package_path=str(path))
    run: Function = inductor.aoti_load_package(str(path))
    return run


FORMS: dict[str, tuple[str, Callable[..., Function]]] = {
    "onnx": ("onnx", _write_onnx),
    "openvino": ("xml", _write_openvino),
    "aoti": ("pt2", _write_aoti),
}


def _import(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{name} is not installed; pip install 'parapolicy[{extra}]'") from error


def _facts(policy: Policy, graphs: Mapping[str, Graph]) -> dict[str, Any]:
    """What a caller of the graphs needs: the policy's spec, the normalisation, and the files' inputs."""
    maps = {}
    for key, affine in policy.normalizer.maps.items():
        parts = {"scale": affine.scale, "offset": affine.offset, "centre": affine.centre}
        maps[key] = {name: None if value is None else value.tolist() for name, value in parts.items()}
    files = {
        name: {"inputs": {key: ["rows", *value.shape[1:]] for key, value in inputs.items()}, "outputs": list(outputs)}
        for name, (_, inputs, outputs) in graphs.items()
    }
    return {"files": files, "spec": policy.spec.to_dict(), "normalizer": maps}
