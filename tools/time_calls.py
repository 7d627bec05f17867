"""Time one call of a network with several engines in one run, in rotating order.

    python -m tools.time_calls NETWORK [--engines compiled fused …] [--threads 1] [--seconds 10] [--output FILE]

NETWORK is ``pusht`` (the shipped policy's), ``published`` (the same with four times the channels), or a network with
random weights: ``transformer``, as published for Push-T's states (8 layers of 256), or ``image``, the UNet of the
published image policies (263 M). In addition to the engines of :func:`parapolicy.engine.make_engine`,
``openvino_static`` is the network converted for each number of rows, in bfloat16: OpenVINO at its best (``pip install
'parapolicy[openvino]'``). Prints medians in ms.
"""

import argparse
import functools
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parapolicy.bench.widen import widen
from parapolicy.engine import make_engine
from parapolicy.engine.openvino import import_openvino
from parapolicy.loading import load_policy
from parapolicy.networks import Network
from parapolicy.networks.transformer1d import TransformerForDiffusion
from parapolicy.networks.unet1d import ConditionalUnet1D

ROWS, HORIZON, ELEMENTS = (1, 3, 8, 16, 40), 16, 2
CPU = torch.device("cpu")
STATIC = "openvino_static"
NETWORKS: dict[str, Callable[[], Any]] = {
    "pusht": lambda: load_policy("checkpoints/pusht_lowdim", device="cpu", engine="eager").network,
    "published": lambda: widen(load_policy("checkpoints/pusht_lowdim", device="cpu", engine="eager"), 4).network,
    "transformer": lambda: TransformerForDiffusion(2, HORIZON, 2, 20),
    "image": lambda: ConditionalUnet1D(2, 132, 128, (512, 1024, 2048)),
}
OBSERVED = {"pusht": 20, "published": 20, "transformer": 20, "image": 66}  # numbers of an observed step


class Rows(torch.nn.Module):
    """A network with its rows' embeddings as inputs, for conversion to OpenVINO."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, steps: Tensor, condition: Tensor) -> Any:
        row = torch.arange(x.shape[0])
        return self.network(x, steps, condition, row, row)


def convert(network: Any, tables: tuple[Tensor, Tensor], given: tuple[Tensor, ...], threads: int) -> Callable[[], Any]:
    """A call of OpenVINO for a fixed number of rows."""
    openvino = import_openvino()
    x, step, element = given
    inputs = x, tables[0][step], tables[1][element]
    model = openvino.convert_model(Rows(network), example_input=inputs, input=[list(value.shape) for value in inputs])
    settings = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    for i, value in enumerate(inputs):
        request.set_input_tensor(i, openvino.Tensor(value.numpy()))
    infer: Callable[[], Any] = request.infer
    return infer


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--engines", nargs="+", default=["compiled_bfloat16", "fused_bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--output", type=Path, help="of the medians, JSON")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # OpenVINO's tracing
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    network = NETWORKS[arguments.network]().eval().requires_grad_(False)
    observation = {"state": torch.randn(ELEMENTS, 2, OBSERVED[arguments.network])}
    timesteps = torch.arange(100)
    tables = network.embed_steps(timesteps), network.embed_condition(observation)
    bound = {
        name: make_engine(name, CPU).bind(network, timesteps, observation)
        for name in arguments.engines
        if name != STATIC
    }
    calls: dict[tuple[str, int], Callable[[], Any]] = {}
    for rows in ROWS:
        given = torch.randn(rows, HORIZON, 2), torch.randint(0, 100, (rows,)), torch.arange(rows) % ELEMENTS
        for name in arguments.engines:
            if name == STATIC:
                calls[name, rows] = convert(network, tables, given, arguments.threads)
            else:
                calls[name, rows] = functools.partial(bound[name], *given)
    for call in calls.values():
        call()  # compiles
    times: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
    end = time.perf_counter() + arguments.seconds
    while time.perf_counter() < end:
        for key, call in calls.items():
            call()  # fills the caches with the call's own weights
            begin = time.perf_counter()
            call()
            times[key].append(1e3 * (time.perf_counter() - begin))
    medians = {name: [statistics.median(times[name, rows]) for rows in ROWS] for name in arguments.engines}
    print(f"{'rows':>20}" + "".join(f"{rows:>9}" for rows in ROWS))
    for name, values in medians.items():
        print(f"{name:>20}" + "".join(f"{value:9.3g}" for value in values))
    if arguments.output:
        found = {"network": arguments.network, "threads": arguments.threads, "rows": ROWS, "ms": medians}
        arguments.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
