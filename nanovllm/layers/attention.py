"""Attention over the paged KV cache: one call, three backends.

"auto" takes what was measured to be the fastest that can run. On Hopper and later GPUs that is this
project's Triton kernels; on an older GPU flash-attn where it is installed (bf16 or fp16, block size
a multiple of 256, a head_dim it was built for), else Triton; without a GPU torch.
"""

from typing import Protocol

import torch

from nanovllm.kernels._triton import HAS_TRITON
from nanovllm.kernels.paged_decode import paged_decode_torch, paged_decode_triton
from nanovllm.kernels.paged_prefill import paged_prefill_torch, paged_prefill_triton
from nanovllm.kernels.qk_norm_rope_store import qk_norm_rope_store
from nanovllm.utils.context import Context

try:
    from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
except ImportError:
    flash_attn_with_kvcache = None


Norms = tuple[torch.Tensor, torch.Tensor, float]  # weights of QK-norm, and its eps


class Attend(Protocol):
    """A backend: everything between the q/k/v and the output projection.

    QK-norm and RoPE of the new queries and keys, keys and values to their slots of one layer's
    cache, and attention: `qkv` [tokens, (heads + 2 * kv heads) * head_dim] -> [tokens, heads *
    head_dim]. In prefill all keys and values of the step are stored before any is read, since rows
    may share blocks.
    """

    def __call__(
        self, qkv: torch.Tensor, norms: Norms, k_cache: torch.Tensor, v_cache: torch.Tensor,
        context: Context, scale: float,
    ) -> torch.Tensor: ...  # fmt: skip


def attend_torch(qkv, norms, k_cache, v_cache, context, scale):
    q = _store(qkv, norms, k_cache, v_cache, context)
    tables = (context.context_lens, context.block_tables)
    if context.is_prefill:
        out = paged_prefill_torch(q, k_cache, v_cache, context.cu_seqlens_q, *tables, scale)
    else:
        out = paged_decode_torch(q, k_cache, v_cache, *tables, scale)
    return out.flatten(1)


def attend_triton(qkv, norms, k_cache, v_cache, context, scale):
    if context.is_prefill:
        q = _store(qkv, norms, k_cache, v_cache, context)
        out = paged_prefill_triton(
            q, k_cache, v_cache, context.cu_seqlens_q, context.context_lens, context.block_tables,
            scale, context.max_seqlen_q,
        )  # fmt: skip
    else:
        out = paged_decode_triton(
            qkv, *norms, context.cos_sin, context.positions, k_cache, v_cache,
            context.slot_mapping, context.decode_plan, scale,
        )  # fmt: skip
    return out.flatten(1)


def attend_flash(qkv, norms, k_cache, v_cache, context, scale):
    q = _store(qkv, norms, k_cache, v_cache, context)
    if context.is_prefill:
        cu_seqlens_k = torch.nn.functional.pad(context.context_lens.cumsum(0), (1, 0))
        out = flash_attn_varlen_func(
            q, k_cache, v_cache,
            cu_seqlens_q=context.cu_seqlens_q, cu_seqlens_k=cu_seqlens_k.int(),
            max_seqlen_q=context.max_seqlen_q, max_seqlen_k=context.max_context_len,
            softmax_scale=scale, causal=True, block_table=context.block_tables,
        )  # fmt: skip
    else:
        out = flash_attn_with_kvcache(
            q.unsqueeze(1), k_cache, v_cache, cache_seqlens=context.context_lens,
            block_table=context.block_tables, softmax_scale=scale, causal=True,
        )  # fmt: skip
    return out.flatten(-2).view(len(qkv), -1)


def _store(qkv, norms, k_cache, v_cache, context):
    """The queries; keys and values are stored."""
    return qk_norm_rope_store(
        qkv, *norms, context.cos_sin, context.positions, k_cache, v_cache, context.slot_mapping
    )


BACKENDS: dict[str, Attend] = {
    "flash-attn": attend_flash,
    "triton": attend_triton,
    "torch": attend_torch,
}


def select_backend(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int
) -> str:
    """The backend to use: the one asked for, or the best that can run if that is "auto".

    Raises:
        ValueError: if the one asked for cannot run, saying why.
    """
    obstacle_of = {
        "triton": lambda: _triton_obstacle(device),
        "flash-attn": lambda: _flash_obstacle(device, dtype, head_dim, block_size),
        "torch": lambda: None,
    }
    order = ["triton", "flash-attn", "torch"]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        order = ["flash-attn", "triton", "torch"]
    if name == "auto":
        return next(backend for backend in order if obstacle_of[backend]() is None)
    if (obstacle := obstacle_of[name]()) is not None:
        others = [backend for backend in order if obstacle_of[backend]() is None]
        raise ValueError(f"attention_backend {name!r} cannot run: {obstacle}; could be: {others}")
    return name


def _triton_obstacle(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it needs a GPU, and device is {str(device)!r}"
    return None if HAS_TRITON else "triton is not installed, or older than 3.5"


def _flash_obstacle(
    device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int
) -> str | None:
    if device.type != "cuda":
        return f"it needs a GPU, and device is {str(device)!r}"
    if flash_attn_with_kvcache is None:
        return "flash-attn is not installed (pip install 'nanovllm[flash]')"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 and bfloat16 only, and dtype is {dtype}"
    if block_size % 256:
        return f"it needs kvcache_block_size to be a multiple of 256, got {block_size}"
    try:  # builds differ in the head dims they hold
        cache = torch.zeros(1, 256, 1, head_dim, dtype=dtype, device=device)
        flash_attn_with_kvcache(
            cache[:, :1], cache, cache,
            cache_seqlens=torch.ones(1, dtype=torch.int32, device=device),
            block_table=torch.zeros(1, 1, dtype=torch.int32, device=device),
        )  # fmt: skip
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return f"the installed build does not run here with head_dim {head_dim}: {error}"
    return None
