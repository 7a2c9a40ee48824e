"""Gumbel-max sampling: the noise, the choice it makes, and the kernel against its torch twin.

Without a GPU the kernels run in Triton's interpreter, in float32 and float16 (it gets bfloat16
wrong). Tests marked `gpu` repeat them at the sizes of a real model, in bfloat16 too.
"""

import math
from itertools import product

import pytest
import torch
import triton
import triton.language as tl

from helpers.cases import slow
from helpers.kernel_inputs import (
    BF16,
    FP32,
    PHILOX_VECTORS,
    interpreted,
    normal,
    on_cpu,
    on_cpu_in_fp16,
    philox4x32,
)
from helpers.noise import noise_of_tokens
from nanovllm.kernels.gumbel import TILE, gumbel_sample
from nanovllm.layers import sampler

pytestmark = pytest.mark.usefixtures("poison")


# The noise


@triton.jit
def philox_kernel(out_ptr, seed, c0, c1, c2, c3):
    zeros = tl.zeros([16], tl.uint32)
    r0, r1, r2, r3 = tl.philox(
        tl.load(seed), zeros + tl.load(c0).to(tl.uint32), zeros + tl.load(c1).to(tl.uint32),
        zeros + tl.load(c2).to(tl.uint32), zeros + tl.load(c3).to(tl.uint32),
    )  # fmt: skip
    lanes = out_ptr + tl.arange(0, 16)
    tl.store(lanes, r0.to(tl.int64))
    tl.store(lanes + 16, r1.to(tl.int64))
    tl.store(lanes + 32, r2.to(tl.int64))
    tl.store(lanes + 48, r3.to(tl.int64))


def check_philox_kernel(device: str) -> None:
    for counter, key, expected in PHILOX_VECTORS:
        out = torch.zeros(4, 16, dtype=torch.int64, device=device)
        arguments = [as_int64(key[0] + (key[1] << 32)), *counter]
        philox_kernel[(1,)](out, *(torch.tensor([x], device=device) for x in arguments))
        assert [tuple(numbers) for numbers in out.T.tolist()] == [expected] * 16


def as_int64(unsigned: int) -> int:
    return unsigned - (unsigned >> 63 << 64)


@interpreted
def test_tritons_philox_gives_the_published_numbers() -> None:
    check_philox_kernel("cpu")


@pytest.mark.gpu
def test_tritons_philox_gives_the_published_numbers_gpu() -> None:
    check_philox_kernel("cuda")


def test_the_twins_philox_gives_the_published_numbers() -> None:
    for counter, key, expected in PHILOX_VECTORS:
        assert philox4x32(counter, key) == expected
    zero = torch.tensor(0)
    assert sampler._philox(zero, zero[None], zero)[:, 0].tolist() == [*PHILOX_VECTORS[0][2]]
    # The published vectors with other counters than (c0, c1, 0, 0) reach it through `philox4x32`.
    counters = [0, 1, 2**16, 2**32 - 1]
    for key, position in product([(0, 0), (7, 0), (2**32 - 1,) * 2], [0, 5, 2**31 - 1]):
        seed = torch.tensor(as_int64(key[0] + (key[1] << 32)))
        numbers = sampler._philox(seed, torch.tensor(counters), torch.tensor(position))
        expected = [philox4x32((counter, position, 0, 0), key) for counter in counters]
        assert [tuple(column) for column in numbers.T.tolist()] == expected


