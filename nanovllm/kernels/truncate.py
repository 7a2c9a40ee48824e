"""Top-k, top-p and min-p sampling as one threshold a row, found without sorting the vocabulary.

    p = softmax(logits / temperature);   of all tokens keep, in this order,
    min_p: those with p >= min_p * max(p);   top_k: the k most likely of them, and ties of the last;
    top_p: of what is left, renormalised, the fewest most likely that sum to top_p, and such ties

Each keeps the logits >= t, for the largest t at which they count k, or sum to top_p. A bisection
finds it on the floats' bits, read as integers in the order of the floats: 2 bits a step, by sums
for three values of t. The first pass over a row keeps in registers the four largest logits of each
lane (token id modulo LANES). All that exceed `floor`, the largest fourth, are among them, and with
them t, mostly: a hundred tokens meet four in a lane in one of 10^4 rows. For a t further down they
give a lower bound, and the search goes on with sums over the whole row.

Grid: one program a row; where nothing is on it exits. Bytes moved: the logits once; from L2, once
more for the sum of top_p without top_k, and for each step below the floor. Bound by arithmetic, on
the one SM that has the row: it takes as long for one row as for one on every SM.
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.launch import launch_dependents, pdl, wait

LANES = 4096


def truncation_thresholds(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """[rows] float32: a row keeps the tokens whose logit, as float32, is at least this.

    It is a token's logit, or the bound of min_p; -inf where nothing is on.

    Args:
        logits: [rows, vocab], any float dtype, not yet divided by the temperature; may hold -inf.
        temperatures: [rows] float32; nothing is cut from a row of 0, which is greedy.
        top_k: [rows] int32; 0, or vocab and more, is off.
        top_p: [rows] float32 in (0, 1]; 1 is off.
        min_p: [rows] float32 in [0, 1]; 0 is off.
    """
    rows, vocab = logits.shape
    thresholds = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _thresholds_kernel[(rows,)](
        logits, temperatures, top_k, top_p, min_p, thresholds, vocab,
        LANES=LANES, num_warps=16, **pdl(logits),
    )  # fmt: skip
    return thresholds


@triton.jit
def _thresholds_kernel(
    logits_ptr, temperatures_ptr, top_k_ptr, top_p_ptr, min_p_ptr, thresholds_ptr, vocab,
    LANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures_ptr + row)
    k, p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    k = tl.where(k < vocab, k, 0)
    wait(PDL)
    threshold = tl.full([], float("-inf"), tl.float32)
    if (temperature > 0) & ((k > 0) | (p < 1) | (min_p > 0)):
        threshold = _threshold(logits_ptr + row * vocab, vocab, temperature, k, p, min_p, LANES)
    tl.store(thresholds_ptr + row, threshold)


@triton.jit
def _threshold(row_ptr, vocab, temperature, k, p, min_p, LANES: tl.constexpr):
    a = tl.full([LANES], float("-inf"), tl.float32)  # the largest of each lane, b the second, ...
    b, c, d = a, a, a
    for start in range(0, vocab, LANES):
        x = _load(row_ptr, start, vocab, LANES)
        a, x = tl.maximum(a, x), tl.minimum(a, x)
        b, x = tl.maximum(b, x), tl.minimum(b, x)
        c, x = tl.maximum(c, x), tl.minimum(c, x)
        d = tl.maximum(d, x)
    tops, peak, floor = (a, b, c, d), tl.max(a, axis=0), tl.max(d, axis=0)
    threshold = tl.full([], float("-inf"), tl.float32)
    if min_p > 0:
        threshold = peak + temperature * tl.log(min_p)
    if k > 0:
        count = k.to(tl.float32)
        low = tl.maximum(threshold, tl.where(k <= LANES, tl.min(a, axis=0), float("-inf")))
        t = _search(count, low, peak, tops, row_ptr, vocab, None, None, LANES)
        if t < floor:
            t = _search(count, t, floor, None, row_ptr, vocab, None, None, LANES)
        threshold = tl.maximum(threshold, t)
    if p < 1:
        # log2(e) / temperature, within bounds that keep infinity times zero out.
        scale = tl.clamp(1.4426950408889634 / temperature, 1e-37, 1e37)
        if threshold > floor:
            total = _sums(threshold, threshold, threshold, tops, row_ptr, vocab, peak, scale, LANES)
        else:
            total = _sums(threshold, threshold, threshold, None, row_ptr, vocab, peak, scale, LANES)
        # All tokens below `tail` have together less than half of what top_p may cut.
        tail = peak + temperature * tl.log((1 - p) / (2.0 * vocab))
        low, total = tl.maximum(threshold, tail), p * total[0]
        t = _search(total, low, peak, tops, row_ptr, vocab, peak, scale, LANES)
        if t < floor:
            t = _search(total, t, floor, None, row_ptr, vocab, peak, scale, LANES)
        threshold = tl.maximum(threshold, t)
    return threshold


@triton.jit
def _search(target, low, high, tops, row_ptr, vocab, peak, scale, LANES: tl.constexpr):
    """The largest t in (low, high] with a sum (see `_sums`) of at least `target`; if there is none,
    `low` rounded down to a value that logits can have.

    A sum in one fixed order never shrinks as terms join it: rounding cannot mislead the steps."""
    dtype: tl.constexpr = row_ptr.dtype.element_ty
    first, last = _key(low, dtype), _key(high, dtype)
    while first < last:
        step = (last - first + 3) // 4
        k1, k2 = first + step, tl.minimum(first + 2 * step, last)
        k3 = tl.minimum(first + 3 * step, last)
        t1, t2, t3 = _value(k1, dtype), _value(k2, dtype), _value(k3, dtype)
        s1, s2, s3 = _sums(t1, t2, t3, tops, row_ptr, vocab, peak, scale, LANES)
        if s2 >= target:
            first, last = tl.where(s3 >= target, k3, k2), tl.where(s3 >= target, last, k3 - 1)
        else:
            first, last = tl.where(s1 >= target, k1, first), tl.where(s1 >= target, k2, k1) - 1
    return _value(first, dtype)


@triton.jit
def _sums(t1, t2, t3, tops, row_ptr, vocab, peak, scale, LANES: tl.constexpr):
    """Over the logits x >= t1, t2, t3: their number, or if there is a scale the sums of
    2^((x - peak) * scale). Of `tops`, or of the whole row if that is None."""
    s1 = tl.zeros([LANES], tl.float32)
    s2, s3 = s1, s1
    if tops is None:
        for start in range(0, vocab, LANES):
            x = _load(row_ptr, start, vocab, LANES)
            s1, s2, s3 = _add(s1, s2, s3, x, t1, t2, t3, peak, scale)
    else:
        for i in tl.static_range(4):
            s1, s2, s3 = _add(s1, s2, s3, tops[i], t1, t2, t3, peak, scale)
    return tl.sum(s1, axis=0), tl.sum(s2, axis=0), tl.sum(s3, axis=0)


@triton.jit
def _add(s1, s2, s3, x, t1, t2, t3, peak, scale):
    weight = 1.0 if scale is None else tl.exp2((x - peak) * scale)
    s1 += tl.where(x >= t1, weight, 0.0)
    s2 += tl.where(x >= t2, weight, 0.0)
    s3 += tl.where(x >= t3, weight, 0.0)
    return s1, s2, s3


@triton.jit
def _load(row_ptr, start, vocab, LANES: tl.constexpr):
    tokens = start + tl.arange(0, LANES)
    return tl.load(row_ptr + tokens, mask=tokens < vocab, other=float("-inf")).to(tl.float32)


@triton.jit
def _key(x, dtype: tl.constexpr):
    """The place, in the order of all numbers of type `dtype`, of the last that is not above x."""
    rounded = x.to(dtype)
    INT: tl.constexpr = tl.core.get_int_dtype(dtype.primitive_bitwidth, True)
    bits = rounded.to(INT, bitcast=True).to(tl.int64)
    key = tl.where(bits < 0, bits ^ ((1 << (dtype.primitive_bitwidth - 1)) - 1), bits)
    return key - (rounded.to(tl.float32) > x).to(tl.int64)


@triton.jit
def _value(key, dtype: tl.constexpr):
    INT: tl.constexpr = tl.core.get_int_dtype(dtype.primitive_bitwidth, True)
    bits = tl.where(key < 0, key ^ ((1 << (dtype.primitive_bitwidth - 1)) - 1), key)
    return bits.to(INT).to(dtype, bitcast=True).to(tl.float32)
