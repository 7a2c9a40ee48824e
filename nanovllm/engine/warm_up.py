"""What a GPU does before the first request: libraries load, kernels compile, and the allocator
learns what a step needs at the most."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from nanovllm.engine.cuda_graphs import graph_sizes
from nanovllm.engine.step_inputs import StepShape
from nanovllm.layers.sampler import LOGPROB_ROWS
from nanovllm.utils.kernels import has_kernels, kernels

if TYPE_CHECKING:
    from nanovllm.engine.model_runner import ModelRunner


@torch.inference_mode()
def load_libraries(device: torch.device, dtype: torch.dtype) -> None:
    """Use a GPU for the first time: its context is made, and cuBLAS, torch's kernels and Triton's
    compiler load. Other Python threads can run during most of this.
    """
    with torch.cuda.device(device):
        ones = torch.ones(16, 16, dtype=dtype, device=device)
        (ones @ ones).sum()
        if has_kernels(ones):
            kernels.embed(ones[0].int(), ones[0].long(), ones)
        torch.cuda.synchronize()


def compile_ahead(runner: "ModelRunner", use_graphs: bool) -> list[StepShape]:
    """Have the kernels of all steps compiled by other threads, those of `warm_up` and of single
    prompts first, and the library's products loaded. Returns the decode shapes.

    Whatever the weights are by now: what is computed is of no use.
    """
    largest, inputs = _largest_prefill_shape(runner), runner.inputs
    sizes = [*reversed(graph_sizes(runner.config.max_num_seqs))]
    decode = [inputs.decode_shape(rows) for rows in (sizes if use_graphs else sizes[:1])]
    # What samples is the same kernels for all numbers of rows: one is enough.
    with_truncation = [shape._replace(truncates=True) for shape in decode]
    # So is what reads shared blocks.
    all_decode = decode + with_truncation
    with_sharing = [
        shape._replace(shares=True) for shape in all_decode if inputs.may_share(shape.rows)
    ]
    # Prompts of a token. Their number may be odd, which kernels tell from multiples of 16.
    prefill = [
        largest._replace(rows=rows, tokens=rows, max_seqlen_q=1)
        for rows in (3, 17, 33, 65, 129)
        if rows < sizes[0]
    ]
    in_order = [
        decode[0], largest, decode[-1], *_smaller_prefill_shapes(runner), *decode[1:-1],
        with_truncation[0], *with_sharing[:1], *prefill,
    ]  # fmt: skip
    decoder = runner.model.model
    layers = decoder.layers
    decoder.layers = torch.nn.ModuleList([layers[0], layers[-1]])  # they are much alike
    try:
        with runner.compiler.ahead():
            for shape in in_order:
                _run_padding(runner, shape)
    finally:
        decoder.layers = layers
    return all_decode + with_sharing


def warm_up(runner: "ModelRunner", use_graphs: bool) -> int:
    """Run the largest steps of each kind once, and what else has to run, on a cache of one block;
    returns the bytes that a step needs at the most.

    Nothing is written: all rows are padding as far as the KV cache is concerned.
    """
    prefill, decode = _largest_prefill_shape(runner), runner.largest_decode_shape()
    shapes = [decode, prefill, decode]
    # Where nothing is compiled ahead. Ranks would wait for each other here as in a request.
    if runner.compiler is None and runner.config.tensor_parallel_size == 1:
        shapes += _smaller_prefill_shapes(runner)
    # A step just too short for `gated_gemm` has gate and up in memory, and may need more than one
    # that is little longer.
    few = kernels.GATED_MIN_ROWS - 1 if kernels is not None else 0
    if few < prefill.tokens < 3 * few:
        shapes.append(_prefill_shape(runner, few))
    torch.cuda.reset_peak_memory_stats(runner.device)
    graph_bytes = 0  # of the first, a decode step
    for shape in shapes:
        logits = _run_padding(runner, shape)
        graph_bytes = graph_bytes or _activation_bytes(runner.device)
    sampler = runner.sampler
    # Not the sampled ones: the cache may hold NaN, with which nothing is sampled.
    some_tokens = sampler.tokens.new_zeros(LOGPROB_ROWS)
    k = 1 + (kernels.MOST_TOP if has_kernels(logits) else 0)  # the torch formula takes most
    sampler.logprobs_of(logits[:1].expand(LOGPROB_ROWS, -1), some_tokens, k)
    del logits
    torch.cuda.synchronize(runner.device)
    # The graphs' own pool holds a decode step's memory once more.
    step_bytes = _activation_bytes(runner.device) + (graph_bytes if use_graphs else 0)
    return step_bytes + sampler.edits.num_bytes  # which are taken when they are needed


def _largest_prefill_shape(runner: "ModelRunner") -> StepShape:
    return _prefill_shape(runner, runner.config.max_num_batched_tokens)


def _smaller_prefill_shapes(runner: "ModelRunner") -> list[StepShape]:
    """Steps of shorter prompts, which other kernels serve, or the same with other tiles."""
    largest, shapes = _largest_prefill_shape(runner), []
    for length in (63, 321, 1023):  # odd: see `compile_ahead`
        rows = min(3, runner.config.max_num_seqs, largest.tokens // length)
        if rows and length <= largest.max_seqlen_q:
            shape = largest._replace(max_seqlen_q=length, max_context_len=length)
            shapes.append(shape._replace(rows=rows, tokens=rows * length))
    return shapes


def _prefill_shape(runner: "ModelRunner", max_tokens: int) -> StepShape:
    """A prefill step of `max_tokens`, or as many as the engine takes, in as few rows as can be."""
    config = runner.config
    length = min(max_tokens, config.max_model_len - 1)
    tokens = min(max_tokens, config.max_num_seqs * length)
    rows, width, context = -(-tokens // length), runner.inputs.max_width, config.max_model_len
    return StepShape(True, rows, tokens, width, length, context)


def _run_padding(runner: "ModelRunner", shape: StepShape) -> torch.Tensor:
    """Run a step of padding rows, which write nowhere."""
    inputs = runner.inputs.view(shape)
    inputs.slot_mapping.fill_(-1)
    inputs.context_lens.fill_(shape.max_seqlen_q)
    starts = torch.arange(shape.rows + 1) * shape.max_seqlen_q
    inputs.cu_seqlens_q.copy_(starts.clamp_(max=shape.tokens))
    if shape.is_prefill:
        lengths = starts.diff().numpy()
        words = np.zeros(runner.backend.max_prefill_words(shape.rows, shape.tokens), np.int32)
        used = runner.backend.prepare_prefill(words, 0 * lengths, lengths)
        inputs.rest[:used].copy_(torch.from_numpy(words[:used]))
    logits = runner.run_shape(shape)
    runner.inputs.device.zero_()
    return logits


def _activation_bytes(device: torch.device) -> int:
    stats = torch.cuda.memory_stats(device)
    return stats["allocated_bytes.all.peak"] - stats["allocated_bytes.all.current"]
