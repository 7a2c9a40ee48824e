"""Sampling in one pass over the vocabulary, by the Gumbel-max trick (see arXiv:2110.01515).

    token = argmax_i (logits_i / temperature + g_i),   g_i = -log(E_i),  E_i = -log(1 - u_i)

draws token i with probability softmax(logits / temperature)_i and needs neither the softmax nor a
sort. The uniform numbers u_i come from Philox-4x32-10 (Salmon et al. 2011), keyed by the request's
seed with (i, position) as the counter, so a token depends on nothing but its own request. In
float32, 1 - u would be 1 for small u, and E zero: there the series u + u^2/2 + u^3/3 takes over.

Grid: (row, tile of 4096 tokens), then one program a row to pick the best tile. Bytes moved: the
logits once. Bound by arithmetic (the logarithms), by memory where temperature is 0.
"""

import torch
import torch.nn.functional as F

from nanovllm.kernels._triton import HAS_TRITON, launch_next, pdl, tl, triton, wait_for_previous

TILE = 4096  # token i draws number (i % TILE) // (TILE / 4) of Philox's four at one counter
MAX_NOISE = 23.0
_MASK32 = 0xFFFFFFFF


def gumbel_sample(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor,
    copies: torch.Tensor,
    turn: torch.Tensor,
    thresholds: torch.Tensor | None = None,
) -> None:
    """Sample one token a row into `out` [rows] int64; ties go to the lowest token id.

    Args:
        logits: [rows, vocab], any float dtype.
        temperatures: [rows] float32; 0 takes the most likely token.
        seeds: [rows] int64, one per request.
        positions: [rows] int32, the position in its sequence of the token being sampled.
        copies: [turns, rows or more] int64, written too: pinned host memory, which saves a copy.
        turn: [1] int32, the row of `copies` that is written.
        thresholds: [rows] float32, no token with a lower logit is sampled (see
            `kernels.truncate`).
    """
    args = (logits, temperatures, seeds, positions, out, copies, turn, thresholds)
    if logits.is_cuda and HAS_TRITON:
        gumbel_sample_triton(*args)
    else:
        gumbel_sample_torch(*args)


def gumbel_sample_torch(
    logits, temperatures, seeds, positions, out, copies, turn, thresholds=None
) -> None:
    out.copy_(logits.max(dim=-1).indices)  # the first of equals, as argmax; faster on a CPU
    for row in temperatures.nonzero().flatten().tolist():
        threshold = float("-inf") if thresholds is None else thresholds[row]
        scores = logits[row].float()
        scores = scores.where(scores >= threshold, float("-inf"))  # NaN too
        out[row] = _sample(scores / temperatures[row], seeds[row], positions[row])
    copies[turn.item(), : len(out)] = out


