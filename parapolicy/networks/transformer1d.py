"""The transformer of Diffusion Policy (Chi et al., RSS 2023, section III-A): ``TransformerForDiffusion``.

The module tree has the published code's names, so that a published state dict loads with ``strict=True`` once ``mask``
and ``memory_mask`` are removed; these follow from the arguments. There is no dropout.

The sample's steps are tokens of a decoder. Its memory is one token for the timestep and one for each observed step.
Without condition layers that mix them, a memory token depends on the timestep or on one observed step alone. Its keys
and values in every decoder layer are then computed once per schedule or once per chunk.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from parapolicy.networks.base import Embedding, Network, check_condition, overwrite_observed
from parapolicy.networks.unet1d import SinusoidalPosEmb
from parapolicy.networks.vision import ObservationEncoder, build_encoder, encode
from parapolicy.spec import PolicySpec

MAX_LAYERS, MAX_SIZE = 200, 2**16  # more than any real network; a larger number means a damaged config
CONDITIONS = ("cross", "inpaint")


class Attention(nn.Module):
    """Multi-head attention; parameters as those of :class:`torch.nn.MultiheadAttention`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def project(self, x: Tensor, first: int, last: int) -> Tensor:
        """Projections ``first`` to ``last - 1`` of queries (0), keys (1) and values (2): (N, L, E) -> (N, L, n E)."""
        dim = x.shape[-1]
        part = slice(first * dim, last * dim)
        return functional.linear(x, self.in_proj_weight[part], self.in_proj_bias[part])

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Projected query (N, L, E), key and value (N, M, E) -> (N, L, E). Mask (L, M): True where L may see M."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value))
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        output: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return output


class Layer(nn.Module):
    """A layer with the norms before attention; parameters as those of torch's Transformer{Encoder,Decoder}Layer.

    Args:
        dim: length of a token.
        heads: number of heads.
        cross: also attend to a memory, as in a decoder.
    """

    def __init__(self, dim: int, heads: int, cross: bool) -> None:
        super().__init__()
        self.self_attn = Attention(dim, heads)
        self.linear1, self.linear2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.multihead_attn = Attention(dim, heads) if cross else None
        self.norm3 = nn.LayerNorm(dim) if cross else None

    def forward(
        self, x: Tensor, mask: Tensor | None, memory: Tensor | None = None, memory_mask: Tensor | None = None
    ) -> Tensor:
        """Tokens (N, L, E) -> (N, L, E). ``memory``: projected keys and values of each memory token, (N, M, 2 E)."""
        x = x + self.self_attn(*self.self_attn.project(self.norm1(x), 0, 3).chunk(3, -1), mask)
        norm = self.norm2
        if self.multihead_attn is not None and self.norm3 is not None and memory is not None:
            query = self.multihead_attn.project(self.norm2(x), 0, 1)
            x = x + self.multihead_attn(query, *memory.chunk(2, -1), memory_mask)
            norm = self.norm3
        return x + self.linear2(functional.gelu(self.linear1(norm(x))))


class Layers(nn.Module):
    def __init__(self, count: int, dim: int, heads: int, cross: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(dim, heads, cross) for _ in range(count))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


