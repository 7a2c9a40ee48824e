"""Rotary position embedding: the table of cosines and sines, in every form transformers knows."""

import copy

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def rope_cos_sin(config: PretrainedConfig, max_len: int, device: torch.device) -> torch.Tensor:
    """The rotations of positions 0 to max_len - 1: [max_len, head_dim] float32, cos then sin.

    Frequencies that depend on the length of the text ("dynamic", "longrope") are taken for
    `max_len`, once, so that a sequence's result does not change as it grows.

    Raises:
        ValueError: for a rope type that transformers does not know.
    """
    # transformers 5 keeps theta and scaling in rope_parameters, 4 apart.
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    parameters = parameters or {}
    if any(isinstance(value, dict) for value in parameters.values()):
        raise ValueError(f"config.json has rope parameters for kinds of layers: {parameters}")
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    theta = parameters.get("rope_theta") or getattr(config, "rope_theta", 10000.0)
    if rope_type == "default":
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
        inv_freq, scaling = 1.0 / theta**exponents, 1.0
    elif rope_type in ROPE_INIT_FUNCTIONS:
        if "default" in ROPE_INIT_FUNCTIONS:  # transformers 4 looks for its own names
            config = copy.copy(config)
            config.rope_scaling, config.rope_theta = parameters, theta
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope_type](
            config, torch.device("cpu"), seq_len=max_len
        )
    else:
        known = sorted({"default", *ROPE_INIT_FUNCTIONS})
        raise ValueError(f"config.json asks for rope_type={rope_type!r}; known are {known}")
    if len(inv_freq) != config.head_dim // 2:
        raise ValueError(
            f"config.json rotates {2 * len(inv_freq)} of head_dim={config.head_dim} dimensions; "
            "only rotary embeddings of the whole head are supported"
        )
    angles = torch.outer(torch.arange(max_len, dtype=torch.float32), inv_freq.float().cpu())
    return (torch.cat((angles.cos(), angles.sin()), dim=-1) * scaling).to(device)
