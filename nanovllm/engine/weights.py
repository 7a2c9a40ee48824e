"""A network's weights: memory for them on the device, and what fills it."""

from collections.abc import Iterable, Mapping

import torch

from nanovllm.config import Config
from nanovllm.layers.linear import Linear
from nanovllm.models import CausalLM
from nanovllm.quantization.fp8_weights import fp8_views
from nanovllm.quantization.kv_cache import (
    allocate_kv_scales,
    give_kv_scales,
    kv_scale_names,
    read_kv_scales,
    set_kv_scales,
    take_kv_scales,
)
from nanovllm.utils import loader
from nanovllm.utils.checkpoint_files import Headers
from nanovllm.utils.memory import available_host_memory


def allocate_weights(model: CausalLM, config: Config, headers: Headers) -> None:
    """Give a network memory on the device, for the weights of the files with these headers.

    Raises:
        ValueError, FileNotFoundError: for a checkpoint that cannot be loaded.
        RuntimeError: if there is no memory for it.
    """
    if headers:
        loader.check_weights(headers, _views(model, config), _ignored_tensors(model))
    # As `to_empty` would do, which imports sympy. A tied head gets memory too, and gives it back at
    # once. With that gap, later tensors lie where a step of one row takes 1% less time (see
    # docs/performance.md).
    parameters = model.state_dict()
    try:
        memory = {
            name: torch.empty_like(parameter, device=config.torch_device)
            for name, parameter in parameters.items()
        }
    except RuntimeError as error:
        num_bytes = sum(each.nbytes for each in parameters.values())
        raise RuntimeError(
            f"no memory for weights of {num_bytes / 2**30:.1f} GiB on {config.torch_device}: free "
            "memory there, or give a narrower dtype or a larger tensor_parallel_size"
        ) from error
    model.load_state_dict(memory, assign=True)
    model.requires_grad_(False).tie_weights()
    if config.kv_cache_dtype == "fp8":
        allocate_kv_scales(model, config.torch_device)


def fill_weights(model: CausalLM, config: Config, headers: Headers) -> None:
    """Load a network's weights: those of the files with these headers, random ones without any.

    Raises:
        ValueError: for a checkpoint that cannot be loaded.
    """
    if headers:
        load_weights(model, config, headers)
    else:
        views = fp8_views(model.checkpoint_views(), None)  # numbers in bf16, whatever a file has
        loader.fill_with_noise(views, config.model_config.initializer_range, config.seed)
    if config.kv_cache_dtype == "fp8":
        set_kv_scales(model)
    pack_weights(model, config)


def load_weights(model: CausalLM, config: Config, headers: Headers) -> None:
    """Fill a network's memory from the files with these headers. Scales of an fp8 cache that they
    have are used by the next `set_kv_scales`.

    Raises:
        ValueError: for a checkpoint that cannot be loaded, before anything is changed.
    """
    scales = read_kv_scales(model, headers)
    loader.load_weights(headers, _views(model, config), _ignored_tensors(model))
    give_kv_scales(scales)


def update_weights(
    model: CausalLM,
    config: Config,
    weights: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
) -> None:
    """The same from tensors, which need not be all: see `utils.loader.update_weights`."""
    others = take_kv_scales(model, weights)
    loader.update_weights(others, _views(model, config), model.ignored_tensors())


def pack_weights(model: CausalLM, config: Config) -> None:
    """On a CPU, give filled weights the forms in which its libraries multiply them fastest: two,
    for one row and for several, if the second takes no more than a quarter of the free memory."""
    if config.torch_device.type != "cpu":
        return
    linears, embedding = _linears_of(model), model.model.embed_tokens.weight
    num_bytes = sum(each.weight.nbytes for each in linears if each.weight is not embedding)
    has_room = num_bytes <= available_host_memory() // 4 // config.tensor_parallel_size
    for linear in linears:
        linear.pack(keep_plain=has_room or linear.weight is embedding)


def unpack_weights(model: CausalLM) -> None:
    """Undo that, so that weights can be written to."""
    for linear in _linears_of(model):
        linear.unpack()
    model.tie_weights()


def _linears_of(model: CausalLM) -> list[Linear]:
    return [module for module in model.modules() if isinstance(module, Linear)]


def _ignored_tensors(model: CausalLM) -> frozenset[str]:
    return model.ignored_tensors() | kv_scale_names(model)


def _views(model: CausalLM, config: Config) -> dict[str, loader.View]:
    """Where each tensor of a checkpoint goes."""
    return fp8_views(model.checkpoint_views(), config.fp8_blocks)
