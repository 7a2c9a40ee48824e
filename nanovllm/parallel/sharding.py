"""Which part of a model belongs to a rank.

Queries, keys and values go by heads, gate and up by columns; the projections after them, o_proj and
down_proj, take what their rank has made, so each rank has a summand of their output: one sum over
the ranks after attention, one after the MLP. Each rank has such a part of every expert, too, and of
a shared one. Embedding and output head go by tokens. Norms, routers and a shared expert's gate are
everywhere. With more ranks than key-value heads, several ranks have the same one.
"""

from nanovllm.layers.attention import Attention
from nanovllm.layers.mlp import GatedMLP
from nanovllm.layers.moe import SparseMoE
from nanovllm.models.causal_lm import CausalLM
from nanovllm.models.config import ModelConfig
from nanovllm.parallel.group import Group
from nanovllm.parallel.layers import (
    ColumnParallelLinear,
    ParallelExperts,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from nanovllm.quantization.fp8 import GROUP

_TOKENS = 16  # the vocabulary is cut at multiples: rows of logits begin at multiples of 16 bytes
_MOST_RANKS = 1024  # that are suggested
# The projection that has so many inputs, by the name of that size in config.json.
_DOWN_PROJECTIONS = {
    "intermediate_size": "mlp.down_proj", "moe_intermediate_size": "mlp.experts.0.down_proj",
    "shared_expert_intermediate_size": "mlp.shared_expert.down_proj",
}  # fmt: skip


def check_shardable(config: ModelConfig, size: int) -> None:
    """Raises:
    ValueError: if a model of this shape cannot be shared by `size` ranks.
    """
    if (obstacle := _obstacle(config, size)) is not None:
        sizes = range(1, min(config.num_attention_heads, _MOST_RANKS) + 1)
        fitting = [other for other in sizes if _obstacle(config, other) is None]
        raise ValueError(
            f"tensor_parallel_size={size} does not fit the model: {obstacle}; could be: {fitting}"
        )


def _obstacle(config: ModelConfig, size: int) -> str | None:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if kv_heads % size and size % kv_heads:
        return f"its {kv_heads} key-value heads are neither a multiple nor a divisor of it"
    if heads % size:
        return f"its {heads} attention heads are not a multiple of it"
    for name in config.inner_sizes:
        if getattr(config, name) % size:
            return f"its {name}, {getattr(config, name)}, is not a multiple of it"
    if config.vocab_size < _TOKENS * size:
        return f"each rank needs {_TOKENS} tokens of the vocabulary, which has {config.vocab_size}"
    return None if size == 1 else _cut_blocks(config, size)


def _cut_blocks(config: ModelConfig, size: int) -> str | None:
    """Whether ranks would cut the blocks of a checkpoint in fp8, whose inputs have one scale."""
    if (blocks := config.fp8_blocks) is None:
        return None
    inputs = {"self_attn.o_proj": config.num_attention_heads * config.head_dim}
    inputs |= {_DOWN_PROJECTIONS[name]: getattr(config, name) for name in config.inner_sizes}
    for name, number in inputs.items():
        paths = (f"model.layers.{index}.{name}" for index in range(config.num_hidden_layers))
        if number // size % GROUP and any(map(blocks.converts, paths)):
            return f"its {name} has blocks of {GROUP} inputs, and each rank {number // size} inputs"
    return None


def shard(model: CausalLM, group: Group) -> None:
    """Leave the part of this rank in a model that has no memory yet."""
    for module in model.modules():
        if isinstance(module, Attention):
            _shard_attention(module, group)
        elif isinstance(module, GatedMLP):
            _shard_mlp(module, group)
        elif isinstance(module, SparseMoE):
            part = _part(module.experts.inner_size, group)
            module.experts = ParallelExperts(module.experts, part, group)
    config = model.config
    tokens = vocab_part(config.vocab_size, group.rank, group.size)
    model.model.embed_tokens = VocabParallelEmbedding(model.model.embed_tokens, tokens, group)
    model.lm_head = VocabParallelHead(model.lm_head, tokens)
    model.tie_weights()


def vocab_part(vocab_size: int, rank: int, size: int) -> slice:
    """The tokens of a rank: as many as the others have, up to the multiples it is cut at."""
    pieces = -(-vocab_size // _TOKENS)
    first, end = (pieces * r // size * _TOKENS for r in (rank, rank + 1))
    return slice(first, min(end, vocab_size))


def _shard_attention(attention: Attention, group: Group) -> None:
    head_dim = attention.head_dim
    heads = _part(attention.num_heads, group)
    # Where ranks share a head, it is the one that their queries attend to.
    kv_heads = _part(attention.num_kv_heads, group)
    attention.num_heads = heads.stop - heads.start
    attention.num_kv_heads = kv_heads.stop - kv_heads.start
    q, kv = (slice(part.start * head_dim, part.stop * head_dim) for part in (heads, kv_heads))
    parts = {"q_proj": q, "k_proj": kv, "v_proj": kv}
    attention.qkv_proj = ColumnParallelLinear(attention.qkv_proj, parts)
    attention.o_proj = RowParallelLinear(attention.o_proj, q, group)


def _shard_mlp(mlp: GatedMLP, group: Group) -> None:
    part = _part(mlp.down_proj.in_features, group)
    mlp.gate_up_proj = ColumnParallelLinear(
        mlp.gate_up_proj, {name: part for name in mlp.gate_up_proj.parts}
    )
    mlp.down_proj = RowParallelLinear(mlp.down_proj, part, group)


def _part(number: int, group: Group) -> slice:
    """This rank's share of so many heads or features; one that it shares if there are too few."""
    first = number * group.rank // group.size
    return slice(first, first + max(1, number // group.size))
