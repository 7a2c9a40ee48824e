"""Compile all that a step of a model launches, for GPUs that need not be there.

    PYTHONPATH=.:tests python -m helpers.compile_models        # two samples: one or two minutes
    PYTHONPATH=.:tests python -m helpers.compile_models --all  # every family on every GPU

A step is run by the model itself on stand-ins for tensors (see `compile_launches`), so that what is
compiled is what would be launched: which kernels were chosen, with which constants. Each program
must fit into the GPU's shared memory.
"""

import argparse
from collections.abc import Iterable, Iterator
from math import prod
from typing import Any, NamedTuple

import torch

from helpers.compile_launches import (
    A100,
    CARDS,
    H100,
    RTX_3090,
    RTX_4090,
    RTX_5090,
    Card,
    CompiledLaunch,
    simulated,
)
from nanovllm.engine.step_inputs import StepInputs, StepShape
from nanovllm.kernels.split_k import MANY_PROGRAMS
from nanovllm.layers.attention_backends import TritonBackend
from nanovllm.layers.edit_tables import EditTables
from nanovllm.layers.sampler import Sampler
from nanovllm.models import find_model_class
from nanovllm.quantization.fp8_checkpoints import Fp8Blocks
from nanovllm.quantization.fp8_weights import use_fp8
from nanovllm.utils.context import Context

MODELS: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {
        "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    },
    "Qwen3-8B": {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    },
    "Qwen2.5-0.5B": {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
        "num_attention_heads": 14, "num_key_value_heads": 2,
    },
    "Llama-3.2-1B": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    },
    "Mistral-7B": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    },
    "Qwen1.5-MoE-A2.7B": {
        "model_type": "qwen2_moe", "hidden_size": 2048, "intermediate_size": 5632,
        "num_attention_heads": 16, "num_key_value_heads": 16, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632, "num_experts": 60, "num_experts_per_tok": 4,
    },
    # No published model of these families: the widest heads, and every bias.
    "head_dim 256": {
        "model_type": "llama", "hidden_size": 1024, "intermediate_size": 2048,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 256,
        "attention_bias": True, "mlp_bias": True,
    },
}  # fmt: skip
VOCAB_SIZE, MAX_MODEL_LEN, NUM_BLOCKS, BLOCK_SIZE = 151936, 4096, 1000, 256
PREFILLS = {0: (4, 100), -1: (4, 600)}  # sequences, tokens of each


class Step(NamedTuple):
    """A step to compile: rows of decode, or one of the PREFILLS."""

    card: Card
    model: str
    rows: int
    dtype: torch.dtype = torch.bfloat16
    weights: str = ""  # "fp8", or "blocks": fp8 as checkpoints have it


SAMPLE = [
    Step(H100, "Qwen3-0.6B", 8),
    Step(RTX_3090, "head_dim 256", 8),
    Step(RTX_4090, "Llama-3.2-1B", 0),
    Step(H100, "Qwen3-30B-A3B", 1),
    Step(H100, "Qwen3-0.6B", 1, weights="fp8"),
]
SECOND_SAMPLE = [
    Step(H100, "Qwen3-0.6B", 1),
    Step(A100, "Qwen2.5-0.5B", 0),
    Step(RTX_4090, "Llama-3.2-1B", 1),
    Step(RTX_5090, "Llama-3.2-1B", 0, torch.float32),
    *(Step(H100, "Qwen3-30B-A3B", rows) for rows in (0, 32)),
    Step(RTX_3090, "Qwen3-30B-A3B", 0),
    Step(H100, "Qwen3-0.6B", 8, weights="fp8"),
    Step(H100, "Qwen3-0.6B", 128, weights="blocks"),
    Step(RTX_4090, "Qwen3-0.6B", 0, weights="blocks"),
    Step(RTX_4090, "Qwen3-0.6B", 0, torch.float32, weights="fp8"),
    *(Step(H100, "Qwen3-30B-A3B", rows, weights="blocks") for rows in (0, 1)),
    *(Step(H100, model, -1) for model in ("Qwen3-0.6B", "Qwen2.5-0.5B")),
]


