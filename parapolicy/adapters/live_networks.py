"""The networks of live policies of real-stanford/diffusion_policy and robomimic: settings, and tensors by our names."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from parapolicy.adapters.live import WAY_OUT

# Further entries of the published state dicts.
OTHERS = ("_dummy_variable", "mask", "memory_mask")


def describe_network(network: nn.Module, kind: str, horizon: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings of ``PolicySpec.network`` and the tensors of a live network.

    Args:
        network: of one of the published classes.
        kind: how it is conditioned: ``global``, ``local``, ``cross`` or ``inpaint``.
        horizon: steps of the sample.

    Raises:
        ValueError: a network of another class or structure.
    """
    names = [base.__name__ for base in type(network).__mro__]
    described = next((DESCRIBED[name] for name in names if name in DESCRIBED), None)
    if described is None:
        raise ValueError(f"the network is a {names[0]}, expected one of {sorted(DESCRIBED)}; {WAY_OUT}")
    tensors = {name: value for name, value in network.state_dict().items() if name not in OTHERS}
    try:
        settings = described(network)
    except (AttributeError, TypeError, IndexError) as error:
        raise ValueError(f"{names[0]} differs from the published network ({error}); {WAY_OUT}") from error
    if kind != "global":
        settings["condition"] = kind
    if settings["name"] == "transformer1d" and not settings["causal_attn"]:
        # Without masks, the published network uses the first positions of a longer table.
        length = horizon + (not settings["time_as_condition"])
        tensors["pos_emb"] = tensors["pos_emb"][:, :length]
    return settings, tensors


def _unet(network: Any) -> dict[str, Any]:
    dims = [level[0].blocks[0].block[0].out_channels for level in network.down_modules]
    convolution, norm, _ = network.mid_modules[0].blocks[0].block
    return {
        "name": "unet1d",
        "diffusion_step_embed_dim": network.diffusion_step_encoder[3].out_features,
        "down_dims": dims,
        "kernel_size": convolution.kernel_size[0],
        "n_groups": norm.num_groups,
        "final_groups": network.final_conv[0].block[1].num_groups,
        "cond_predict_scale": network.mid_modules[0].cond_encoder[1].out_features == 2 * dims[-1],
    }


def _transformer(network: Any) -> dict[str, Any]:
    layers = (network.encoder if network.encoder_only else network.decoder).layers
    mixing = 0 if network.encoder_only else len(getattr(network.encoder, "layers", ()))
    return {
        "name": "transformer1d",
        "n_layer": len(layers),
        "n_head": layers[0].self_attn.num_heads,
        "n_emb": network.input_emb.out_features,
        "n_cond_layers": mixing,
        "causal_attn": network.mask is not None,
        "time_as_condition": not network.encoder_only,
    }


DESCRIBED: dict[str, Callable[[Any], dict[str, Any]]] = {
    "ConditionalUnet1D": _unet,
    "TransformerForDiffusion": _transformer,
}