def _sample(scores: torch.Tensor, seed: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """The token with the highest of `scores` [vocab] and noise, which is drawn for those alone that
    may yet exceed the most likely token's."""
    tiles = F.pad(scores, (0, -len(scores) % TILE), value=float("-inf")).view(-1, 4, TILE // 4)
    by_counter = tiles.transpose(0, 1).flatten(1)
    best = by_counter.amax(dim=0)
    leader = best.argmax(dim=0, keepdim=True)
    to_beat = (by_counter[:, leader] + gumbel_noise(seed, position, leader)).max()
    counters = (best >= to_beat - MAX_NOISE).nonzero().flatten()
    noisy = by_counter[:, counters] + gumbel_noise(seed, position, counters)
    stream, index = (noisy == noisy.max()).nonzero().unbind(1)
    tile, place = counters[index] // (TILE // 4), counters[index] % (TILE // 4)
    return (tile * TILE + stream * (TILE // 4) + place).min()


def gumbel_noise(
    seed: torch.Tensor, position: torch.Tensor, counters: torch.Tensor
) -> torch.Tensor:
    """[4, counters] float32 standard Gumbel numbers, at most `MAX_NOISE`: the four that Philox
    makes at each of `counters` [counters] int64. `seed` and `position` are 0-d integers."""
    bits = _philox(seed, counters, position.to(torch.int64))
    u = bits.float().add_(0.5).mul_(2.0**-32)
    series = u * (1 + u * (0.5 + u * (1 / 3)))
    exponential = torch.where(u < 1e-3, series, -torch.log(1 - u))
    return exponential.log_().neg_()


def _philox(seed: torch.Tensor, counter0: torch.Tensor, counter1: torch.Tensor) -> torch.Tensor:
    """Philox-4x32-10 with counters (counter0, counter1, 0, 0): [4, n] int64 of 32 bits each."""
    c0, c1 = counter0, (counter1 & _MASK32).expand_as(counter0)
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        product0, product2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = ((product2 >> 32) & _MASK32) ^ c1 ^ k0
        c2 = ((product0 >> 32) & _MASK32) ^ c3 ^ k1
        c1, c3 = product2 & _MASK32, product0 & _MASK32
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return torch.stack((c0, c1, c2, c3))


def gumbel_sample_triton(
    logits, temperatures, seeds, positions, out, copies, turn, thresholds=None
) -> None:
    rows, vocab_size = logits.shape
    num_tiles = triton.cdiv(vocab_size, TILE)
    best = torch.empty(rows, num_tiles, dtype=torch.float32, device=logits.device)
    best_token = torch.empty(rows, num_tiles, dtype=torch.int32, device=logits.device)
    _best_of_tile_kernel[(rows, num_tiles)](
        logits, temperatures, seeds, positions, thresholds, best, best_token, vocab_size,
        num_tiles, TILE=TILE, TRUNCATED=thresholds is not None, FAST_LOG=logits.is_cuda,
        num_warps=8, **pdl(logits),
    )  # fmt: skip
    _best_of_row_kernel[(rows,)](
        best, best_token, out, copies, turn, num_tiles, copies.shape[1],
        BLOCK=triton.next_power_of_2(num_tiles), num_warps=1, **pdl(logits),
    )  # fmt: skip


@triton.jit
def _best_of_tile_kernel(
    logits_ptr, temperatures_ptr, seeds_ptr, positions_ptr, thresholds_ptr, best_ptr,
    best_token_ptr, vocab_size, num_tiles, TILE: tl.constexpr, TRUNCATED: tl.constexpr,
    FAST_LOG: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_next(PDL)
    wait_for_previous(PDL)
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    QUARTER: tl.constexpr = TILE // 4
    lane = tl.arange(0, QUARTER)
    tokens = tile * TILE + lane
    logits_ptr += row * vocab_size
    floor = float("-inf")
    s0 = tl.load(logits_ptr + tokens, mask=tokens < vocab_size, other=floor)
    s1 = tl.load(logits_ptr + tokens + QUARTER, mask=tokens + QUARTER < vocab_size, other=floor)
    s2 = tl.load(
        logits_ptr + tokens + 2 * QUARTER, mask=tokens + 2 * QUARTER < vocab_size, other=floor
    )
    s3 = tl.load(
        logits_ptr + tokens + 3 * QUARTER, mask=tokens + 3 * QUARTER < vocab_size, other=floor
    )
    s0, s1, s2, s3 = s0.to(tl.float32), s1.to(tl.float32), s2.to(tl.float32), s3.to(tl.float32)
    if TRUNCATED:
        threshold = tl.load(thresholds_ptr + row)
        s0, s1 = tl.where(s0 < threshold, floor, s0), tl.where(s1 < threshold, floor, s1)
        s2, s3 = tl.where(s2 < threshold, floor, s2), tl.where(s3 < threshold, floor, s3)
    temperature = tl.load(temperatures_ptr + row)
    if temperature > 0:
        counter = (tile * QUARTER + lane).to(tl.uint32)
        position = tl.load(positions_ptr + row).to(tl.uint32)
        zero = counter * 0
        r0, r1, r2, r3 = tl.philox(tl.load(seeds_ptr + row), counter, zero + position, zero, zero)
        s0 = s0 / temperature + _gumbel(r0, FAST_LOG)
        s1 = s1 / temperature + _gumbel(r1, FAST_LOG)
        s2 = s2 / temperature + _gumbel(r2, FAST_LOG)
        s3 = s3 / temperature + _gumbel(r3, FAST_LOG)
    best, token = _better(s0, tokens, s1, tokens + QUARTER)
    best_high, token_high = _better(s2, tokens + 2 * QUARTER, s3, tokens + 3 * QUARTER)
    best, token = _better(best, token, best_high, token_high)
    top = tl.max(best, axis=0)
    tl.store(best_ptr + row * num_tiles + tile, top)
    first = tl.min(tl.where(best == top, token, vocab_size - 1), axis=0)
    tl.store(best_token_ptr + row * num_tiles + tile, first)


@triton.jit
def _better(score_a, token_a, score_b, token_b):
    """Elementwise winner; `a` holds the lower token and wins ties."""
    return tl.where(score_b > score_a, score_b, score_a), tl.where(
        score_b > score_a, token_b, token_a
    )


@triton.jit
def _log(x, FAST: tl.constexpr):
    """With `FAST` the hardware's logarithm, absolutely exact to 2^-22: half the instructions."""
    if FAST:
        log2 = tl.inline_asm_elementwise(
            "lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        return log2 * 0.6931471805599453
    else:
        return tl.log(x)


@triton.jit
def _gumbel(bits, FAST_LOG: tl.constexpr):
    u = (bits.to(tl.float32) + 0.5) * (2.0**-32)
    series = u * (1 + u * (0.5 + u * (1.0 / 3.0)))
    return -_log(tl.where(u < 1e-3, series, -_log(1 - u, FAST_LOG)), FAST_LOG)


@triton.jit
def _best_of_row_kernel(
    best_ptr, best_token_ptr, out_ptr, copies_ptr, turn_ptr, num_tiles, copy_stride,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_next(PDL)
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < num_tiles
    best = tl.load(best_ptr + row * num_tiles + cols, mask=mask, other=float("-inf"))
    token = tl.load(best_token_ptr + row * num_tiles + cols, mask=mask, other=2147483647)
    winner = tl.min(tl.where(best == tl.max(best, axis=0), token, 2147483647), axis=0)
    winner = tl.where(winner == 2147483647, 0, winner).to(tl.int64)
    tl.store(out_ptr + row, winner)
    tl.store(copies_ptr + tl.load(turn_ptr) * copy_stride + row, winner)
