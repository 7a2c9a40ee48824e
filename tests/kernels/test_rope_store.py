"""QK-norm, RoPE and the way into the KV cache: the kernel and its twin against float64."""

import pytest
import torch

from helpers.kernel_inputs import (
    EPS,
    TOLERANCE,
    Sizes,
    cos_sin_table,
    interpreted,
    norm_rope_float64,
    normal,
    on_cpu,
    on_gpu,
    relative_error,
)
from nanovllm.kernels.rope_store import qk_norm_rope_store
from nanovllm.layers.paged_attention import norm_rope_store

pytestmark = pytest.mark.usefixtures("poison")


def check_qk_norm_rope_store(
    function, tokens: int, sizes: Sizes, dtype, device: str = "cpu", qk_norm: bool = True
):
    block_size, num_heads, num_kv_heads, head_dim = sizes
    num_blocks, max_len = -(-2 * tokens // block_size), 512
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(max_len, (tokens,), generator=generator).to(device, torch.int32)
    slots = torch.randperm(num_blocks * block_size, generator=generator)[:tokens].to(device)
    slots[::3] = -1
    cos_sin = cos_sin_table(max_len, head_dim, device)
    all_heads = num_heads + 2 * num_kv_heads
    qkv = normal(tokens, all_heads * head_dim, dtype=dtype, device=device) * 2
    q_weight, k_weight = (
        normal(head_dim, dtype=dtype, device=device, seed=s) if qk_norm else None for s in (1, 2)
    )
    # The block in front is not the cache's: slot -1 would be its last token.
    memory_shape = (1 + num_blocks, block_size, num_kv_heads, head_dim)
    k_memory, v_memory = (normal(*memory_shape, dtype=dtype, device=device, seed=s) for s in (3, 4))
    k_cache, v_cache = k_memory[1:], v_memory[1:]
    k_before, v_before, qkv_before = k_memory.clone(), v_memory.clone(), qkv.clone()
    q_out = function(
        qkv, q_weight, k_weight, EPS, cos_sin, positions, k_cache, v_cache, slots.int()
    )

    heads = qkv.view(tokens, all_heads, head_dim)
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    assert q_out.dtype == dtype
    assert torch.equal(qkv, qkv_before)
    assert relative_error(q_out, norm_rope_float64(q, q_weight, positions)) < TOLERANCE[dtype]

    def flat(cache: torch.Tensor) -> torch.Tensor:
        return cache.view(-1, num_kv_heads, head_dim)

    real = slots >= 0
    stored = slots[real]
    k_expected = norm_rope_float64(k, k_weight, positions)[real]
    assert relative_error(flat(k_cache)[stored], k_expected) < TOLERANCE[dtype]
    assert torch.equal(flat(v_cache)[stored], v[real])
    for memory, before in ((k_memory, k_before), (v_memory, v_before)):
        flat(memory[1:])[stored] = flat(before[1:])[stored]
        assert torch.equal(memory, before)  # what was not to be written is as it was


@interpreted
@on_cpu
@pytest.mark.parametrize("function", [qk_norm_rope_store, norm_rope_store])
@pytest.mark.parametrize(
    "sizes", [(16, 2, 2, 32), (48, 4, 2, 64), (16, 4, 1, 96), (64, 8, 1, 128), (256, 6, 2, 128)]
)
@pytest.mark.parametrize("qk_norm", [True, False])
def test_qk_norm_rope_store(function, sizes: Sizes, dtype: torch.dtype, qk_norm: bool) -> None:
    check_qk_norm_rope_store(function, 11, sizes, dtype, qk_norm=qk_norm)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("sizes", [(256, 16, 8, 128), (16, 8, 1, 64), (48, 4, 4, 96)])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_qk_norm_rope_store_gpu(sizes: Sizes, dtype: torch.dtype, qk_norm: bool) -> None:
    check_qk_norm_rope_store(qk_norm_rope_store, 1500, sizes, dtype, "cuda", qk_norm)
