"""Inputs for the kernel tests, and float64 answers computed without the code under test."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from helpers.cases import slow

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {FP32: 1e-5, FP16: 2e-3, BF16: 1e-2}
EPS = 1e-6
ROPE_THETA = 10000

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="for Triton's interpreter"
)
on_cpu = pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
# For tests that take long, of kernels that do no more in float32.
on_cpu_in_fp16 = pytest.mark.parametrize("dtype", [slow(FP32), FP16], ids=str)
on_gpu = pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)

Sizes = tuple[int, int, int, int]  # block size, query heads, kv heads, head dim


def normal(*shape: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The worst row's ||actual - expected|| / ||expected||; NaN if `actual` holds one."""
    actual, expected = actual.double().flatten(1), expected.double().flatten(1)
    assert actual.shape == expected.shape
    error = (actual - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-30)
    return error.max().item()


def poisoned(create: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`torch.empty` or `torch.empty_like`, but filled with what no result may contain."""

    def create_poisoned(*args, **kwargs) -> torch.Tensor:
        tensor = create(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -77)

    return create_poisoned


def rms_norm_float64(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return x * weight.double() / ((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt()


def rope_angles(max_len: int, head_dim: int) -> torch.Tensor:
    exponents = torch.arange(head_dim // 2).double() / (head_dim // 2)
    return torch.outer(torch.arange(max_len).double(), ROPE_THETA**-exponents)


def cos_sin_table(max_len: int, head_dim: int, device: str = "cpu") -> torch.Tensor:
    angles = rope_angles(max_len, head_dim)
    return torch.cat((angles.cos(), angles.sin()), dim=1).float().to(device)


def norm_rope_float64(
    heads: torch.Tensor, weight: torch.Tensor | None, positions: torch.Tensor
) -> torch.Tensor:
    """RMSNorm, if there is a weight, of [tokens, heads, head_dim], rotated as complex numbers."""
    normed = heads.double() if weight is None else rms_norm_float64(heads, weight, EPS)
    first, second = normed.chunk(2, dim=-1)
    angles = rope_angles(int(positions.max()) + 1, heads.shape[-1]).to(heads.device)
    rotation = torch.polar(torch.ones_like(angles), angles)[positions.long(), None]
    rotated = torch.complex(first, second) * rotation
    return torch.cat((rotated.real, rotated.imag), dim=-1)


@dataclass
class PagedBatch:
    """A ragged batch over a paged cache whose unwritten slots are all `filler`."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    cu_seqlens_q: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    scale: float
    query_lens: list[int]

    @property
    def max_seqlen_q(self) -> int:
        return max(self.query_lens)

    @property
    def max_context_len(self) -> int:
        return int(self.context_lens.max())

    def expected(self) -> torch.Tensor:
        """Causal attention of each query to its sequence, in float64; zero without a context."""
        out = torch.zeros_like(self.q, dtype=torch.float64)
        num_kv_heads = self.k_cache.shape[2]
        group = self.q.shape[1] // num_kv_heads
        start = 0
        for row, query_len in enumerate(self.query_lens):
            context_len = int(self.context_lens[row])
            if context_len:
                slots = self._slots(row, context_len)
                keys = torch.arange(context_len, device=slots.device)
                hidden = keys > keys[context_len - query_len :, None]
                for kv_head in range(num_kv_heads):
                    heads = slice(kv_head * group, (kv_head + 1) * group)
                    q = self.q[start : start + query_len, heads].double().transpose(0, 1)
                    k = self.k_cache.flatten(0, 1)[slots, kv_head].double()
                    v = self.v_cache.flatten(0, 1)[slots, kv_head].double()
                    scores = (q @ k.T * self.scale).masked_fill(hidden, float("-inf"))
                    attended = scores.softmax(-1) @ v
                    out[start : start + query_len, heads] = attended.transpose(0, 1)
            start += query_len
        return out

    def _slots(self, row: int, context_len: int) -> torch.Tensor:
        block_size = self.k_cache.shape[1]
        tokens = torch.arange(context_len, device=self.q.device)
        return (
            self.block_tables[row].long()[tokens // block_size] * block_size + tokens % block_size
        )


def paged_batch(
    query_lens: list[int],
    context_lens: list[int],
    sizes: Sizes,
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    filler: float = float("nan"),
) -> PagedBatch:
    """Random queries, keys and values, the blocks of all sequences shuffled through the cache."""
    block_size, num_heads, num_kv_heads, head_dim = sizes
    counts = [-(-context_len // block_size) for context_len in context_lens]
    num_blocks = sum(counts) + 2
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randperm(num_blocks, generator=generator)
    # Unused entries of a table name a block that nobody has written.
    block_tables = blocks[-1].repeat(len(counts), max(counts) + 1)
    written = torch.zeros(num_blocks * block_size, dtype=torch.bool)
    for row, (count, context_len) in enumerate(zip(counts, context_lens)):
        block_tables[row, :count] = blocks[sum(counts[:row]) :][:count]
        tokens = torch.arange(context_len)
        written[block_tables[row, tokens // block_size] * block_size + tokens % block_size] = True
    written = written.view(num_blocks, block_size, 1, 1).to(device)
    caches = [
        normal(num_blocks, block_size, num_kv_heads, head_dim, dtype=dtype, device=device, seed=s)
        for s in (seed + 1, seed + 2)
    ]
    k_cache, v_cache = (cache.masked_fill_(~written, filler) for cache in caches)
    cu_seqlens_q = torch.tensor([0, *query_lens]).cumsum(0)
    return PagedBatch(
        q=normal(sum(query_lens), num_heads, head_dim, dtype=dtype, device=device, seed=seed + 3),
        k_cache=k_cache,
        v_cache=v_cache,
        cu_seqlens_q=cu_seqlens_q.to(device, torch.int32),
        context_lens=torch.tensor(context_lens, dtype=torch.int32, device=device),
        block_tables=block_tables.to(device, torch.int32),
        scale=head_dim**-0.5,
        query_lens=query_lens,
    )


@dataclass
class DecodeBatch:
    """One new token a sequence, fresh from the projection: its key and value are not stored yet."""

    before: PagedBatch  # the cache without the new tokens; its q is of no use
    after: PagedBatch  # with them, and with the queries that attend, all in float64
    qkv: torch.Tensor
    q_weight: torch.Tensor | None
    k_weight: torch.Tensor | None
    cos_sin: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor

    @property
    def new_token(self) -> tuple:
        """The arguments that `qk_norm_rope_store` and the decode kernel share."""
        return (
            self.qkv, self.q_weight, self.k_weight, EPS, self.cos_sin, self.positions,
            self.before.k_cache, self.before.v_cache, self.slot_mapping,
        )  # fmt: skip


def decode_batch(
    context_lens: list[int],
    sizes: Sizes,
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    qk_norm: bool = True,
) -> DecodeBatch:
    """Padding rows, whose context is 0, come last."""
    _, num_heads, num_kv_heads, head_dim = sizes
    rows = len(context_lens)
    before = paged_batch([1] * rows, context_lens, sizes, dtype, device, seed)
    positions = (before.context_lens - 1).clamp(min=0)
    slots = torch.tensor(
        [before._slots(row, n)[-1] if n else -1 for row, n in enumerate(context_lens)],
        device=device,
    )
    qkv = normal(rows, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype, device=device)
    q_weight, k_weight = (
        normal(head_dim, dtype=dtype, device=device, seed=s) if qk_norm else None for s in (7, 8)
    )
    heads = qkv.view(rows, -1, head_dim)
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    q = norm_rope_float64(q, q_weight, positions)
    k = norm_rope_float64(k, k_weight, positions)
    k_cache, v_cache = before.k_cache.double(), before.v_cache.double()
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            k_cache.flatten(0, 1)[slot], v_cache.flatten(0, 1)[slot] = k[row], v[row].double()
            for cache in (before.k_cache, before.v_cache):
                cache.flatten(0, 1)[slot] = float("nan")
    return DecodeBatch(
        before, replace(before, q=q, k_cache=k_cache, v_cache=v_cache), qkv, q_weight, k_weight,
        cos_sin_table(max(context_lens) + 1, head_dim, device), positions.int(), slots.int(),
    )  # fmt: skip


# The published answers of Philox4x32-10 (Random123, kat_vectors): counter, key, four numbers.
PHILOX_VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox4x32(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 in Python's integers, after the paper (Salmon et al. 2011, section 4.3)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(high >> 32) ^ c[1] ^ k[0], high % 2**32, (low >> 32) ^ c[3] ^ k[1], low % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(c)
