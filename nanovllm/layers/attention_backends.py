"""Who computes attention over the paged KV cache: this project's kernels, flash-attn, or torch.

"auto" takes what was measured to be the fastest that can run. On Hopper and later GPUs that is this
project's Triton kernels; on an older GPU flash-attn where it is installed (bf16 or fp16, block size
a multiple of 256, a head_dim it was built for), else Triton; on a CPU loops compiled by numba where
that is installed, else torch.

Unless it is given, the size of a KV block is what suits the backend. Only full blocks are found in
the prefix cache, so small ones reuse more: of a chat of short turns, blocks of 256 tokens reuse
nothing.
"""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from nanovllm.layers.deferred import Product
from nanovllm.layers.paged_attention import decode_attention, norm_rope_store, prefill_attention
from nanovllm.utils.context import AttentionSpec, Context, LayerCache
from nanovllm.utils.kernels import cpu_kernels_for, kernels

try:
    from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
except ImportError:
    flash_attn_with_kvcache = None

_FIRST_WITH_FP8 = (8, 9)
BLOCK_SIZE, FLASH_BLOCK_SIZE = 64, 256  # flash-attn takes multiples of 256
FP8_BLOCK_SIZE = 128  # a tile of decode attention


class AttentionBackend(ABC):
    """Everything between the projection to q/k/v and the one back to the stream.

    Attributes:
        name: as in `Config.attention_backend`.
        can_capture: whether its decode steps run inside a CUDA Graph.
        reads_tables_in_decode: whether decode steps need block tables; if not, the backend has
            metadata of its own in their place, prepared on the host with the step.

    Args:
        block_size: tokens of a KV block.
    """

    name: str
    can_capture = True
    reads_tables_in_decode = True

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size

    @abstractmethod
    def attend(
        self, qkv: Product, spec: AttentionSpec, cache: LayerCache, context: Context
    ) -> torch.Tensor:
        """QK-norm (if any) and RoPE of new queries and keys, their keys and values to the cache,
        and attention of each new token to its sequence up to itself.

        In prefill all keys and values of the step are stored before any is read, since rows may
        share blocks.

        Args:
            qkv: [tokens, (num_heads + 2 * num_kv_heads) * head_dim], still to be made.
            cache: keys and values of this layer, each [num_blocks, block_size, num_kv_heads,
                head_dim].

        Returns:
            [tokens, num_heads * head_dim].
        """

    def max_decode_words(self, rows: int, max_context_len: int) -> int:
        """The most int32 words that `prepare_decode` fills in for so many rows."""
        return 0

    def prepare_decode(
        self,
        buffer: np.ndarray,
        context_lens: np.ndarray,
        block_tables: np.ndarray,
        padded_rows: int,
        borders: np.ndarray | None = None,
        goes_on: bool = False,
    ) -> tuple[int, bool]:
        """Write the metadata of a decode step into a host buffer.

        Args:
            buffer: int32, of at least `max_decode_words`.
            context_lens: [rows], the newest token included.
            block_tables: [rows, width].
            padded_rows: the rows that will run; those past `rows` attend to nothing.
            borders: [rows], the tokens in full blocks that a row may share with others of its
                request; 0, or None for all rows: there are no others.
            goes_on: whether all is as in the last call, but each context a token longer.

        Returns:
            The words used, and whether rows read blocks that they share together.
        """
        return 0, False

    def decode_metadata(self, buffer: torch.Tensor, padded_rows: int, shares: bool = False) -> Any:
        """What `prepare_decode` wrote, as it lies in the device's copy of the buffer."""
        return None

    def may_share(self, padded_rows: int) -> bool:
        """Whether rows of a decode step may read blocks that they share together."""
        return False

    def max_prefill_words(self, rows: int, tokens: int) -> int:
        """The most int32 words that `prepare_prefill` fills in for so many rows and tokens."""
        return 0

    def prepare_prefill(self, buffer: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> int:
        """Write the metadata of a prefill step into a host buffer; returns the words used.

        Args:
            buffer: int32, of at least `max_prefill_words`.
            starts: [rows], where in its sequence each row's new tokens begin.
            lengths: [rows], how many there are.
        """
        return 0

    def prefill_metadata(
        self,
        buffer: torch.Tensor,
        rows: int,
        tokens: int,
        max_seqlen_q: int,
        max_context_len: int,
    ) -> Any:
        """What `prepare_prefill` wrote, as it lies in the device's copy of the buffer."""
        return None


class TorchBackend(AttentionBackend):
    """Plain torch, sequence by sequence: the reference, and what runs on any CPU."""

    name = "torch"
    can_capture = False  # it reads lengths on the host

    def attend(
        self, qkv: Product, spec: AttentionSpec, cache: LayerCache, context: Context
    ) -> torch.Tensor:
        store: Any = norm_rope_store
        args = _store_args(spec, cache, context)
        q = store(qkv.values(), *args, kv_scales=spec.kv_scales)
        lens, tables = context.context_lens, context.block_tables
        if context.is_prefill:
            starts = context.cu_seqlens_q
            out = prefill_attention(q, *cache, starts, lens, tables, spec.scale, spec.kv_scales)
        else:
            out = decode_attention(q, *cache, lens, tables, spec.scale, spec.kv_scales)
        return out.flatten(1)


class NumbaBackend(TorchBackend):
    """`layers.cpu_kernels`, for decode steps. A prompt's attention is made of large products, which
    torch makes. In a forked process torch does all."""

    name = "numba"

    def attend(
        self, qkv: Product, spec: AttentionSpec, cache: LayerCache, context: Context
    ) -> torch.Tensor:
        k_cache, _ = cache
        if (own := cpu_kernels_for(k_cache.device, k_cache.dtype)) is None:
            return super().attend(qkv, spec, cache, context)
        args = qkv.values(), *_store_args(spec, cache, context)
        where = context.context_lens, context.block_tables
        if not context.is_prefill:
            out = own.decode(*args, *where, spec.scale)
        else:
            q = own.norm_rope_store(*args)
            out = prefill_attention(q, *cache, context.cu_seqlens_q, *where, spec.scale)
        return out.flatten(1)


class TritonBackend(AttentionBackend):
    """This project's kernels. A step's metadata is the work list of `kernels.decode_plan` or of
    `kernels.prefill_plan`."""

    name = "triton"
    reads_tables_in_decode = False
    _last_plan: Any = None  # of `kernels.PlanWords`

    def __init__(
        self,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device,
        fp8_cache: bool = False,
    ) -> None:
        super().__init__(block_size)
        self.head_dim = head_dim
        self.fp8_cache = fp8_cache
        self.num_ranges: int = kernels.num_decode_ranges(device, num_kv_heads)

    def attend(
        self, qkv: Product, spec: AttentionSpec, cache: LayerCache, context: Context
    ) -> torch.Tensor:
        args = _store_args(spec, cache, context)
        if not context.is_prefill:
            plan = context.metadata
            out = kernels.paged_decode(qkv.values(), *args, plan, spec.scale, spec.kv_scales)
        else:
            q = qkv.stored(*args, spec.kv_scales)
            where = context.metadata, context.block_tables
            out = kernels.paged_prefill(q, *cache, *where, spec.scale, spec.kv_scales)
        return out.flatten(1)

    def max_decode_words(self, rows: int, max_context_len: int) -> int:
        return max(  # tiles differ
            kernels.max_plan_words(
                rows, max_context_len, self._tile(some), self.block_size, self.num_ranges
            )
            for some in {1, rows}
        )

    def prepare_decode(
        self,
        buffer: np.ndarray,
        context_lens: np.ndarray,
        block_tables: np.ndarray,
        padded_rows: int,
        borders: np.ndarray | None = None,
        goes_on: bool = False,
    ) -> tuple[int, bool]:
        last = self._last_plan
        if not (goes_on and last is not None and last.grow()):
            plan = kernels.plan_decode(
                context_lens, block_tables, self.block_size, self._tile(padded_rows),
                self.num_ranges, padded_rows, borders,
            )  # fmt: skip
            last = self._last_plan = kernels.PlanWords(plan, padded_rows, self._tile(padded_rows))
        buffer[: len(last.words)] = last.words
        return len(last.words), last.shares

    def decode_metadata(self, buffer: Any, padded_rows: int, shares: bool = False) -> Any:
        spans = kernels.num_spans(self._tile(padded_rows), self.block_size)
        return kernels.DecodePlan.views(buffer, padded_rows, self.num_ranges, spans, shares)

    def _tile(self, rows: int) -> int:
        return kernels.decode_tile(rows, self.head_dim, self.fp8_cache)

    def may_share(self, padded_rows: int) -> bool:
        return padded_rows > kernels.FUSED_ROWS

    def max_prefill_words(self, rows: int, tokens: int) -> int:
        words: int = kernels.max_prefill_words(rows, tokens)
        return words

    def prepare_prefill(self, buffer: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> int:
        sizes = len(lengths), lengths.sum(), lengths.max(), (starts + lengths).max()
        plan = kernels.PrefillPlan.views(buffer, *map(int, sizes))
        plan.fill(starts, lengths)
        size: int = plan.tiles.size
        return size

    def prefill_metadata(self, buffer: Any, *sizes: int) -> Any:
        return kernels.PrefillPlan.views(buffer, *sizes)


class FlashBackend(AttentionBackend):
    """flash-attn (Dao 2023, arXiv:2307.08691), an optional package."""

    name = "flash-attn"

    def attend(
        self, qkv: Product, spec: AttentionSpec, cache: LayerCache, context: Context
    ) -> torch.Tensor:
        q = qkv.stored(*_store_args(spec, cache, context))
        if context.is_prefill:
            cu_seqlens_k = F.pad(context.context_lens.cumsum(0), (1, 0))
            out = flash_attn_varlen_func(
                q, *cache,
                cu_seqlens_q=context.cu_seqlens_q, cu_seqlens_k=cu_seqlens_k.int(),
                max_seqlen_q=context.max_seqlen_q, max_seqlen_k=context.max_context_len,
                softmax_scale=spec.scale, causal=True, block_table=context.block_tables,
            )  # fmt: skip
        else:
            out = flash_attn_with_kvcache(
                q.unsqueeze(1), *cache, cache_seqlens=context.context_lens,
                block_table=context.block_tables, softmax_scale=spec.scale, causal=True,
            )  # fmt: skip
        return out.flatten(-2).view(len(q), -1)


def _store_args(spec: AttentionSpec, cache: LayerCache, context: Context) -> tuple[Any, ...]:
    """What `norm_rope_store`, and the kernels, take after q/k/v."""
    return (
        spec.q_weight, spec.k_weight, spec.eps, context.cos_sin, context.positions, *cache,
        context.slot_mapping,
    )  # fmt: skip


def make_backend(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    num_kv_heads: int,
    head_dim: int,
    block_size: int | None,
    fp8_cache: bool = False,
) -> AttentionBackend:
    """The backend that `select_backend` names, with its own default if `block_size` is None."""
    name = select_backend(name, device, dtype, head_dim, block_size, fp8_cache)
    if block_size is None:
        own = FP8_BLOCK_SIZE if fp8_cache else BLOCK_SIZE
        block_size = FLASH_BLOCK_SIZE if name == "flash-attn" else own
    if name == "triton":
        return TritonBackend(block_size, num_kv_heads, head_dim, device, fp8_cache)
    if name == "numba":
        return NumbaBackend(block_size)
    return FlashBackend(block_size) if name == "flash-attn" else TorchBackend(block_size)


def select_backend(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    block_size: int | None,
    fp8_cache: bool = False,
) -> str:
    """The backend asked for, or the best that can run if that is "auto".

    Raises:
        ValueError: if the one asked for cannot run, saying why.
    """
    obstacle_of = {
        "triton": lambda: _triton_obstacle(device, head_dim, fp8_cache),
        "flash-attn": lambda: _flash_obstacle(device, dtype, head_dim, block_size, fp8_cache),
        "numba": lambda: _numba_obstacle(device, dtype, fp8_cache),
        "torch": lambda: None,
    }
    order = ["triton", "flash-attn", "numba", "torch"]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        order = ["flash-attn", "triton", "torch"]
    if name == "auto":
        return next(backend for backend in order if obstacle_of[backend]() is None)
    if (obstacle := obstacle_of[name]()) is not None:
        others = [backend for backend in order if obstacle_of[backend]() is None]
        raise ValueError(f"attention_backend {name!r} cannot run: {obstacle}; could be: {others}")
    return name


def _triton_obstacle(device: torch.device, head_dim: int, fp8_cache: bool) -> str | None:
    if device.type != "cuda":
        return f"it needs a GPU, and device is {str(device)!r}"
    if kernels is None:
        return "triton is not installed, or older than 3.5"
    if head_dim > kernels.MAX_HEAD_DIM:
        return f"it has room for a head_dim of {kernels.MAX_HEAD_DIM} at most, got {head_dim}"
    if fp8_cache and torch.cuda.get_device_capability(device) < _FIRST_WITH_FP8:
        return "kv_cache_dtype='fp8' needs a GPU of compute capability 8.9 (Ada) or later"
    return None


def _numba_obstacle(device: torch.device, dtype: torch.dtype, fp8_cache: bool) -> str | None:
    if device.type != "cpu":
        return f"it needs a CPU, and device is {str(device)!r}"
    if fp8_cache:
        return "it reads no cache with kv_cache_dtype='fp8'"
    if cpu_kernels_for(device, torch.float32) is None:
        return "numba is not installed (pip install 'nanovllm[cpu]'), or cannot run here"
    if cpu_kernels_for(device, dtype) is None:
        return f"it computes in float32 and bfloat16 only, and dtype is {dtype}"
    return None


def _flash_obstacle(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    block_size: int | None,
    fp8_cache: bool,
) -> str | None:
    if device.type != "cuda":
        return f"it needs a GPU, and device is {str(device)!r}"
    if flash_attn_with_kvcache is None:
        return "flash-attn is not installed (pip install 'nanovllm[flash]')"
    if fp8_cache:
        return "it reads no cache with kv_cache_dtype='fp8'"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 and bfloat16 only, and dtype is {dtype}"
    if block_size is not None and block_size % FLASH_BLOCK_SIZE:
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
