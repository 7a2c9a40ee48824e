"""How the prefill kernel is called, and the sizes at which attention runs on a GPU."""

import numpy as np
import torch

from helpers.kernel_inputs import BF16, FP16, FP32, PagedBatch
from nanovllm.kernels.prefill_plan import PrefillPlan, max_prefill_words
from nanovllm.layers.paged_attention import prefill_attention


def prefill(function, batch: PagedBatch, **options) -> torch.Tensor:
    """`function` is `paged_prefill` or its twin, and `options` are its own."""
    where = batch.cu_seqlens_q, batch.context_lens
    if function is not prefill_attention:
        where = (prefill_plan(batch),)
    tables = batch.block_tables
    return function(batch.q, batch.k_cache, batch.v_cache, *where, tables, batch.scale, **options)


def prefill_plan(batch: PagedBatch) -> PrefillPlan:
    """On the device of the batch."""
    lengths, ends = np.array(batch.query_lens), batch.context_lens.cpu().numpy()
    sizes = len(lengths), int(lengths.sum()), batch.max_seqlen_q, batch.max_context_len
    buffer = np.full(max_prefill_words(*sizes[:2]), 10**6, np.int32)
    plan = PrefillPlan.views(buffer, *sizes)
    plan.fill(ends - lengths, lengths)
    return plan._replace(tiles=torch.from_numpy(plan.tiles).to(batch.q.device))


GPU_SIZES = [
    ((256, 16, 8, 128), BF16),
    ((16, 8, 1, 64), BF16),
    ((64, 16, 8, 128), FP16),
    ((48, 4, 4, 96), FP16),
    ((256, 16, 4, 128), FP32),
    ((16, 4, 2, 64), FP32),
    ((64, 8, 4, 256), BF16),
]
