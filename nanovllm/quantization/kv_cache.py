"""Keys and values in fp8 (e4m3): half the bytes of bf16, and twice the context in the same memory.

What is stored is the key or value divided by a scale of its kv head. A checkpoint may have scales
that were measured on text, `k_scale` and `v_scale` of a layer, and then they are used as they are.

Else a scale follows from the weights, no data is needed. e4m3 has 3 bits after the point from 2^-6
to 448, and fewer below. So each kv head's keys, and its values, are divided by a scale that brings
their root mean square to 8: what is 56 times as large still fits, and what is 1/512 of it is as
precise as the rest. The input of the projection is normalised, so an output feature with weights w
and bias b behind a norm with weights g has about the mean square sum_i (w_i g_i)^2 + b^2; behind
QK-norm keys have that of its weights. RoPE changes no mean square. These scales are powers of two,
by which nothing is rounded.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from safetensors import safe_open

from nanovllm.layers.attention import Attention
from nanovllm.models.causal_lm import CausalLM, DecoderLayer
from nanovllm.utils.checkpoint_files import Headers

_TARGET = 8.0  # root mean square of what is stored
# After a layer's attention, the names by which checkpoints have a scale of its queries, keys or
# values: those of llm-compressor, of vLLM's own layers, of ModelOpt, and of Quark.
_NAMES = ("{0}_scale", "attn.{0}_scale", "{0}_proj.{0}_scale", "{0}_proj.output_scale")
_OF_BOTH = "kv_scale"  # AutoFP8's, for keys and values alike
# Which rows of `kv_scales` each sets; queries are multiplied as they are.
_ROWS = {"q": None, "k": slice(0, 1), "v": slice(1, 2)}

# A layer's scales [2, num_kv_heads] float32, of keys and values: NaN where there are none.
GivenScales = dict[Attention, torch.Tensor]


def allocate_kv_scales(model: CausalLM, device: torch.device) -> None:
    """Give each layer's attention its `kv_scales`, for `set_kv_scales`."""
    for attention in model.modules():
        if isinstance(attention, Attention):
            attention.kv_scales = torch.ones(
                2, attention.num_kv_heads, dtype=torch.float32, device=device
            )


@torch.inference_mode()
def set_kv_scales(model: CausalLM) -> None:
    """Set all `kv_scales`, in place: those that were given, others by the weights as they are."""
    for layer in model.modules():
        if isinstance(layer, DecoderLayer):
            attention = layer.self_attn
            assert isinstance(attention, Attention) and attention.kv_scales is not None
            scales = _scales(attention, layer.input_layernorm.weight)
            if (given := attention.given_kv_scales) is not None:
                given = given.to(scales.device)
                scales = torch.where(given.isnan(), scales, given)
            attention.kv_scales.copy_(scales)


def kv_scale_names(model: CausalLM) -> frozenset[str]:
    """The names of all scales that a checkpoint may have beside the weights."""
    return frozenset(_places(model))


def read_kv_scales(model: CausalLM, headers: Headers) -> GivenScales:
    """What the files with these headers have for a model whose cache is in fp8, of the heads that
    are here; nothing for another model.

    Raises:
        ValueError: for a scale that is no positive number, of the wrong shape, or there twice; the
            message names it.
    """
    places, given = _places(model), _no_scales(model)
    source: dict[tuple[Attention, int], str] = {}
    for path, tensors in headers.items():
        for name in tensors:
            if not given or (place := places.get(name)) is None:
                continue
            here = f"{name!r} in {path}"
            for row in range(2)[place.rows]:
                if (other := source.setdefault((place.attention, row), here)) != here:
                    raise ValueError(f"the scale {here} is also there as {other}")
            with safe_open(path, framework="pt", device="cpu") as file:
                given[place.attention][place.rows] = place.checked(name, file.get_tensor(name))
    return given


def give_kv_scales(given: GivenScales) -> None:
    """Let `set_kv_scales` take these from now on, in place of any others."""
    for attention, scales in given.items():
        attention.given_kv_scales = scales


