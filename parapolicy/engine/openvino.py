"""The network as a graph of OpenVINO, on a CPU."""

import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parapolicy.engine.base import Bound, Engine
from parapolicy.engine.checking import check_equal
from parapolicy.networks import Embedding, Network, embedding_tensors

PRECISION = {"INFERENCE_PRECISION_HINT": "f32"}  # by default OpenVINO uses bfloat16 where the processor has it


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which reports every import and conversion over the network.

    Raises:
        ValueError: it is not installed.
    """
    silenced = "openvino" not in sys.modules and "openvino_telemetry" not in sys.modules
    if silenced:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # OpenVINO then uses its own stand-in
    try:
        import openvino

        return openvino
    except ImportError as error:
        raise ValueError("OpenVINO is not installed; pip install 'parapolicy[openvino]'") from error
    finally:
        if silenced:
            del sys.modules["openvino_telemetry"]


def convert_rows(module: nn.Module, example: tuple[Tensor, ...]) -> Any:
    """OpenVINO's model of a module for any number of rows; the caller must compare it at other numbers of rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns that sizes become constants
        shapes = [[-1, *value.shape[1:]] for value in example]
        return import_openvino().convert_model(module, example_input=example, input=shapes)


class OpenVino(Engine):
    """The network's forward pass, converted in memory at the first call, for any number of rows.

    A converted network is compared with the eager one on random rows; see :mod:`parapolicy.engine.checking`. The parts
    computed once per schedule and once per chunk stay torch's. A call uses as many threads as torch had when the
    network was converted. Threads may share the engine.

    Raises:
        ValueError: OpenVINO is not installed, or it cannot convert the network (at the first call).
    """

    name = "openvino"

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenVino, ()  # a copy, or another process, prepares its network anew

    def __init__(self) -> None:
        import_openvino()
        self._converted: Converted | None = None  # of the newest network
        self._lock = threading.Lock()

    def bind(self, network: Network, timesteps: Tensor, observation: Mapping[str, Tensor]) -> Bound:
        with self._lock:
            if self._converted is None or self._converted.source is not network:
                self._converted = Converted(network)
            converted = self._converted
            steps = converted.embed_steps(timesteps)
        return Bound(converted.forward, steps, network.embed_condition(observation))


class Converted:
    """A network converted to OpenVINO, with the embedding of the newest schedule.

    Args:
        source: the network as it was trained.
    """

    def __init__(self, source: Network) -> None:
        self.source = source
        self._timesteps: Tensor | None = None
        self._model: Any = None
        self._own = threading.local()  # a request holds the memory of one call
        self._lock = threading.Lock()

    def embed_steps(self, timesteps: Tensor) -> Embedding:
        if timesteps is not self._timesteps:
            self._steps, self._timesteps = self.source.embed_steps(timesteps), timesteps
        return self._steps

    def forward(self, x: Tensor, steps: Embedding, condition: Embedding, step: Tensor, element: Tensor) -> Tensor:
        """The network's forward pass; see :meth:`parapolicy.networks.Network.forward`."""
        with self._lock:
            if self._model is None:
                self._model = self._convert(x.shape[1:], steps, condition)
        if not hasattr(self._own, "request"):
            self._own.request = self._model.create_infer_request()
        return _infer(self._own.request, (x, step, element, *embedding_tensors(steps), *embedding_tensors(condition)))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _convert(self, shape: Sequence[int], steps: Embedding, condition: Embedding) -> Any:
        """A compiled model for samples of this shape and embeddings like these, with any number of rows."""
        openvino, generator = import_openvino(), torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.empty(shape).normal_(generator=generator)

        tables = [normal(*table.shape) for table in (*embedding_tensors(steps), *embedding_tensors(condition))]
        counts = len(tables[0]), len(tables[-1])

        def draw(rows: int) -> tuple[Tensor, ...]:
            entries = (torch.randint(count, (rows,), generator=generator) for count in counts)
            return normal(rows, *shape), *entries, *tables

        module, example = Forward(self.source, steps, condition), draw(3)
        settings = {
            **PRECISION,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
        }
        try:
            compiled = openvino.Core().compile_model(convert_rows(module, example), "CPU", settings)
        except Exception as error:  # many kinds: from tracing, the converter or the plugin
            name = type(self.source).__name__
            raise ValueError(f"OpenVINO does not support {name}: {error!s:.300}; take engine 'compiled'") from error
        request = compiled.create_infer_request()
        check_equal(
            "the network converted for OpenVINO",
            lambda *inputs: (module(*inputs),),
            lambda *inputs: (_infer(request, inputs),),
            draw,
        )
        return compiled


class Forward(nn.Module):
    """A network's forward pass with a plain list of inputs: x, step, element, and the tensors of both embeddings.

    Args:
        steps, condition: embeddings, for their number of tensors.
    """

    def __init__(self, network: Network, steps: Embedding, condition: Embedding) -> None:
        super().__init__()
        self.network, self.count = network, len(embedding_tensors(steps))
        self.pairs = isinstance(steps, tuple), isinstance(condition, tuple)

    def forward(self, x: Tensor, step: Tensor, element: Tensor, *tables: Tensor) -> Tensor:
        parts = tables[: self.count], tables[self.count :]
        steps, condition = (part if pair else part[0] for part, pair in zip(parts, self.pairs, strict=True))
        prediction: Tensor = self.network(x, steps, condition, step, element)
        return prediction


def _infer(request: Any, inputs: Sequence[Tensor]) -> Tensor:
    arrays = [value.contiguous().numpy() for value in inputs]
    return torch.from_numpy(request.infer(arrays, share_inputs=True)[0])  # the output is a copy
