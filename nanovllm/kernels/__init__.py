"""Triton kernels, one idea a file. Layers take them where they can run, by `utils.kernels`.

Without this package, or without Triton, the engine is slower and still right: each layer has its
formula in plain torch. A kernel's file opens with what it computes, its grid, the bytes that it
moves and what bounds it.
"""

import triton

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5):
    raise ImportError(f"nanovllm's kernels need triton 3.5 or later, found {triton.__version__}")

from nanovllm.kernels.activation import silu_and_mul
from nanovllm.kernels.all_reduce import BLOCK as PUSH_BLOCK
from nanovllm.kernels.all_reduce import SLOTS as PUSH_SLOTS
from nanovllm.kernels.all_reduce import (
    all_reduce,
    all_reduce_add,
    best_of_ranks,
    wait_for,
)
from nanovllm.kernels.compiling import Compiler
from nanovllm.kernels.decode_attention import num_decode_ranges, paged_decode
from nanovllm.kernels.decode_plan import (
    FUSED_ROWS,
    DecodePlan,
    PlanWords,
    decode_tile,
    max_plan_words,
    num_spans,
    plan_decode,
)
from nanovllm.kernels.edit_logits import edit_logits
from nanovllm.kernels.embedding import embed
from nanovllm.kernels.experts import apply_experts
from nanovllm.kernels.fp8_rows import quantize_rows
from nanovllm.kernels.gated_gemm import MIN_ROWS as GATED_MIN_ROWS
from nanovllm.kernels.gumbel import gumbel_sample, gumbel_winners
from nanovllm.kernels.layernorm import rms_norm, rms_norm_in_fp8
from nanovllm.kernels.linear import add_matmul, gated_matmul, matmul, store_matmul, summands
from nanovllm.kernels.logprobs import MOST_TOP, token_logprobs
from nanovllm.kernels.paged_cache import MAX_HEAD_DIM
from nanovllm.kernels.prefill_attention import paged_prefill
from nanovllm.kernels.prefill_plan import PrefillPlan, max_prefill_words
from nanovllm.kernels.rope_store import qk_norm_rope_store
from nanovllm.kernels.route import route
from nanovllm.kernels.truncate import truncation_thresholds

__all__ = [
    "FUSED_ROWS", "GATED_MIN_ROWS", "MAX_HEAD_DIM", "MOST_TOP", "PUSH_BLOCK", "PUSH_SLOTS",
    "Compiler", "DecodePlan", "PlanWords", "PrefillPlan", "add_matmul", "all_reduce",
    "all_reduce_add", "apply_experts", "best_of_ranks", "decode_tile", "edit_logits", "embed",
    "gated_matmul", "gumbel_sample", "gumbel_winners", "matmul", "max_plan_words",
    "max_prefill_words", "num_decode_ranges", "num_spans", "paged_decode", "paged_prefill",
    "plan_decode", "qk_norm_rope_store", "quantize_rows", "rms_norm", "rms_norm_in_fp8", "route",
    "silu_and_mul", "store_matmul", "summands", "token_logprobs", "truncation_thresholds",
    "wait_for",
]  # fmt: skip