def test_noise_is_a_gumbel_number_for_every_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    edges = [0, 1, 2, 3, 127, 128, 2**23, 2**24 + 1, 4294967, 4294968, 2**31]
    spread = torch.arange(0, 2**32, 2**32 // (TILE - len(edges)))[: TILE - len(edges)]
    bits = torch.cat((torch.tensor(edges), spread))
    monkeypatch.setattr(sampler, "_philox", lambda *_: bits.view(4, -1))
    noise = noise_of_tokens(0, 0, TILE).double()
    u = (bits.double() + 0.5) / 2**32
    torch.testing.assert_close(noise, -(-(-u).log1p()).log(), atol=5e-5, rtol=1e-6)
    # The highest numbers round to u = 1: they may lose the draw, never win it.
    highest = torch.full((4, TILE // 4), 2**32 - 1)
    monkeypatch.setattr(sampler, "_philox", lambda *_: highest)
    assert noise_of_tokens(0, 0, TILE).max() < -2.8


def test_noise_has_the_moments_and_the_shape_of_a_gumbel_distribution() -> None:
    n = 50 * TILE
    noise = noise_of_tokens(1234, 17, n).double()
    variance = math.pi**2 / 6
    assert abs(noise.mean() - 0.577216) < 4 * math.sqrt(variance / n)
    assert abs(noise.var() - variance) < 4 * variance * math.sqrt(4.4 / n)  # kurtosis 5.4
    steps = torch.exp(-torch.exp(-noise.sort().values))  # uniform, by the distribution function
    distance = (steps - (torch.arange(n) + 0.5) / n).abs().max()
    assert distance < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov, one in a thousand


def test_noise_of_other_seeds_positions_and_tokens_is_independent() -> None:
    n = 8 * TILE
    seeds_and_positions = [(5, 3), (5, 4), (6, 3), (4, 3), (3, 5), (5 + 2**32, 3), (-5, 3)]
    uniform = torch.stack([
        torch.exp(-torch.exp(-noise_of_tokens(seed, position, n).double()))
        for seed, position in seeds_and_positions
    ])  # fmt: skip
    correlations = torch.corrcoef(uniform) - torch.eye(len(seeds_and_positions))
    assert correlations.abs().max() < 4.5 / math.sqrt(n)
    streams = torch.corrcoef(uniform[0].view(-1, 4, TILE // 4).transpose(0, 1).flatten(1))
    assert (streams - torch.eye(4)).abs().max() < 4.5 / math.sqrt(n / 4)
    neighbours = torch.corrcoef(torch.stack((uniform[0, 1:], uniform[0, :-1])))[0, 1]
    assert abs(neighbours) < 4.5 / math.sqrt(n)


# The choice


@pytest.mark.parametrize("spread", [0, 0.1, 1, 5, 20, 1000])
@pytest.mark.parametrize("vocab", [1, 7, TILE - 1, TILE, 2 * TILE + 1500])
def test_the_highest_of_all_is_found_though_few_have_noise(vocab: int, spread: float) -> None:
    rows = 6
    logits = spread * normal(rows, vocab, dtype=FP32, seed=vocab)
    logits[1::2] = logits[1::2].where(logits[1::2] >= spread, float("-inf"))
    temperatures = torch.tensor([0.3, 1, 2, 1e-5, 1e5, 1e30])
    seeds, positions = torch.arange(rows) + 2**40, torch.arange(rows, dtype=torch.int32)
    out = torch.zeros(rows, dtype=torch.int64)
    sampler.gumbel_sample(logits, temperatures, seeds, positions, out)
    scores = logits / temperatures[:, None]
    scores += torch.stack([noise_of_tokens(2**40 + row, row, vocab) for row in range(rows)])
    none_left = scores.amax(dim=1) == float("-inf")
    assert out.tolist() == scores.argmax(dim=1).where(~none_left, sampler.NONE_LEFT).tolist()


@pytest.mark.parametrize("temperature", [slow(0.5), slow(1.0), 2.0])
def test_sampled_frequencies_are_the_softmax(temperature: float) -> None:
    # A few possible tokens, from all four streams of both tiles.
    possible = torch.tensor([0, 1, 900, 1024, 2047, 2500, 3071, 4095, 4096, 4100])
    logits = torch.full((1, TILE + 5), float("-inf"))
    logits[0, possible] = normal(len(possible), dtype=FP32, seed=4)
    pairs = list(product([*range(20), *range(2**40, 2**40 + 20)], range(100, 150)))
    seeds, positions = torch.tensor(pairs).unbind(1)
    out = torch.zeros(len(pairs), dtype=torch.int64)
    temperatures = torch.full((len(pairs),), temperature)
    sampler.gumbel_sample(logits.expand(len(pairs), -1), temperatures, seeds, positions.int(), out)
    expected = (logits[0, possible].double() / temperature).softmax(0) * len(pairs)
    counts = (out[:, None] == possible).sum(0)
    assert counts.sum() == len(pairs)
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(possible) - 1) / 2, dtype=torch.float64)
    assert torch.special.gammaincc(freedom, chi_squared / 2) > 1e-3


# The kernel and its twin


def tied_logits(rows: int, vocab: int, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    return (normal(rows, vocab, dtype=FP32, seed=vocab) * 2).round().to(dtype).to(device)


def lowest_of_the_best(logits: torch.Tensor) -> torch.Tensor:
    ids = torch.arange(logits.shape[1], device=logits.device)
    best = logits == logits.max(dim=1, keepdim=True).values
    return torch.where(best, ids, logits.shape[1]).min(dim=1).values


SEEDS = [0, 1, 2**31, 2**32 + 1, -1, -(2**63), 2**63 - 1, 12345678901234]


def sample(function, logits: torch.Tensor, temperatures: list[float], positions: list[int]):
    """One token a row; row `i` has seed SEEDS[i % 8]. Of the kernel's three host buffers the second
    is written."""
    rows, device = len(logits), logits.device
    out = torch.full((rows,), -1, dtype=torch.int64, device=device)
    seeds = torch.tensor(SEEDS, device=device).repeat(-(-rows // len(SEEDS)))[:rows]
    args = (
        logits, torch.tensor(temperatures, device=device), seeds,
        torch.tensor(positions, dtype=torch.int32, device=device), out,
    )  # fmt: skip
    function(*args)
    if function is gumbel_sample:
        alone = out.clone()
        host_tokens = torch.full((3, rows + 2), -1, dtype=torch.int64, pin_memory=logits.is_cuda)
        function(*args, host_tokens, torch.ones(1, dtype=torch.int32, device=device))
        nothing, expected = [-1] * (rows + 2), [*out.tolist(), -1, -1]
        assert host_tokens.tolist() == [nothing, expected, nothing]
        assert torch.equal(out, alone)
    return out


@interpreted
@on_cpu
@pytest.mark.parametrize("function", [gumbel_sample, sampler.gumbel_sample])
@pytest.mark.parametrize("vocab", [1, 5, TILE, TILE + 1, 3 * TILE + 1500])
def test_greedy_takes_the_lowest_of_the_best(function, vocab: int, dtype: torch.dtype) -> None:
    logits = tied_logits(6, vocab, dtype)
    logits[5] = float("-inf")
    logits[5, -1] = -3.0
    tokens = sample(function, logits, [0.0] * 6, [7] * 6)
    assert tokens.tolist() == lowest_of_the_best(logits).tolist()


@interpreted
@on_cpu_in_fp16
@pytest.mark.parametrize("function", [gumbel_sample, sampler.gumbel_sample])
@pytest.mark.parametrize("vocab", [50, 2 * TILE + 1500])
@pytest.mark.parametrize("place", [0, -1])
def test_rows_without_a_token_to_sample_say_so(
    function, vocab: int, place: int, dtype: torch.dtype
) -> None:
    """One logit that is no number, or too large for one, is enough: the softmax has none then."""
    logits = normal(10, vocab, dtype=dtype)
    expected = sample(function, logits, [0.0, 1.0] * 5, [3] * 10).tolist()
    logits[:2, place], logits[2:4, place] = math.nan, math.inf
    expected[:4] = [sampler.NOT_FINITE] * 4
    logits[4:6] = -math.inf
    expected[4:6] = [sampler.NONE_LEFT] * 2
    logits[6:8] = math.nan
    expected[6:8] = [sampler.NOT_FINITE] * 2
    assert sample(function, logits, [0.0, 1.0] * 5, [3] * 10).tolist() == expected


@interpreted
@pytest.mark.parametrize("function", [gumbel_sample, sampler.gumbel_sample])
def test_of_two_equal_tokens_the_lower_wins(function) -> None:
    quarter = TILE // 4
    steps = [1, quarter, 2 * quarter, 3 * quarter, TILE, TILE + quarter + 1]
    lower = [0, 7, quarter + 5, 2 * quarter + 9, TILE - 1]
    pairs = [(token, token + step) for token, step in product(lower, steps)]
    logits = torch.zeros(len(pairs), 3 * TILE)
    for row, pair in enumerate(pairs):
        logits[row, list(pair)] = 1.0
    tokens = sample(function, logits, [0.0] * len(pairs), [0] * len(pairs))
    assert tokens.tolist() == [pair[0] for pair in pairs]


@interpreted
@on_cpu_in_fp16
@pytest.mark.parametrize("vocab", [1, 5, TILE, TILE + 1, 3 * TILE + 1500])
def test_sampled_tokens_are_the_twins(vocab: int, dtype: torch.dtype) -> None:
    logits = normal(16, vocab, dtype=dtype)
    logits[8:] = 0.0  # here the noise alone decides
    temperatures = [0.0, 0.3, 1.0, 2.0, 1.0, 0.0, 10.0, 1.0] + [1.0] * 8
    positions = [*range(8), *(10**6, 2**31 - 1, 0, 3, 3, 3, 4, 5)]
    tokens = sample(gumbel_sample, logits, temperatures, positions)
    assert (
        tokens.tolist() == sample(sampler.gumbel_sample, logits, temperatures, positions).tolist()
    )
    greedy = lowest_of_the_best(logits)
    assert tokens[0] == greedy[0] and tokens[5] == greedy[5]


def test_a_token_depends_on_its_own_row_only() -> None:
    logits = normal(4, 5000, dtype=FP32)
    together = sample(sampler.gumbel_sample, logits, [1.0, 0.0, 0.7, 2.0], [1, 2, 3, 4])
    out = torch.zeros(1, dtype=torch.int64)
    seeds, position = torch.tensor(SEEDS[2:3]), torch.tensor([3])
    sampler.gumbel_sample(logits[2:3], torch.tensor([0.7]), seeds, position, out)
    assert out[0] == together[2]


@pytest.mark.gpu
def test_sampled_tokens_are_the_twins_gpu() -> None:
    rows, vocab = 2000, 151936
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(rows, vocab, generator=generator, device="cuda").mul_(3)
    temperatures = [(0.0, 0.6, 1.0, 2.0)[row % 4] for row in range(rows)]
    positions = [(row * 37) % 40960 for row in range(rows)]
    tokens = sample(gumbel_sample, logits, temperatures, positions)
    expected = sample(sampler.gumbel_sample, logits, temperatures, positions)
    assert (tokens[::4] == lowest_of_the_best(logits[::4])).all()
    # Logarithms may differ in the last bit, and once in a great while decide.
    assert (tokens != expected).sum() < rows / 1000


@pytest.mark.gpu
def test_greedy_takes_the_lowest_of_the_best_gpu() -> None:
    logits = tied_logits(64, 151936, BF16, "cuda")
    tokens = sample(gumbel_sample, logits, [0.0] * 64, [0] * 64)
    assert torch.equal(tokens, lowest_of_the_best(logits))
