"""Models of every family, and the ways in which an engine may get to transformers' tokens."""

from pathlib import Path
from typing import Any

from helpers.blocks import assert_blocks_consistent
from helpers.checkpoints import Reference, make_checkpoint, random_tokens
from nanovllm import LLM, SamplingParams

MAX_TOKENS = 20
MAX_MODEL_LEN = 640
LENGTHS = (1, 255, 256, 257, 512, 513, MAX_MODEL_LEN - 1)

# A model is a family and the options of its checkpoint (see `make_checkpoint`).
MODELS: dict[str, dict[str, Any]] = {
    "qwen3-tied-mha": {
        "family": "qwen3", "seed": 1, "tie_word_embeddings": True, "num_key_value_heads": 4,
    },
    "qwen3-bias-gqa2-dim64-sharded": {
        "family": "qwen3", "attention_bias": True, "head_dim": 64, "max_shard_size": "100KB",
    },
    "qwen3-tied-bias-gqa4-dim128": {
        "family": "qwen3", "tie_word_embeddings": True, "attention_bias": True,
        "num_key_value_heads": 1, "head_dim": 128,
    },
    "qwen3-gqa8-sharded": {
        "family": "qwen3", "num_attention_heads": 8, "num_key_value_heads": 1,
        "max_shard_size": "50KB",
    },
    "qwen2-tied-mha": {
        "family": "qwen2", "tie_word_embeddings": True, "num_key_value_heads": 4,
    },
    # The window is narrower than most prompts here, and turned off.
    "qwen2-gqa4-window-off-sharded": {
        "family": "qwen2", "num_key_value_heads": 1, "use_sliding_window": False,
        "sliding_window": 64, "max_shard_size": "100KB",
    },
    "llama-tied-gqa4-llama3-rope": {
        "family": "llama", "tie_word_embeddings": True, "num_key_value_heads": 1,
        "rope": {
            "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": MAX_MODEL_LEN // 2,
        },
    },
    "llama-gqa2-sharded": {"family": "llama", "max_shard_size": "100KB"},
    "llama-biases-dim64": {
        "family": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 64,
    },
    "mistral-gqa2": {"family": "mistral"},
    "mistral-tied-gqa8-dim64-sharded": {
        "family": "mistral", "tie_word_embeddings": True, "head_dim": 64,
        "num_attention_heads": 8, "num_key_value_heads": 1, "max_shard_size": "100KB",
    },
    "qwen3moe-renormalized-sharded": {
        "family": "qwen3_moe", "norm_topk_prob": True, "max_shard_size": "100KB",
    },
    "qwen3moe-tied-gqa4-dense-and-sparse": {
        "family": "qwen3_moe", "tie_word_embeddings": True, "num_key_value_heads": 1,
        "decoder_sparse_step": 2,
    },
    "qwen2moe-gqa2-dense-and-sparse": {"family": "qwen2_moe", "mlp_only_layers": [0]},
}  # fmt: skip


class Model:
    """A checkpoint and what transformers makes of it."""

    def __init__(self, path: Path, device: str, options: dict) -> None:
        self.path = make_checkpoint(path, **options)
        self.reference = Reference(self.path, device)
        self.device = device

    def check(self, llm: LLM, prompts: list[list[int]], max_tokens: int = MAX_TOKENS) -> list[dict]:
        """Generate, compare with the reference, and look at the blocks afterwards."""
        outputs = llm.generate(
            prompts, SamplingParams(temperature=0, max_tokens=max_tokens), use_tqdm=False
        )
        for prompt, output in zip(prompts, outputs, strict=True):
            num_tokens = min(max_tokens, llm.config.max_model_len - len(prompt))
            expected = self.reference.tokens(prompt, num_tokens)
            assert output["token_ids"] == expected, f"prompt of {len(prompt)} tokens"
            assert output["finish_reason"] == "length"
            assert output["num_prompt_tokens"] == len(prompt)
        manager = llm.scheduler.block_manager
        assert manager.num_free_blocks == len(manager.blocks)
        assert_blocks_consistent(manager, [])
        return outputs


def engine(model: Model, **options) -> LLM:
    settings = {"max_model_len": MAX_MODEL_LEN, "dtype": "float32", "device": model.device}
    return LLM(model.path, **settings | options)


def blocks_for(block_size: int, num_tokens: int) -> int:
    return -(-num_tokens // block_size)


def check_all_lengths(model: Model, **options) -> None:
    """Prompts around the block boundaries, unrelated ones and prefixes of one another, twice."""
    size = options.setdefault("kvcache_block_size", 256)
    prompts = [random_tokens(length, seed=length) for length in LENGTHS]
    prompts += [random_tokens(length, seed=1) for length in (256, 257, 513)]
    with engine(model, **options) as llm:
        model.check(llm, prompts)
        for prompt, output in zip(prompts, model.check(llm, prompts), strict=True):
            cacheable = (len(prompt) - 1) // size * size
            if options["num_kvcache_blocks"] >= 8 * blocks_for(size, MAX_MODEL_LEN):
                assert output["num_cached_tokens"] == cacheable, "a cold cache the second time"
            assert 0 <= output["num_cached_tokens"] <= cacheable


# Each of block size, room, chunking, batch width and scheduling order meets each other at least
# once, and by `-m slow` all of them meet each model.
WAYS = {
    "plain": {"num_kvcache_blocks": 40},
    "async": {"num_kvcache_blocks": 40, "async_scheduling": True},
    "small-blocks-chunked": {
        "kvcache_block_size": 16, "num_kvcache_blocks": 400, "max_num_batched_tokens": 100,
    },
    "small-blocks-full-async-chunked": {
        "kvcache_block_size": 16, "num_kvcache_blocks": 45, "max_num_batched_tokens": 33,
        "async_scheduling": True,
    },
    "full-two-at-once-chunked": {
        "num_kvcache_blocks": 4, "max_num_batched_tokens": 255, "max_num_seqs": 2,
    },
    "large-blocks-full-async-chunked": {
        "kvcache_block_size": 512, "num_kvcache_blocks": 3, "max_num_batched_tokens": 257,
        "async_scheduling": True,
    },
}  # fmt: skip


# Lengths such that all are admitted, and cannot all grow by MAX_TOKENS.
CROWDS = {
    16: ([12, 13, 14, 15], 6),
    256: ([250, 254, 7], 3),
    512: ([506, 510], 3),
}


def check_preemption(model: Model, block_size: int, **options) -> None:
    lengths, num_blocks = CROWDS[block_size]
    max_model_len = min(MAX_MODEL_LEN, num_blocks * block_size)
    prompts = [random_tokens(length, seed=100 + length) for length in lengths]
    with engine(
        model, kvcache_block_size=block_size, num_kvcache_blocks=num_blocks,
        max_model_len=max_model_len, **options,
    ) as llm:  # fmt: skip
        model.check(llm, prompts)
        assert llm.scheduler.num_preemptions > 0, "the test does not test what it says"
        model.check(llm, prompts)
