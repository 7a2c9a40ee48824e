"""Which part of a model each rank has: together all of it, and what cannot be shared is refused."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanovllm.models import find_model_class
from nanovllm.parallel.sharding import check_shardable, shard, vocab_part

SHAPE = {
    "model_type": "llama", "vocab_size": 100, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4,
    "attention_bias": True, "mlp_bias": True,
}  # fmt: skip


MOE_SHAPE = SHAPE | {
    "model_type": "qwen3_moe", "num_hidden_layers": 2, "moe_intermediate_size": 8,
    "num_experts": 3, "num_experts_per_tok": 2, "mlp_only_layers": [0],
}  # fmt: skip

SHARED_SHAPE = MOE_SHAPE | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 16}


def network(content: dict[str, Any]):
    model_class = find_model_class(content)
    with torch.device("meta"):
        return model_class(model_class.config_class.from_json(content))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("vocab_size", [128, 151936, 49153])
def test_every_token_belongs_to_one_rank(vocab_size: int, size: int):
    parts = [vocab_part(vocab_size, rank, size) for rank in range(size)]
    assert parts[0].start == 0 and parts[-1].stop == vocab_size
    assert all(a.stop == b.start for a, b in pairwise(parts))
    assert all(part.start % 16 == 0 and part.start < part.stop for part in parts)
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) < 32


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize(
    "shape", [SHAPE, MOE_SHAPE, SHARED_SHAPE], ids=["dense", "experts", "shared expert"]
)
def test_the_parts_of_all_ranks_are_the_model(shape: dict[str, Any], size: int, is_tied: bool):
    """Each element of each tensor is on one rank; of keys and values, with more ranks than heads,
    on as many as share one; norms and routers are on all."""
    content = shape | {"vocab_size": 130, "tie_word_embeddings": is_tied}
    whole = network(content).checkpoint_views()
    counts = {name: torch.zeros(view.shape) for name, view in whole.items()}
    for rank in range(size):
        model = network(content)
        with torch.device("meta"):
            shard(model, SimpleNamespace(rank=rank, size=size))
        views = model.checkpoint_views()
        assert views.keys() == whole.keys()
        for name, view in views.items():
            assert view.shape == whole[name].shape, name
            part = counts[name][view.part]
            assert part.shape == view.memory.shape, name
            part += 1
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == is_tied
        specs = model.cache_specs()
        assert specs[0].num_kv_heads == max(1, 4 // size)
    for name, count in counts.items():
        on_all = ("o_proj.bias", "down_proj.bias", "mlp.gate.weight", "shared_expert_gate.weight")
        expected = size if "norm" in name or name.endswith(on_all) else 1
        if "k_proj" in name or "v_proj" in name:
            expected = max(1, size // 4)
        assert (count == expected).all(), name


def test_the_keys_of_a_rank_are_those_that_its_queries_attend_to():
    """8 heads and 4 key-value heads on 8 ranks: head r attends to r // 2."""
    for rank in range(8):
        model = network(SHAPE | {"vocab_size": 130})
        with torch.device("meta"):
            shard(model, SimpleNamespace(rank=rank, size=8))
        views = model.checkpoint_views()
        rows = {
            name: views[f"model.layers.0.self_attn.{name}_proj.weight"].part[0] for name in "qkv"
        }
        assert rows["q"] == slice(4 * rank, 4 * rank + 4)
        assert rows["k"] == rows["v"] == slice(rank // 2 * 4, rank // 2 * 4 + 4)


def test_experts_that_do_not_fit_are_refused():
    config = network(MOE_SHAPE | {"moe_intermediate_size": 6}).config
    check_shardable(config, 2)
    with pytest.raises(ValueError, match=r"moe_intermediate_size, 6, .*could be: \[1, 2\]"):
        check_shardable(config, 4)
    config = network(SHARED_SHAPE | {"shared_expert_intermediate_size": 6}).config
    with pytest.raises(ValueError, match=r"shared_expert_intermediate_size, 6, .*be: \[1, 2\]"):
        check_shardable(config, 4)


@pytest.mark.parametrize(
    ("size", "changes", "reason"),
    [
        (3, {}, "4 key-value heads are neither a multiple nor a divisor"),
        (2, {"intermediate_size": 25}, "intermediate_size, 25, is not a multiple"),
        (16, {}, "8 attention heads are not a multiple"),
        (8, {"intermediate_size": 32}, "needs 16 tokens of the vocabulary, which has 100"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(size: int, changes: dict, reason: str):
    config = network(SHAPE | changes).config
    with pytest.raises(ValueError, match=reason) as caught:
        check_shardable(config, size)
    fitting = {25: [1], 24: [1, 2, 4], 32: [1, 2, 4]}[config.intermediate_size]
    assert f"could be: {fitting}" in str(caught.value)
    for possible in fitting:
        check_shardable(config, possible)


def test_blocks_of_a_checkpoint_in_fp8_are_not_cut():
    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    content = SHAPE | {"head_dim": 48, "intermediate_size": 768, "quantization_config": blocks}
    config = network(content).config
    check_shardable(config, 1)
    with pytest.raises(ValueError, match=r"o_proj has blocks of 128 .* 192 inputs; could be: .1."):
        check_shardable(config, 2)
    blocks["modules_to_not_convert"] = ["o_proj"]
    config = network(content).config
    check_shardable(config, 2)
    with pytest.raises(ValueError, match=r"down_proj has blocks of 128 inputs, .* be: .1, 2."):
        check_shardable(config, 4)