def launches_of(step: Step) -> list[CompiledLaunch]:
    """All that two layers, the head and sampling with edits and truncation launch."""
    content = {"num_hidden_layers": 2, "vocab_size": VOCAB_SIZE, "sliding_window": None}
    content |= MODELS[step.model]
    model_class = find_model_class(content)
    with torch.inference_mode(), simulated(step.card) as launched:
        config = model_class.config_class.from_json(content)
        before = torch.get_default_dtype()
        torch.set_default_dtype(step.dtype)
        try:
            with torch.device("cuda"):
                model = model_class(config).requires_grad_(False)
                if step.weights:
                    use_fp8(model.model.layers, Fp8Blocks() if step.weights == "blocks" else None)
        finally:
            torch.set_default_dtype(before)
        is_prefill = step.rows in PREFILLS
        rows, length = PREFILLS.get(step.rows, (step.rows, 1))
        heads, head_dim = config.num_key_value_heads, config.head_dim
        backend = TritonBackend(BLOCK_SIZE, heads, head_dim, step.card.device)
        shape = StepShape(
            is_prefill, rows, rows * length, 16 if is_prefill else 0, length, MAX_MODEL_LEN,
            truncates=True, edits=True, shares=not is_prefill and backend.may_share(rows),
        )  # fmt: skip
        device = torch.device("cuda")
        inputs = StepInputs.views(torch.empty(10**6, dtype=torch.int32, device=device), shape)
        cache = torch.empty(
            NUM_BLOCKS, BLOCK_SIZE, heads, head_dim, dtype=step.dtype, device=device
        )
        sampler = Sampler.__new__(Sampler)
        sampler.tokens = torch.empty(512, dtype=torch.int64, device=device)
        sampler.host_tokens = torch.empty(2, 512, dtype=torch.int64, device=device)
        sampler.edits = _edit_tables(512, device)
        context = Context(
            backend=backend, kv_cache=[(cache, cache)] * 2,
            cos_sin=torch.empty(MAX_MODEL_LEN, head_dim, dtype=torch.float32, device=device),
            is_prefill=is_prefill, positions=inputs.positions, slot_mapping=inputs.slot_mapping,
            context_lens=inputs.context_lens, block_tables=inputs.block_tables,
            cu_seqlens_q=inputs.cu_seqlens_q, max_seqlen_q=length, max_context_len=MAX_MODEL_LEN,
            metadata=(
                backend.prefill_metadata(inputs.rest, rows, shape.tokens, length, MAX_MODEL_LEN)
                if is_prefill
                else backend.decode_metadata(inputs.rest, rows, shape.shares)
            ),
            logits_indices=inputs.cu_seqlens_q[1:] - 1 if is_prefill else None,
        )  # fmt: skip
        stream = model(inputs.input_ids, sampler.tokens, context)
        out = torch.empty(rows, VOCAB_SIZE, dtype=step.dtype, device=device)
        logits = model.compute_logits(stream, out)
        sampler.sample(logits, inputs.sampling(shape))
        places = torch.empty(rows, dtype=torch.int32, device=device)
        late = inputs.late_sampling(shape, slice(0, rows), places, places)
        sampler.sample(logits, late)
    return launched


def _edit_tables(rows: int, device: torch.device) -> EditTables:
    tables = EditTables(rows, device, VOCAB_SIZE)
    tables.options = torch.empty(rows + 1, 4, device=device)
    tables.seen = torch.empty(rows, VOCAB_SIZE, dtype=torch.int16, device=device)
    tables.bias = tables._logits = torch.empty(rows, VOCAB_SIZE, device=device)
    tables.masks = torch.empty(rows, tables.num_words, dtype=torch.int32, device=device)
    tables._is_allocated = True
    return tables


def all_steps() -> Iterator[Step]:
    for card in CARDS:
        for model in MODELS:
            for rows in (*PREFILLS, 1, 2, 4, 8, 32, 64, 128):
                for dtype in (torch.bfloat16, torch.float32):
                    yield Step(card, model, rows, dtype)
                if card.capability >= (8, 9):
                    for weights in ("fp8", "blocks"):
                        for dtype in (torch.bfloat16, torch.float32):
                            yield Step(card, model, rows, dtype, weights)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile what steps of models launch.")
    parser.add_argument("--all", action="store_true", help="every family on every GPU")
    compile_steps(all_steps() if parser.parse_args().all else [*SAMPLE, *SECOND_SAMPLE])


def compile_steps(steps: Iterable[Step]) -> None:
    """Raises:
    AssertionError: if a program of theirs does not fit.
    """
    for step in steps:
        launched = launches_of(step)
        largest = max(launched, key=lambda launch: launch.shared)
        too_large = [launch.name for launch in launched if not launch.fits]
        name = f"{step.card.name}, {step.model}, {PREFILLS.get(step.rows, step.rows)}, {step.dtype}"
        name += f", {step.weights}" * bool(step.weights)
        print(f"{name}: {len(launched)} launches, at most {largest.shared} bytes", flush=True)
        assert not too_large, f"{name}: {too_large} take more than {step.card.shared_per_program}"
        if step.card is H100 and step.dtype != torch.float32:  # which is not for speed
            for launch in launched:
                # In fp8 many programs do share one.
                is_many = bool(step.weights) and prod(launch.grid) >= MANY_PROGRAMS
                if "split_k" in launch.name and not is_many:
                    both = 2 * launch.shared
                    assert both > step.card.shared_per_program, "two share a multiprocessor"
    print("all compiled")


if __name__ == "__main__":
    main()
