"""Attention to chunks that rows share: as without sharing, bit for bit, and as in float64."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from helpers.attention import GPU_SIZES
from helpers.compile_launches import run_compiler
from helpers.kernel_inputs import (
    FP16,
    FP32,
    TOLERANCE,
    DecodeBatch,
    Sizes,
    decode_batch,
    interpreted,
    relative_error,
)
from helpers.shared_blocks import Shared, share_in_batch, shared_pieces, with_own_blocks
from nanovllm.kernels import shared_plan
from nanovllm.kernels.decode_attention import paged_decode
from nanovllm.kernels.decode_plan import DecodePlan, decode_tile, plan_decode
from nanovllm.layers.paged_attention import decode_attention, in_fp8, norm_rope_store

pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture(autouse=True)
def rows_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter a row's product does not depend on how many others there are, as it does
    not with matrix instructions of one shape; NumPy's does."""

    def create_dot(self, a, b, d, *_) -> TensorHandle:
        rows = [np.matmul(row[None], b.data, dtype=d.data.dtype) for row in a.data]
        return TensorHandle(np.concatenate(rows) + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sharing spares enough, however little it is."""
    monkeypatch.setattr(shared_plan, "FEWEST_SPARED_TOKENS", 1)


def plan_of(batch: DecodeBatch, borders: Sequence[int] = (), num_ranges: int = 7) -> DecodePlan:
    """Of NumPy. Padding rows come last."""
    lens = batch.before.context_lens.cpu().numpy()
    real = np.count_nonzero(lens)
    tables = batch.before.block_tables[:real].cpu().numpy()
    block_size, _, head_dim = batch.before.k_cache.shape[1:]
    in_fp8 = batch.before.k_cache.dtype == torch.float8_e4m3fn
    tile = decode_tile(len(lens), head_dim, in_fp8)
    borders = np.array([*borders] or [0] * real)
    plan = plan_decode(lens[:real], tables, block_size, tile, num_ranges, len(lens), borders)
    counts = np.zeros(len(lens), dtype=np.int32)
    counts[:real] = plan.chunk_counts
    return plan._replace(chunk_counts=counts)


def decode(batch: DecodeBatch, plan: DecodePlan, kv_scales=None) -> torch.Tensor:
    """With a cache of its own, since the new tokens go there."""
    before, device = batch.before, batch.qkv.device
    caches = before.k_cache.clone(), before.v_cache.clone()
    batch = replace(batch, before=replace(before, k_cache=caches[0], v_cache=caches[1]))
    on_device = (None if part is None else torch.from_numpy(part).to(device) for part in plan)
    return paged_decode(*batch.new_token, DecodePlan(*on_device), before.scale, kv_scales)


def own_blocks(batch: DecodeBatch) -> DecodeBatch:
    """The same batch with a copy of every block for each row that has it."""
    k_cache, v_cache, tables = with_own_blocks(batch.before)
    before = replace(batch.before, k_cache=k_cache, v_cache=v_cache, block_tables=tables)
    lens = before.context_lens.tolist()
    slots = [before._slots(row, n)[-1] if n else -1 for row, n in enumerate(lens)]
    slots = torch.tensor(slots, dtype=torch.int32, device=batch.qkv.device)
    return replace(batch, before=before, slot_mapping=slots)


def shared_batch(lens: list[int], sizes: Sizes, shared: Sequence[Shared], dtype, device="cpu"):
    batch = decode_batch(lens, sizes, dtype, device)
    share_in_batch(batch, shared)
    return batch


CASES: dict[str, tuple[Sizes, list[int], list[Shared], list[int]]] = {
    "completions of two prompts": (
        (16, 2, 1, 32), [70] * 5 + [99] * 4, [(range(5), 64), (range(5, 9), 96)],
        [64] * 5 + [96] * 4,
    ),
    "a prefix within a prefix, and padding": (
        (16, 2, 2, 32), [290, 270, 300, 400, 140, 7, 0, 0], [(range(5), 128), ([0, 2, 3], 256)], [],
    ),
    "more rows than a piece has": ((64, 1, 1, 32), [131] * 36 + [1, 64], [(range(36), 128)], []),
    "chunks of several lengths": (
        (16, 4, 1, 64), [400, 530, 300, 600, 520], [(range(5), 288)], [0, 288, 0, 288, 288],
    ),
    "32 chunks": (
        (64, 1, 1, 32), [8192, 8190, 8200, 3, 4], [([2, 0], 1024), (range(2), 8128)], [],
    ),
    "five heads a kv head, of 96": ((48, 5, 1, 96), [200] * 7, [(range(7), 144)], [144] * 7),
    "eight heads a kv head": ((64, 8, 1, 32), [200] * 5, [(range(5), 192)], []),
    "sixteen heads a kv head, of 256": ((64, 16, 1, 256), [140] * 5, [([3, 1], 128)], []),
}  # fmt: skip


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_shared_chunks_give_each_row_what_it_has_alone(name: str) -> None:
    sizes, lens, shared, borders = CASES[name]
    batch = shared_batch(lens, sizes, shared, FP32)
    plan = plan_of(batch, borders)
    assert shared_pieces(plan)
    out = decode(batch, plan)
    assert relative_error(out, batch.after.expected()) < TOLERANCE[FP32]
    assert not out[batch.before.context_lens == 0].any()
    # With blocks of its own for every row, and the work dealt out otherwise.
    without = own_blocks(batch)
    plan = plan_of(without, borders, num_ranges=3)
    assert not shared_pieces(plan)
    assert torch.equal(decode(without, plan), out)


@interpreted
def test_a_row_alone_in_a_batch_of_the_same_class() -> None:
    lens = [130, 140, 300, 300, 131, 400]
    batch = shared_batch(lens, (16, 2, 1, 32), [(range(6), 128), ([2, 3, 5], 256)], FP32)
    out = decode(batch, plan_of(batch))
    assert torch.equal(decode(batch, plan_of(batch, num_ranges=1)), out)
    for row in (0, 3, 5):
        slots = torch.full_like(batch.slot_mapping, -1)
        slots[0] = batch.slot_mapping[row]
        lens = torch.zeros_like(batch.before.context_lens)
        lens[0] = batch.before.context_lens[row]
        before = replace(
            batch.before, context_lens=lens, block_tables=batch.before.block_tables[row:]
        )
        swap = [row, *range(1, 6)]
        alone = replace(
            batch, before=before, qkv=batch.qkv[swap], slot_mapping=slots,
            positions=batch.positions[swap],
        )  # fmt: skip
        assert torch.equal(decode(alone, plan_of(alone))[0], out[row])


@interpreted
@pytest.mark.parametrize("with_fp8", [False, True], ids=["fp16", "fp8"])
def test_sharing_in_narrow_types(with_fp8: bool) -> None:
    case = "eight heads a kv head" if with_fp8 else "completions of two prompts"
    check_narrow(*CASES[case], with_fp8)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sizes", [(128, 16, 8, 128), (16, 32, 8, 128), (64, 16, 2, 64), (64, 2, 1, 32)], ids=str
)
def test_sharing_in_fp8_gpu(sizes: Sizes) -> None:
    lens = [1300 + 13 * i for i in range(40)] + [9, 600]
    check_narrow(sizes, lens, [(range(40), 1280)], [1280] * 40 + [0] * 2, True, "cuda")


def check_narrow(sizes, lens, shared, borders, with_fp8: bool, device: str = "cpu") -> None:
    batch, scales = shared_batch(lens, sizes, shared, FP16, device), None
    if with_fp8:
        scales = torch.tensor([[0.0625] * sizes[2], [0.3] * sizes[2]], device=device)
        before = batch.before
        keys, values = (
            in_fp8(cache.flatten(0, 1), own).view_as(cache)
            for cache, own in zip((before.k_cache, before.v_cache), scales)
        )
        batch = replace(batch, before=replace(before, k_cache=keys, v_cache=values))
    plan = plan_of(batch, borders)
    assert shared_pieces(plan)
    out = decode(batch, plan, scales)
    without = own_blocks(batch)
    assert torch.equal(decode(without, plan_of(without, borders), scales), out)
    # The twin in torch, which writes the new tokens to the cache.
    before = batch.before
    q = norm_rope_store(*batch.new_token, kv_scales=scales)
    expected = decode_attention(
        q, before.k_cache, before.v_cache, before.context_lens, before.block_tables, before.scale,
        scales,
    )  # fmt: skip
    assert relative_error(out, expected) < TOLERANCE[FP16]


@pytest.mark.gpu
@pytest.mark.parametrize(("sizes", "dtype"), GPU_SIZES)
def test_sharing_changes_no_bit_gpu(sizes: Sizes, dtype: torch.dtype) -> None:
    common, most = 1024 // sizes[0] * sizes[0], 8320 // sizes[0] * sizes[0]
    lens = [common + 1 + 13 * i for i in range(40)] + [9, 600, most + 1, most + 100]
    shared = [(range(40), common), ([42, 43], most)]
    for padding, borders in ((0, [0] * 44), (2, [common] * 40 + [0] * 4), (100, [common] * 44)):
        batch = shared_batch(lens + [0] * padding, sizes, shared, dtype, "cuda")
        plan = plan_of(batch, borders, num_ranges=33)
        assert shared_pieces(plan)
        out = decode(batch, plan)
        assert relative_error(out, batch.after.expected()) < TOLERANCE[dtype]
        without = own_blocks(batch)
        assert torch.equal(decode(without, plan_of(without, borders, num_ranges=33)), out)


FACTS = """
import json, re
from collections import Counter

import torch
from helpers.compile_launches import CARDS, H100, launches
from nanovllm.kernels.decode_attention import paged_decode
from nanovllm.kernels.decode_plan import DecodePlan

int32, float32, fp8 = torch.int32, torch.float32, torch.float8_e4m3fn

def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

def facts(launch):
    counts = Counter()
    for instruction, two in re.findall(
        r"\\b((?:fma|sub|add|mul|ex2|mma)[.][a-z0-9.]*f32)(x2)?", launch.compiled.asm["ptx"]
    ):
        counts[instruction.split(".")[0]] += 2 if two else 1  # of a pair at once
    return {
        "name": launch.name, "spills": launch.spills, "fits": launch.fits, "grid": launch.grid,
        "registers": launch.registers, "shared": launch.shared,
        "layout": re.findall("#mma = .*", launch.compiled.asm["ttgir"]),
        "counts": counts,
    }

def launched(card, group, head_dim, cache_dtype=torch.bfloat16, dtype=torch.bfloat16):
    cache = empty(100, 128, 8, head_dim, dtype=cache_dtype)
    scales = empty(2, 8, dtype=float32) if cache_dtype == fp8 else None
    plan = DecodePlan(
        empty(34, dtype=int32), empty(64, dtype=int32), empty(400, 2, dtype=int32),
        empty(4, dtype=int32)[:1],
    )
    weight = empty(head_dim, dtype=dtype)
    found = launches(
        paged_decode, empty(64, (group + 2) * 8 * head_dim, dtype=dtype), weight, weight, 1e-6,
        empty(4096, head_dim, dtype=float32), empty(64, dtype=int32), cache, cache,
        empty(64, dtype=int32), plan, 0.088, scales, card=card,
    )
    return [facts(launch) for launch in found]

found = {card.name: launched(card, 2, 128) for card in CARDS}
found["fp8"] = launched(H100, 2, 128, fp8)
found["head_dim 256"] = launched(CARDS[1], 4, 256)
found["float32"] = launched(H100, 5, 128, float32, float32)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_it_compiles_for_all_cards_to_the_arithmetic_of_decode_attention(tmp_path: Path) -> None:
    """Twice as many rows of queries: twice as many of the same instructions. In fp8, as many."""
    found = json.loads(run_compiler(FACTS, tmp_path))
    for name, kernels in found.items():
        assert [kernel["name"] for kernel in kernels] == [
            "_qk_norm_rope_store_kernel", "_shared_kernel", "_decode_kernel", "_combine_kernel"
        ], name  # fmt: skip
        _, shared, decode, _ = kernels
        assert shared["fits"] and shared["spills"] == 0, name
        assert shared["layout"] == decode["layout"], name
        for name_of in ("fma", "sub", "ex2", "mma"):
            counts = shared["counts"].get(name_of, 0), decode["counts"].get(name_of, 0)
            assert counts[0] == (1 if name == "fp8" else 2) * counts[1], (name, name_of)
            assert counts[0] or (name, name_of) == ("float32", "mma")
    assert found["H100"][1]["grid"] == [1, 8, 33]
    for kernel in found["H100"][1:3]:  # two programs on a multiprocessor
        assert kernel["registers"] <= 255 and kernel["shared"] <= 113 * 1024
