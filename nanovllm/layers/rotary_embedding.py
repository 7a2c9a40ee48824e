"""Rotary position embedding (RoPE, Su et al. 2021, arXiv:2104.09864): the table of cosines and
sines, in every form that transformers knows."""

import math
from typing import Any, Protocol

import torch


class RopeConfig(Protocol):
    """What the frequencies of a model depend on, by the names of config.json."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def num_attention_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def max_position_embeddings(self) -> int: ...

    @property
    def rope_parameters(self) -> dict[str, Any]: ...

    @property
    def original_max_position_embeddings(self) -> int | None: ...


def rope_cos_sin(config: RopeConfig, max_len: int, device: torch.device) -> torch.Tensor:
    """The rotations of positions 0 to max_len - 1: [max_len, head_dim] float32, cos then sin.

    Frequencies that depend on the length of the text ("dynamic", "longrope") are taken for
    `max_len`, once, so that a sequence's result does not change as it grows.

    Raises:
        ValueError: for a rope type that transformers does not know, or parameters of no use to it.
    """
    head_dim = config.head_dim
    if config.rope_parameters["rope_type"] == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        inv_freq, scaling = 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0
    else:
        inv_freq, scaling = _scaled_frequencies(config, max_len)
    angles = torch.outer(torch.arange(max_len, dtype=torch.float32), inv_freq.float().cpu())
    return (torch.cat((angles.cos(), angles.sin()), dim=-1) * scaling).to(device)


def rotate_(x: torch.Tensor, cos_sin: torch.Tensor) -> None:
    """Rotate the pairs (x[i], x[i + half]) of the last dimension of `x`, in place.

    Args:
        x: [..., head_dim].
        cos_sin: rows of `rope_cos_sin`, to be broadcast over `x`.
    """
    cos, sin = cos_sin.chunk(2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    second_sin = second * sin
    second.mul_(cos).addcmul_(first, sin)
    first.mul_(cos).sub_(second_sin)


def _scaled_frequencies(config: RopeConfig, max_len: int) -> tuple[torch.Tensor, float]:
    """Inverse frequencies [head_dim / 2], and the factor of cosines and sines, of every rope type
    that transformers knows but the plain one."""
    from transformers import PretrainedConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters, rope_type = config.rope_parameters, config.rope_parameters["rope_type"]
    if rope_type not in ROPE_INIT_FUNCTIONS:
        known = sorted({"default", *ROPE_INIT_FUNCTIONS})
        raise ValueError(f"config.json asks for rope_type={rope_type!r}; known are {known}")
    theirs: Any = PretrainedConfig()
    for name in ("hidden_size", "num_attention_heads", "max_position_embeddings"):
        setattr(theirs, name, getattr(config, name))
    theirs.head_dim = config.head_dim
    if config.original_max_position_embeddings is not None:
        theirs.original_max_position_embeddings = config.original_max_position_embeddings
    theirs.rope_parameters = dict(parameters)
    if "default" in ROPE_INIT_FUNCTIONS:  # transformers 4 looks for its own names
        theirs.rope_scaling, theirs.rope_theta = dict(parameters), parameters["rope_theta"]
    try:
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope_type](
            theirs, torch.device("cpu"), seq_len=max_len
        )
        if not (inv_freq.isfinite().all() and math.isfinite(scaling)):
            raise ValueError("frequencies are not finite")
    except Exception as error:  # it checks little, and so may end in any way
        raise ValueError(
            f"config.json has rope parameters of no use, {parameters}: {error!r}"
        ) from error
    if len(inv_freq) != config.head_dim // 2:
        raise ValueError(
            f"config.json rotates {2 * len(inv_freq)} of head_dim={config.head_dim} dimensions; "
            "only rotary embeddings of the whole head are supported"
        )
    return inv_freq, scaling