class TransformerForDiffusion(Network):
    """Predicts noise (or sample, or velocity) from a noisy sequence, its timestep and observed states.

    Args:
        input_dim: numbers of one step of the sequence, D.
        horizon: steps of the sequence, H.
        n_obs_steps: observed steps, To.
        cond_dim: numbers of one observed step, Do.
        n_layer: layers of the decoder, or of the encoder if there is no decoder.
        n_head: heads of every attention.
        n_emb: length of a token, E.
        n_cond_layers: layers in which the memory's tokens attend to each other; 0: two linear layers for each token.
        causal_attn: a step sees no later step and no later observation.
        time_as_condition: True: the timestep is a token of the memory. False: it is the sequence's first token, and
            there is no memory; only with ``inpaint``.
        condition: ``cross``: the observation is the rest of the memory. ``inpaint``: it replaces columns ``D - Do`` on
            of the sequence's first To steps (Janner et al., ICML 2022).
        encoder: computes an observed step's numbers; None: they are the observed states. Its name in the state dict is
            ``obs_encoder``.

    Raises:
        ValueError: an argument of another kind or size, or arguments that do not go together.
    """

    def __init__(
        self,
        input_dim: int,
        horizon: int,
        n_obs_steps: int,
        cond_dim: int,
        n_layer: int = 8,
        n_head: int = 4,
        n_emb: int = 256,
        n_cond_layers: int = 0,
        causal_attn: bool = True,
        time_as_condition: bool = True,
        condition: str = "cross",
        encoder: ObservationEncoder | None = None,
    ) -> None:
        super().__init__()
        _check_arguments(n_layer, n_head, n_emb, n_cond_layers, causal_attn, time_as_condition, condition)
        crosses = condition == "cross"
        self.n_obs_steps, self.obs_encoder = n_obs_steps, encoder
        self.inpaints, self.encoder_only, self.n_cond_layers = not crosses, not time_as_condition, n_cond_layers
        self.causal = causal_attn
        length, memory = horizon + (not time_as_condition), time_as_condition + n_obs_steps * crosses
        self.input_emb = nn.Linear(input_dim, n_emb)
        self.pos_emb = nn.Parameter(torch.zeros(1, length, n_emb))
        self.time_emb = SinusoidalPosEmb(n_emb)
        self.cond_obs_emb = nn.Linear(cond_dim, n_emb) if crosses else None
        self.cond_pos_emb = nn.Parameter(torch.zeros(1, memory, n_emb)) if memory else None
        self.encoder: nn.Module
        if self.encoder_only:
            self.encoder = Layers(n_layer, n_emb, n_head, cross=False)
        elif n_cond_layers:
            self.encoder = Layers(n_cond_layers, n_emb, n_head, cross=False)
        else:
            self.encoder = nn.Sequential(nn.Linear(n_emb, 4 * n_emb), nn.Mish(), nn.Linear(4 * n_emb, n_emb))
        self.decoder = None if self.encoder_only else Layers(n_layer, n_emb, n_head, cross=True)
        self.ln_f, self.head = nn.LayerNorm(n_emb), nn.Linear(n_emb, input_dim)
        for part in self.children():
            if part is not encoder:
                part.apply(_initialise)
        for positions in (self.pos_emb, self.cond_pos_emb if crosses else None):
            if positions is not None:
                nn.init.normal_(positions, std=0.02)

    @classmethod
    def build(
        cls, spec: PolicySpec, encoder: Mapping[str, Any] | None = None, **arguments: Any
    ) -> "TransformerForDiffusion":
        """As :meth:`parapolicy.networks.Network.build`; ``encoder``: see :mod:`parapolicy.networks.vision`."""
        built = build_encoder(spec, encoder, by_step=True)
        cond_dim = (spec.condition_dim if built is None else built.features) // spec.n_obs_steps
        check_condition(spec, cond_dim, arguments.get("condition"))
        return cls(spec.sample_shape[1], spec.horizon, spec.n_obs_steps, cond_dim, encoder=built, **arguments)

    @property
    def mask(self) -> Tensor | None:
        """(L, L), True where a token of the sequence sees another; None: everywhere."""
        if not self.causal:
            return None
        token = torch.arange(self.pos_emb.shape[1], device=self.pos_emb.device)
        return token[:, None] >= token

    @property
    def memory_mask(self) -> Tensor | None:
        """(H, M), True where a token of the sequence sees one of the memory; None: everywhere."""
        if not self.causal or self.inpaints or self.cond_pos_emb is None:
            return None
        token = torch.arange(self.pos_emb.shape[1], device=self.pos_emb.device)
        # The memory's token 0 is the timestep, and token s is the observed step s - 1.
        observed = torch.arange(self.cond_pos_emb.shape[1], device=self.pos_emb.device) - 1
        return token[:, None] >= observed

    @property
    def _mixes(self) -> bool:
        """Whether memory tokens of the timestep and of the observation depend on each other."""
        return self.n_cond_layers > 0 and not self.inpaints

    def embed_steps(self, timesteps: Tensor) -> Tensor:
        """(T,) -> the timesteps' tokens (T, 1, E), or their keys and values in each layer (T, n_layer, 1, 2 E)."""
        token = self.time_emb(timesteps)[:, None]
        if self.cond_pos_emb is None:
            return token + self.pos_emb[:, :1]
        token = token + self.cond_pos_emb[:, :1]
        return token if self._mixes else self._project(self.encoder(token))

    def encode_images(self, observation: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return observation if self.obs_encoder is None else self.obs_encoder.encode_images(observation)

    @property
    def image_margins(self) -> dict[str, tuple[int, int]]:
        return {} if self.obs_encoder is None else self.obs_encoder.margins

    def embed_condition(self, observation: Mapping[str, Tensor]) -> Tensor:
        """{key: (B, To, …)} -> for inpainting, the observed steps (B, To, Do); else the observed steps' tokens
        (B, To, E), or their keys and values in each layer (B, n_layer, To, 2 E)."""
        observed = encode(self.obs_encoder, observation).unflatten(1, (self.n_obs_steps, -1))
        if self.cond_obs_emb is None or self.cond_pos_emb is None:
            return observed
        tokens = self.cond_obs_emb(observed) + self.cond_pos_emb[:, 1:]
        return tokens if self._mixes else self._project(self.encoder(tokens))

    def _project(self, memory: Tensor) -> Tensor:
        """Memory tokens (N, M, E) -> their keys and values in each decoder layer (N, n_layer, M, 2 E)."""
        assert self.decoder is not None
        layers: Any = self.decoder.layers
        return torch.stack([layer.multihead_attn.project(memory, 1, 3) for layer in layers], 1)

    def forward(self, x: Tensor, steps: Embedding, condition: Embedding, step: Tensor, element: Tensor) -> Tensor:
        """(N, H, D) -> (N, H, D)."""
        assert isinstance(steps, Tensor)
        assert isinstance(condition, Tensor)
        if self.inpaints:
            x = overwrite_observed(x, condition[element])
        tokens, mask = self.input_emb(x), self.mask
        if self.decoder is None:
            tokens = torch.cat((steps[step], tokens + self.pos_emb[:, 1:]), 1)
            tokens = self.encoder(tokens, mask)[:, 1:]
        else:
            tokens = tokens + self.pos_emb
            memory_mask = self.memory_mask
            memory: Any = steps
            if self._mixes:
                memory = self._project(self.encoder(torch.cat((steps[step], condition[element]), 1)))
            for i, layer in enumerate(self.decoder.layers):
                if self._mixes:
                    seen = memory[:, i]
                elif self.inpaints:
                    seen = steps[:, i][step]
                else:
                    seen = torch.cat((steps[:, i][step], condition[:, i][element]), 1)
                tokens = layer(tokens, mask, seen, memory_mask)
        output: Tensor = self.head(self.ln_f(tokens))
        return output


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, Attention):
        nn.init.normal_(module.in_proj_weight, std=0.02)


def _check_arguments(
    n_layer: Any, n_head: Any, n_emb: Any, n_cond_layers: Any, causal: Any, time_as_condition: Any, condition: Any
) -> None:
    bounds = {
        "n_layer": (n_layer, 1, MAX_LAYERS),
        "n_head": (n_head, 1, MAX_SIZE),
        "n_emb": (n_emb, 4, MAX_SIZE),
        "n_cond_layers": (n_cond_layers, 0, MAX_LAYERS),
    }
    for name, (value, least, most) in bounds.items():
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ValueError(f"{name} is {value!r}, expected a whole number from {least} to {most}")
    for name, value in {"causal_attn": causal, "time_as_condition": time_as_condition}.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}, expected true or false")
    if n_emb % 2 or n_emb % n_head:
        raise ValueError(f"n_emb is {n_emb}, expected an even multiple of n_head, {n_head}")
    if condition not in CONDITIONS:
        raise ValueError(f"condition is {condition!r}, expected one of {CONDITIONS}")
    if not time_as_condition and (condition != "inpaint" or n_cond_layers):
        raise ValueError(
            f"time_as_condition is false with condition {condition!r} and n_cond_layers {n_cond_layers}, "
            "expected 'inpaint' and 0, because there is no memory"
        )
