"""How the prefill kernel is called, and the sizes at which attention runs on a GPU."""

import torch

from helpers.kernel_inputs import BF16, FP16, FP32, PagedBatch
from nanovllm.kernels.prefill_attention import paged_prefill


def prefill(function, batch: PagedBatch) -> torch.Tensor:
    longest = (batch.max_seqlen_q,) if function is paged_prefill else ()
    return function(
        batch.q, batch.k_cache, batch.v_cache, batch.cu_seqlens_q, batch.context_lens,
        batch.block_tables, batch.scale, *longest,
    )  # fmt: skip


GPU_SIZES = [
    ((256, 16, 8, 128), BF16),
    ((16, 8, 1, 64), BF16),
    ((64, 16, 8, 128), FP16),
    ((48, 4, 4, 96), FP16),
    ((256, 16, 4, 128), FP32),
    ((16, 4, 2, 64), FP32),
    ((64, 8, 4, 256), BF16),
]
