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
import triton
import triton.language as tl

from nanovllm.kernels.launch import cdiv, launch_dependents, next_power_of_2, pdl, wait

TILE = 4096  # token i draws number (i % TILE) // (TILE / 4) of Philox's four at one counter


def gumbel_sample(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor,
    host_tokens: torch.Tensor | None = None,
    buffer_index: torch.Tensor | None = None,
    thresholds: torch.Tensor | None = None,
) -> None:
    """Sample one token a row into `out` [rows] int64; ties go to the lowest token id.

    Of a row with NaN or infinity it is -1, and -2 if all are -inf.

    Args:
        logits: [rows, vocab], any float dtype.
        temperatures: [rows] float32; 0 takes the most likely token.
        seeds: [rows] int64, one per request.
        positions: [rows] int32, the position in its sequence of the token being sampled.
        host_tokens: [buffers, rows or more] int64, if given written too: pinned host memory, which
            saves a copy.
        buffer_index: [1] int32, the row of `host_tokens` that is written.
        thresholds: [rows] float32, no token with a lower logit is sampled (see
            `kernels.truncate`).
    """
    _launch(
        logits, temperatures, seeds, positions, thresholds, out, host_tokens, buffer_index, 0, False
    )  # fmt: skip


def gumbel_winners(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    thresholds: torch.Tensor | None = None,
    first_token: int = 0,
) -> torch.Tensor:
    """The winners among a part of the vocabulary, as keys: [rows] int64.

    The largest of several keys is the winner of all: its upper half is the score as an integer in
    the order of the floats, its lower half 2^32 - 1 - token id, so that ties go to the lowest id.
    -1 and -2 stand for tokens here too, the former with the highest of scores.

    Args:
        logits: [rows, tokens of the part], which follow each other from `first_token` on, a
            multiple of 16. The other arguments are those of `gumbel_sample`.
    """
    keys = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    _launch(
        logits, temperatures, seeds, positions, thresholds, keys, None, None, first_token, True
    )  # fmt: skip
    return keys


def _launch(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    thresholds: torch.Tensor | None,
    out: torch.Tensor,
    host_tokens: torch.Tensor | None,
    buffer_index: torch.Tensor | None,
    first_token: int,
    as_keys: bool,
) -> None:
    rows, vocab_size = logits.shape
    num_tiles = cdiv(first_token + vocab_size, TILE) - first_token // TILE
    scores = torch.empty(rows, num_tiles, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(rows, num_tiles, dtype=torch.int32, device=logits.device)
    _best_of_tile_kernel[(rows, num_tiles)](
        logits, temperatures, seeds, positions, thresholds, scores, tokens, vocab_size,
        num_tiles, FIRST=first_token, TILE=TILE, TRUNCATED=thresholds is not None,
        FAST_LOG=logits.is_cuda, num_warps=8, **pdl(logits),
    )  # fmt: skip
    _best_of_row_kernel[(rows,)](
        scores, tokens, out, host_tokens, buffer_index, num_tiles,
        0 if host_tokens is None else host_tokens.shape[1], HAS_HOST=host_tokens is not None,
        AS_KEYS=as_keys, FIRST=first_token, BLOCK=next_power_of_2(num_tiles), num_warps=1,
        **pdl(logits),
    )  # fmt: skip


@triton.jit
def _best_of_tile_kernel(
    logits_ptr, temperatures_ptr, seeds_ptr, positions_ptr, thresholds_ptr, best_ptr,
    best_token_ptr, vocab_size, num_tiles, FIRST: tl.constexpr, TILE: tl.constexpr,
    TRUNCATED: tl.constexpr, FAST_LOG: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    wait(PDL)
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    QUARTER: tl.constexpr = TILE // 4
    lane = tl.arange(0, QUARTER)
    BEFORE: tl.constexpr = FIRST % TILE  # tokens of the first tile that are not here
    tokens = tile * TILE + lane - BEFORE  # among those that are
    logits_ptr += row * vocab_size
    floor = float("-inf")
    s0 = _scores(logits_ptr, tokens, vocab_size, BEFORE)
    s1 = _scores(logits_ptr, tokens + QUARTER, vocab_size, BEFORE)
    s2 = _scores(logits_ptr, tokens + 2 * QUARTER, vocab_size, BEFORE)
    s3 = _scores(logits_ptr, tokens + 3 * QUARTER, vocab_size, BEFORE)
    is_finite = (s0 < float("inf")) & (s1 < float("inf"))  # nor NaN
    is_finite = is_finite & (s2 < float("inf")) & (s3 < float("inf"))
    all_finite = tl.min(is_finite.to(tl.int32), axis=0) != 0
    if TRUNCATED:
        threshold = tl.load(thresholds_ptr + row)
        s0, s1 = tl.where(s0 < threshold, floor, s0), tl.where(s1 < threshold, floor, s1)
        s2, s3 = tl.where(s2 < threshold, floor, s2), tl.where(s3 < threshold, floor, s3)
    temperature = tl.load(temperatures_ptr + row)
    if temperature > 0:
        counter = ((FIRST // TILE + tile) * QUARTER + lane).to(tl.uint32)
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
    first = tl.min(tl.where(best == top, token, vocab_size - 1), axis=0)
    tl.store(best_ptr + row * num_tiles + tile, tl.where(all_finite, top, float("inf")))
    tl.store(best_token_ptr + row * num_tiles + tile, tl.where(all_finite, first, -1))


@triton.jit
def _scores(logits_ptr, tokens, vocab_size, BEFORE: tl.constexpr):
    mask = tokens < vocab_size
    if BEFORE:
        mask &= tokens >= 0
    return tl.load(logits_ptr + tokens, mask=mask, other=float("-inf")).to(tl.float32)


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
    best_ptr, best_token_ptr, out_ptr, host_ptr, buffer_index_ptr, num_tiles, host_stride,
    HAS_HOST: tl.constexpr, AS_KEYS: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < num_tiles
    best = tl.load(best_ptr + row * num_tiles + cols, mask=mask, other=float("-inf"))
    token = tl.load(best_token_ptr + row * num_tiles + cols, mask=mask, other=2147483647)
    top = tl.max(best, axis=0)
    winner = tl.min(tl.where(best == top, token, 2147483647), axis=0)
    winner = tl.where(top == float("-inf"), -2, winner)
    winner = tl.where(tl.min(token, axis=0) == -1, -1, winner).to(tl.int64)
    if AS_KEYS:
        bits = (top + 0.0).to(tl.int32, bitcast=True)  # no -0.0, which would be below 0.0
        score = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
        low = tl.where(winner < 0, -1 - winner, 0xFFFFFFFF - (FIRST + winner))
        winner = (score << 32) | low
    tl.store(out_ptr + row, winner)
    if HAS_HOST:
        tl.store(host_ptr + tl.load(buffer_index_ptr) * host_stride + row, winner)
