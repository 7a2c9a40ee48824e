"""What can be said of a model before a module of it is built or a byte taken."""

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nanovllm.config import Config
from nanovllm.models.config import ModelConfig
from nanovllm.quantization.fp8_weights import use_fp8
from nanovllm.utils.checkpoint_files import Headers, check_num_layers, head_that_differs
from nanovllm.utils.memory import available_memory


def checked_model_config(config: Config, headers: Headers) -> ModelConfig:
    """The shape to build: that of config.json, but with a head of its own where the checkpoint has
    one, whatever config.json says. All ranks find the same.

    Args:
        headers: of the checkpoint's files; none for random weights.

    Raises:
        ValueError: if the checkpoint has fewer layers.
        RuntimeError: if there is no memory for dummy weights.
    """
    model_config = config.model_config
    if not headers:
        check_memory(config)
        return model_config
    check_num_layers(headers, model_config.num_hidden_layers)
    if model_config.tie_word_embeddings and (path := head_that_differs(headers)) is not None:
        warnings.warn(
            "config.json has tie_word_embeddings=true, but lm_head.weight in "
            f"{path} is not the embedding's matrix: it is used as it is there",
            stacklevel=2,
        )
        return replace(model_config, tie_word_embeddings=False)
    return model_config


def check_memory(config: Config) -> None:
    """Raises:
    RuntimeError: if the weights do not fit into the memory that is free.
    """
    ranks = config.tensor_parallel_size
    on_cpu = config.torch_device.type == "cpu"  # which all ranks share
    needed = weight_bytes(config) // (1 if on_cpu else ranks)
    available = available_memory(config.torch_device)
    if needed > available:
        raise RuntimeError(
            f"no memory for the weights: they take {needed / 2**30:.1f} GiB"
            f"{'' if on_cpu or ranks == 1 else ' on each GPU'}, and {available / 2**30:.1f} GiB "
            f"are free on {config.torch_device}; check the sizes in config.json, or give a "
            "narrower dtype or a larger tensor_parallel_size"
        )


def weight_bytes(config: Config) -> int:
    """Bytes of all weights of the model. It has a layer many times: one of each kind is made."""
    model_class, model_config = config.model_class, config.model_config
    make_layer: Any = model_class.layer_class
    with torch.device("meta"):
        ends = model_class(replace(model_config, num_hidden_layers=0)).to(config.torch_dtype)
        total = _num_bytes(ends)
        for index, count in model_config.layer_kinds().items():
            layer = make_layer(model_config, index).to(config.torch_dtype)
            if config.has_fp8_weights:
                use_fp8(layer, config.fp8_blocks, f"model.layers.{index}")
            total += count * _num_bytes(layer)
    return total


def _num_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
