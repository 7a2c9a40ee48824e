"""Log probabilities of given tokens, their ranks, and the most likely tokens, without a softmax.

    logprob of token t = x_t - log(sum_i exp(x_i));   rank = 1 + the number of tokens before it

in the order of falling logits, and of rising token ids among equal ones. Each tile of a row gives
its own maximum, its sum, its number of tokens before t and its k first tokens; a second kernel puts
the tiles together. The next token in that order is the first of those after the last one, so
nothing needs to be sorted or crossed out.

Grid: (row, tile of 4096 tokens), then one program a row. Bytes moved: the logits once. Bound by
latency: of k times two reductions over a tile.
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.launch import cdiv, next_power_of_2

MOST_TOP = 64  # k for which this is worth it
_TILE = 4096
_NO_TOKEN = tl.constexpr(2147483647)


def token_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log probabilities [rows] float32 of `token_ids` [rows] int64, their ranks [rows] int64, the k
    most likely tokens [rows, k] int64 and their log probabilities [rows, k] float32.

    Args:
        logits: [rows, vocab], any float dtype.
        k: at most `MOST_TOP`, and the size of the vocabulary.
    """
    rows, vocab = logits.shape
    num_tiles, device = cdiv(vocab, _TILE), logits.device
    sums = torch.empty(rows, num_tiles, 2, dtype=torch.float32, device=device)
    numbers = torch.empty(rows, num_tiles, dtype=torch.int32, device=device)
    values = torch.empty(rows, num_tiles, max(k, 1), dtype=torch.float32, device=device)
    tokens = torch.empty(rows, num_tiles, max(k, 1), dtype=torch.int32, device=device)
    _tile_kernel[(rows, num_tiles)](
        logits, token_ids, sums, numbers, values, tokens, vocab, num_tiles, k, TILE=_TILE,
        num_warps=8,
    )  # fmt: skip
    logprobs = torch.empty(rows, dtype=torch.float32, device=device)
    ranks = torch.empty(rows, dtype=torch.int64, device=device)
    top_token_ids = torch.empty(rows, k, dtype=torch.int64, device=device)
    top_logprobs = torch.empty(rows, k, dtype=torch.float32, device=device)
    _row_kernel[(rows,)](
        logits, token_ids, sums, numbers, values, tokens, logprobs, ranks, top_token_ids,
        top_logprobs, vocab, num_tiles, k, TILES=next_power_of_2(num_tiles),
        BLOCK=next_power_of_2(num_tiles * max(k, 1)), num_warps=4,
    )  # fmt: skip
    return logprobs, ranks, top_token_ids, top_logprobs


@triton.jit(do_not_specialize=["k"])
def _tile_kernel(
    logits_ptr, token_ids_ptr, sums_ptr, numbers_ptr, values_ptr, tokens_ptr, vocab, num_tiles, k,
    TILE: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tile * TILE + tl.arange(0, TILE)
    inside = token < vocab
    logits_ptr += row * vocab
    x = tl.load(logits_ptr + token, mask=inside, other=float("-inf")).to(tl.float32)
    own_token = tl.load(token_ids_ptr + row)
    own = tl.load(logits_ptr + own_token).to(tl.float32)
    place = row * num_tiles + tile
    top = tl.max(x, axis=0)
    tl.store(sums_ptr + 2 * place, top)
    weights = tl.where(inside & (x > float("-inf")), tl.exp(x - top), 0.0)
    tl.store(sums_ptr + 2 * place + 1, tl.sum(weights, axis=0))
    is_before = inside & ((x > own) | ((x == own) & (token < own_token)))
    tl.store(numbers_ptr + place, tl.sum(is_before.to(tl.int32), axis=0))
    last, last_token = tl.full([], float("inf"), tl.float32), tl.full([], -1, tl.int32)
    for i in range(k):
        last, last_token = _next(x, token, inside, last, last_token)
        tl.store(values_ptr + place * k + i, last)
        tl.store(tokens_ptr + place * k + i, last_token)


@triton.jit(do_not_specialize=["k"])
def _row_kernel(
    logits_ptr, token_ids_ptr, sums_ptr, numbers_ptr, values_ptr, tokens_ptr, logprobs_ptr,
    ranks_ptr, top_token_ids_ptr, top_logprobs_ptr, vocab, num_tiles, k, TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    inside = tile < num_tiles
    place = row * num_tiles + tile
    top = tl.load(sums_ptr + 2 * place, mask=inside, other=float("-inf"))
    total = tl.load(sums_ptr + 2 * place + 1, mask=inside, other=0.0)
    peak = tl.max(top, axis=0)
    total = tl.sum(tl.where(total > 0, total * tl.exp(top - peak), 0.0), axis=0)
    normalizer = peak + tl.log(total)
    own = tl.load(logits_ptr + row * vocab + tl.load(token_ids_ptr + row)).to(tl.float32)
    tl.store(logprobs_ptr + row, own - normalizer)
    number = tl.sum(tl.load(numbers_ptr + place, mask=inside, other=0), axis=0)
    tl.store(ranks_ptr + row, number.to(tl.int64) + 1)
    candidate = tl.arange(0, BLOCK)
    inside = candidate < num_tiles * k
    at = row * num_tiles * k + candidate
    x = tl.load(values_ptr + at, mask=inside, other=float("-inf"))
    token = tl.load(tokens_ptr + at, mask=inside, other=_NO_TOKEN)
    inside = inside & (token != _NO_TOKEN)
    last, last_token = tl.full([], float("inf"), tl.float32), tl.full([], -1, tl.int32)
    for i in range(k):
        last, last_token = _next(x, token, inside, last, last_token)
        tl.store(top_token_ids_ptr + row * k + i, last_token.to(tl.int64))
        tl.store(top_logprobs_ptr + row * k + i, last - normalizer)


@triton.jit
def _next(x, token, inside, last, last_token):
    """The first token after the last one, in the order above, and its logit; -inf and `_NO_TOKEN`
    if there is none."""
    is_left = inside & ((x < last) | ((x == last) & (token > last_token)))
    top = tl.max(tl.where(is_left, x, float("-inf")), axis=0)
    first = tl.min(tl.where(is_left & (x == top), token, _NO_TOKEN), axis=0)
    return top, first
