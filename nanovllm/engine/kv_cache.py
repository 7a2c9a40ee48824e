"""The KV cache: its memory, and how many blocks of it fit."""

import torch

from nanovllm.config import Config
from nanovllm.models.causal_lm import LayerCacheSpec
from nanovllm.utils.context import LayerCache
from nanovllm.utils.memory import GPU_RESERVE, available_host_memory, total_gpu_memory


def allocate_kv_cache(
    config: Config, specs: list[LayerCacheSpec], num_blocks: int
) -> list[LayerCache]:
    """Of each layer keys and values, each [num_blocks, block_size, num_kv_heads, head_dim].

    On a CPU the memory goes head by head, and so the keys of a head in consecutive blocks are one
    matrix, which attention can read where it is: the tensors are permuted views.

    Raises:
        RuntimeError: if there is no memory for it.
    """
    (num_kv_heads, head_dim) = specs[0]
    assert all(spec == specs[0] for spec in specs), "all layers cache the same"
    block_size, device = config.kvcache_block_size, config.torch_device
    on_cpu = device.type == "cpu"
    shape = (2, len(specs), num_blocks, block_size, num_kv_heads, head_dim)
    if on_cpu:
        shape = (2, len(specs), num_kv_heads, num_blocks, block_size, head_dim)
    try:
        cache = torch.empty(shape, dtype=config.kv_torch_dtype, device=device)
    except RuntimeError as error:
        raise RuntimeError(
            f"no memory for a KV cache of {num_blocks} blocks of {block_size} tokens: lower "
            "num_kvcache_blocks or kvcache_block_size"
        ) from error
    if on_cpu:
        cache = cache.permute(0, 1, 3, 4, 2, 5)
    keys, values = cache
    return [*zip(keys, values, strict=True)]


def max_blocks(config: Config, specs: list[LayerCacheSpec]) -> int:
    """More KV blocks than these there will not be; at least 1."""
    if config.num_kvcache_blocks is not None:
        return config.num_kvcache_blocks
    device = config.torch_device
    memory = available_host_memory() if device.type == "cpu" else total_gpu_memory(device)
    return max(1, memory // _block_bytes(config, specs))


def num_fitting_blocks(
    config: Config, specs: list[LayerCacheSpec], step_bytes: int, in_use_before: int
) -> int:
    """How many KV blocks fit into the memory that is really free, within this engine's share.

    Args:
        step_bytes: what a step needs at the most besides weights, inputs and cache. Of a GPU only.
        in_use_before: bytes of the GPU that were taken when the engine began, by whomever.

    Raises:
        RuntimeError: if there is no room for one.
    """
    device, block_bytes = config.torch_device, _block_bytes(config, specs)
    if device.type == "cpu":
        # A quarter of what is there, for all ranks together; never more than all sequences at full
        # length could use.
        wanted = config.max_num_seqs * -(-config.max_model_len // config.kvcache_block_size)
        share = available_host_memory() // 4 // config.tensor_parallel_size
        num_blocks = min(wanted, share // block_bytes)
        way_out = "lower kvcache_block_size, give num_kvcache_blocks, or free memory"
    else:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        in_use = total - free - in_use_before
        share = int(total * config.gpu_memory_utilization) - in_use
        num_blocks = (min(share, free) - step_bytes - GPU_RESERVE) // block_bytes
        way_out = (
            "raise gpu_memory_utilization, lower max_num_batched_tokens or max_num_seqs, or free "
            "memory on the device"
        )
    if num_blocks < 1:
        raise RuntimeError(f"no memory left for the KV cache: {way_out}")
    return num_blocks


def _block_bytes(config: Config, specs: list[LayerCacheSpec]) -> int:
    """Of a block's keys and values, in all layers."""
    itemsize = config.kv_torch_dtype.itemsize
    return 2 * config.kvcache_block_size * itemsize * sum(h * d for h, d in specs)
