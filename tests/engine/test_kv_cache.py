"""The KV cache: its memory, and how many blocks of it fit."""

from pathlib import Path

import pytest
import torch

from helpers.checkpoints import edit_json
from helpers.engines import GREEDY, build
from nanovllm import LLM
from nanovllm.engine import kv_cache


def test_size_of_the_cache_is_computed_where_it_is_not_given(tiny: Path):
    with LLM(tiny, device="cpu", max_num_seqs=4, max_model_len=300) as llm:
        assert llm.model_runner.num_kvcache_blocks == 4 * 5  # all that four sequences could use
        assert len(llm.generate([1, 2], GREEDY, use_tqdm=False)[0]["token_ids"]) == 12


# Of `tiny` in float32: kinds, layers, tokens of a block, KV heads, their size, bytes.
BLOCK_BYTES = 2 * 2 * 16 * 2 * 32 * 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_has_keys_and_values_of_every_layer(tiny: Path, dtype: str):
    with build(
        tiny, kvcache_block_size=32, num_kvcache_blocks=7, max_model_len=64, dtype=dtype
    ) as llm:
        runner = llm.model_runner
        assert len(runner.kv_cache) == 2, "layers"
        for pair in runner.kv_cache:
            for cache in pair:
                # Seven blocks of 32 tokens, two KV heads of 32.
                assert cache.shape == (7, 32, 2, 32)
                assert cache.dtype == getattr(torch, dtype)
        assert runner.num_kvcache_blocks == 7


@pytest.mark.parametrize(("blocks_that_fit", "expected"), [(3, 3), (3.9, 3), (1e6, 4 * 40)])
def test_the_cache_takes_a_quarter_of_the_hosts_memory_at_most(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, blocks_that_fit: float, expected: int
):
    available = int(4 * blocks_that_fit * BLOCK_BYTES)
    monkeypatch.setattr(kv_cache, "available_host_memory", lambda: available)
    with build(tiny, num_kvcache_blocks=None, max_num_seqs=4) as llm:
        assert llm.model_runner.num_kvcache_blocks == expected


def test_positions_that_no_cache_could_hold_get_no_memory(
    tiny_copy: Path, monkeypatch: pytest.MonkeyPatch
):
    edit_json(tiny_copy / "config.json", max_position_embeddings=2**28)
    monkeypatch.setattr(kv_cache, "available_host_memory", lambda: 40 * BLOCK_BYTES)
    with build(tiny_copy, num_kvcache_blocks=None) as llm:
        assert len(llm.model_runner.cos_sin) == 40 * 16
        assert llm.config.max_model_len == 10 * 16, "a quarter"
        assert len(llm.generate([1, 2], GREEDY, use_tqdm=False)[0]["token_ids"]) == 12


def test_without_memory_for_a_block_there_is_no_engine(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kv_cache, "available_host_memory", lambda: 4 * BLOCK_BYTES - 1)
    with pytest.raises(RuntimeError, match=r"no memory left for the KV cache: .*num_kvcache_block"):
        build(tiny, num_kvcache_blocks=None)


def test_a_cache_that_does_not_fit_names_the_options_that_made_it_large(tiny: Path):
    with pytest.raises(RuntimeError, match=r"no memory for a KV cache of 2147483647 blocks of 256"):
        build(tiny, kvcache_block_size=256, num_kvcache_blocks=2**31 - 1)