def take_kv_scales(
    model: CausalLM, weights: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """`weights` without the scales among them, which are given to the model.

    Raises:
        ValueError: as `read_kv_scales`.
    """
    places, given = _places(model), _no_scales(model)
    for name, tensor in weights.items() if isinstance(weights, Mapping) else weights:
        if name not in places or not isinstance(tensor, torch.Tensor):
            yield name, tensor
        elif given and (place := places[name]) is not None:
            attention = place.attention
            if attention.given_kv_scales is None:
                attention.given_kv_scales = given[attention]
            with torch.inference_mode():  # not around `weights`, the caller's own code
                attention.given_kv_scales[place.rows] = place.checked(name, tensor)


class _Place(NamedTuple):
    """Where a scale of a checkpoint goes.

    Attributes:
        attention: of the layer.
        rows: of its `kv_scales`.
        num_heads: key-value heads of the layer, on all ranks.
        heads: those that are here.
    """

    attention: Attention
    rows: slice
    num_heads: int
    heads: slice

    def checked(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The scales of the heads that are here, [heads] float32 on the host, of a tensor with one
        number for all heads or one for each."""
        if tensor.numel() not in (1, self.num_heads) or not tensor.is_floating_point():
            raise ValueError(
                f"tensor {name!r} has shape {list(tensor.shape)} and {tensor.dtype}: a scale is "
                f"one number, or one for each of {self.num_heads} key-value heads, in floating "
                "point"
            )
        scales = tensor.detach().flatten().to("cpu", torch.float32).expand(self.num_heads)
        if bad := [scale for scale in scales.tolist() if not 0 < scale < float("inf")]:
            raise ValueError(
                f"tensor {name!r} has {bad[0]}: a scale must be positive and finite; without the "
                "tensor it follows from the weights"
            )
        return scales[self.heads]


def _places(model: CausalLM) -> dict[str, _Place | None]:
    """Of each scale that a checkpoint may have, by its name, where it goes; None: nowhere."""
    places: dict[str, _Place | None] = {}
    for path, attention in model.named_modules():
        if not isinstance(attention, Attention):
            continue
        # As the keys' features are shared among ranks, so are the heads.
        view = attention.qkv_proj.checkpoint_views(f"{path}.qkv_proj")[f"{path}.k_proj.weight"]
        first, end, _ = view.part[0].indices(view.shape[0])
        head_dim = attention.head_dim
        num_heads, heads = view.shape[0] // head_dim, slice(first // head_dim, end // head_dim)
        rows_of = {form.format(x): rows for x, rows in _ROWS.items() for form in _NAMES}
        for suffix, rows in (rows_of | {_OF_BOTH: slice(0, 2)}).items():
            place = None if rows is None else _Place(attention, rows, num_heads, heads)
            # A network saved without its head has names without "model.".
            for name in (f"{path}.{suffix}", f"{path}.{suffix}".removeprefix("model.")):
                places[name] = place
    return places


def _no_scales(model: CausalLM) -> GivenScales:
    """Of each layer whose cache is in fp8."""
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    return {
        attention: torch.full(
            (2, attention.num_kv_heads), float("nan"), dtype=torch.float32, device="cpu"
        )
        for attention in attentions
        if attention.kv_scales is not None
    }


def _scales(attention: Attention, norm_weight: torch.Tensor) -> torch.Tensor:
    projection, head_dim = attention.qkv_proj, attention.head_dim
    parts = projection.parts.values()
    _, *weights = projection.dequantized_weight().split([*parts])
    biases = [None, None]
    if projection.bias is not None:
        _, *biases = projection.bias.split([*parts])
    squares = []
    for weight, bias in zip(weights, biases, strict=True):
        of_features = (weight.float() * norm_weight.float()).square().sum(dim=1)
        if bias is not None:
            of_features += bias.float().square()
        squares.append(of_features.view(-1, head_dim).mean(dim=1))
    if attention.k_norm is not None:
        squares[0] = attention.k_norm.weight.float().square().mean().expand_as(squares[0])
    sizes = torch.stack(squares).sqrt().clamp(min=1e-30)
    return torch.exp2((sizes / _TARGET).log2().round())
