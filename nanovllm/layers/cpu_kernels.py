"""What a CPU computes between the products of a layer, in loops that numba compiles.

A torch operation costs some 5 us, and three times as much after a product that has emptied the
CPU's caches; a layer in plain torch has sixty of them. Here a norm is one call, a gate another, and
all that lies between the projection to q/k/v and the one back a third. Their twins in plain torch
are in `layers.layernorm`, `layers.activation` and `layers.paged_attention`.

All sums are in float32. A row is computed in one order, whichever rows are beside it.
"""

import os
import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba import carray, njit, prange, types
from numba.extending import intrinsic, overload

# Empty arrays, whose dtype says what lies at a kernel's addresses: of bf16 the bits.
_BITS = {torch.float32: np.empty(0, np.float32), torch.bfloat16: np.empty(0, np.uint16)}
DTYPES = tuple(_BITS)
MAX_VALUES = 2**16  # of norms and gates; more are left to torch, whose operations have threads
_VALUES_OF_A_THREAD = 2**18  # some 40 us
_MOST_THREADS: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]

if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
    raise ImportError("NUMBA_DISABLE_JIT is set, and these loops only run when compiled")
PROCESS_ID = os.getpid()  # that has numba's threads
_num_torch_threads = torch.get_num_threads()
try:
    numba.get_num_threads()  # starts them
except ValueError as error:  # NUMBA_THREADING_LAYER names one that is not installed
    raise ImportError(f"numba has no threads: {error}") from error
finally:  # numba may set torch's number, too, as both may have one OpenMP
    torch.set_num_threads(_num_torch_threads)
# Some of numba's thread pools end the process if two threads use them.
_one_at_a_time = threading.Lock()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `layers.layernorm.rms_norm`; by one thread.

    Args:
        x: [tokens, size], contiguous.
    """
    out, (num_tokens, size), dtype = torch.empty_like(x), x.shape, x.dtype
    _rms_norm(
        _BITS[dtype], num_tokens, size, eps,
        _address(x, dtype), _address(weight, dtype), _address(out, dtype),
    )  # fmt: skip
    return out


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, [tokens, size]; by one thread.

    Args:
        gate_up: [tokens, 2 * size], contiguous.
    """
    (num_tokens, width), dtype = gate_up.shape, gate_up.dtype
    out = gate_up.new_empty(num_tokens, width // 2)
    _silu_and_mul(
        _BITS[dtype], num_tokens, width // 2, _address(gate_up, dtype), _address(out, dtype)
    )
    return out


def norm_rope_store(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """See `layers.paged_attention.norm_rope_store`; the cache is laid out head by head, as
    `engine.kv_cache` does on a CPU, and not in fp8."""
    num_kv_heads, head_dim = k_cache.shape[2:]
    dtype, num_heads = qkv.dtype, qkv.shape[1] // head_dim - 2 * num_kv_heads
    q = qkv.new_empty(len(qkv), num_heads, head_dim)
    _by_threads(
        qkv.numel(), _norm_rope_store, _BITS[dtype], len(qkv), num_heads, tuple(k_cache.shape), eps,
        *_norm_addresses(q_weight, k_weight, dtype), _address(qkv, dtype),
        _address(cos_sin, torch.float32), _address(positions, torch.int32),
        _cache_address(k_cache, dtype), _cache_address(v_cache, dtype),
        _address(slot_mapping, torch.int32), _address(q, dtype),
    )  # fmt: skip
    return q


def decode(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """`norm_rope_store`, and `layers.paged_attention.decode_attention` with its result: one call,
    since some 40 us pass from Python to a kernel while the CPU's caches are cold."""
    _, block_size, num_kv_heads, head_dim = k_cache.shape
    dtype, num_heads = qkv.dtype, qkv.shape[1] // head_dim - 2 * num_kv_heads
    num_rows = qkv.shape[0]
    out = qkv.new_empty(num_rows, num_heads, head_dim)
    num_values = 2 * block_tables.numel() * block_size * num_kv_heads * head_dim  # at the most
    _by_threads(
        num_values, _decode, _BITS[dtype], num_rows, num_heads, block_tables.shape[1],
        tuple(k_cache.shape), scale, eps, *_norm_addresses(q_weight, k_weight, dtype),
        _address(qkv, dtype), _address(cos_sin, torch.float32), _address(positions, torch.int32),
        _cache_address(k_cache, dtype), _cache_address(v_cache, dtype),
        _address(slot_mapping, torch.int32), _address(context_lens, torch.int32),
        _address(block_tables, torch.int32), _address(out, dtype),
    )  # fmt: skip
    return out


def _by_threads(num_values: int, kernel: Callable[..., None], *args: Any) -> None:
    """Call a kernel that reads so many values, by as many threads as pay, at most torch's. How many
    the caller's own numba code takes stays as it is."""
    wanted = min(num_values // _VALUES_OF_A_THREAD, torch.get_num_threads(), _MOST_THREADS)
    with _one_at_a_time:
        before = numba.get_num_threads()
        numba.set_num_threads(max(wanted, 1))
        try:
            kernel(*args)
        finally:
            numba.set_num_threads(before)


def _address(x: torch.Tensor, dtype: torch.dtype) -> int:
    """What a kernel is given in place of an array, which numba takes 2 us to look at, or 6 when the
    CPU's caches are cold."""
    assert x.dtype == dtype and x.is_contiguous()
    return x.data_ptr()


def _norm_addresses(
    q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, dtype: torch.dtype
) -> tuple[bool, int, int]:
    """Whether heads are normalised, and the addresses of the weights."""
    if q_weight is None or k_weight is None:
        return False, 0, 0
    return True, _address(q_weight, dtype), _address(k_weight, dtype)


def _cache_address(cache: torch.Tensor, dtype: torch.dtype) -> int:
    """Of keys or values, in memory [num_kv_heads, num_blocks, block_size, head_dim]."""
    assert cache.dtype == dtype and cache.shape[3] in cache.stride()[:2]
    return cache.data_ptr()


def _compiled(parallel: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function when it is first called, and keep the code on disk if that is possible.
    Sums may be made in any order, but infinities and NaN are what they are."""

    def compiled(function: Callable[..., Any]) -> Any:
        options: dict[str, Any] = {
            "fastmath": {"reassoc", "contract", "arcp", "nsz"}, "error_model": "numpy",
            "nogil": True, "parallel": parallel,
        }  # fmt: skip
        try:
            return njit(function, cache=True, **options)
        except RuntimeError:  # there is no place that may be written to
            return njit(function, **options)

    return compiled


def _widen(x: Any) -> Any:
    """The float32 of bits in bf16; of a float32 itself."""
    raise NotImplementedError("of compiled code only")


def _narrow(x: Any, like: Any) -> Any:
    """A float32 as an array holds it: in bf16 the nearest, of two the even one."""
    raise NotImplementedError("of compiled code only")


# numba reads the signatures of the functions that follow, which therefore have no types.


def _pointer(typing_context, address):
    """What compiled code makes of an integer: the address that it is."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(address), generate


_memory: Any = intrinsic(_pointer)


@overload(_widen, inline="always")
def _widen_of(x):
    if x == types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: x


@overload(_narrow, inline="always")
def _narrow_of(x, like):
    if like.dtype != types.uint16:
        return lambda x, like: x

    def narrow(x, like):
        bits = np.float32(x).view(np.uint32)
        is_odd = (bits >> np.uint32(16)) & np.uint32(1)
        if x != x:
            return np.uint16(0x7FC0)  # rounding could carry a NaN into zero
        return np.uint16((bits + np.uint32(0x7FFF) + is_odd) >> np.uint32(16))

    return narrow


@_compiled()
def _rms_norm(
    bits: Any, num_tokens: int, size: int, eps: float, x_at: int, weight_at: int, out_at: int
) -> None:
    x = carray(_memory(x_at), (num_tokens, size), bits.dtype)
    weight = carray(_memory(weight_at), size, bits.dtype)
    out = carray(_memory(out_at), (num_tokens, size), bits.dtype)
    for token in range(num_tokens):
        squares = np.float32(0)
        for i in range(size):
            squares += _widen(x[token, i]) * _widen(x[token, i])
        factor = np.float32(1) / np.sqrt(squares / np.float32(size) + np.float32(eps))
        for i in range(size):
            out[token, i] = _narrow(_widen(x[token, i]) * factor * _widen(weight[i]), out)


@_compiled()
def _silu_and_mul(bits: Any, num_tokens: int, size: int, gate_up_at: int, out_at: int) -> None:
    gate_up = carray(_memory(gate_up_at), (num_tokens, 2, size), bits.dtype)
    out = carray(_memory(out_at), (num_tokens, size), bits.dtype)
    for token in range(num_tokens):
        for i in range(size):
            gate, up = _widen(gate_up[token, 0, i]), _widen(gate_up[token, 1, i])
            out[token, i] = _narrow(gate / (np.float32(1) + _exp(-gate)) * up, out)


@_compiled()
def _exp(x: Any) -> Any:
    """e^x, of -20 to 20 within 2e-6 of it: 2^n 2^f, the latter by its Taylor series. It is made of
    operations that are done for all lanes of a vector at once, as the library's function is not."""
    exponent = min(max(x * np.float32(1.4426950408889634), np.float32(-126)), np.float32(127))
    whole = np.floor(exponent + np.float32(0.5))
    ln2_f = (exponent - whole) * np.float32(0.6931471805599453)
    power = np.float32(1)
    for k in (6, 5, 4, 3, 2, 1):
        power = np.float32(1) + power * ln2_f * np.float32(1 / k)
    bits = np.uint32((np.int32(whole) + np.int32(127)) << np.int32(23))
    return power * bits.view(np.float32)


@_compiled(parallel=True)
def _norm_rope_store(
    bits: Any, num_tokens: int, num_heads: int, cache_shape: tuple[int, int, int, int], eps: float,
    has_norm: bool, q_weight_at: int, k_weight_at: int, qkv_at: int, cos_sin_at: int,
    positions_at: int, k_cache_at: int, v_cache_at: int, slots_at: int, q_at: int,
) -> None:  # fmt: skip
    num_blocks, block_size, num_kv_heads, head_dim = cache_shape
    num_tasks = num_heads + 2 * num_kv_heads  # heads of a token
    by_head = (num_kv_heads, num_blocks, block_size, head_dim)
    qkv = carray(_memory(qkv_at), (num_tokens, num_tasks, head_dim), bits.dtype)
    q_weight = carray(_memory(q_weight_at), head_dim, bits.dtype)
    k_weight = carray(_memory(k_weight_at), head_dim, bits.dtype)
    cos_sin = carray(_memory(cos_sin_at), (2**31, head_dim), np.float32)
    positions = carray(_memory(positions_at), num_tokens, np.int32)
    k_cache = carray(_memory(k_cache_at), by_head, bits.dtype)
    v_cache = carray(_memory(v_cache_at), by_head, bits.dtype)
    slots = carray(_memory(slots_at), num_tokens, np.int32)
    q = carray(_memory(q_at), (num_tokens, num_heads, head_dim), bits.dtype)
    for task in prange(num_tasks * num_tokens):
        token, head = task // num_tasks, task % num_tasks
        x, rotation = qkv[token, head], cos_sin[positions[token]]
        block, place = slots[token] // block_size, slots[token] % block_size
        kv_head = head - num_heads
        if kv_head < 0:
            _norm_rope(x, has_norm, q_weight, eps, rotation, q[token, head])
        elif slots[token] >= 0 and kv_head < num_kv_heads:
            _norm_rope(x, has_norm, k_weight, eps, rotation, k_cache[kv_head, block, place])
        elif slots[token] >= 0:
            v_cache[kv_head - num_kv_heads, block, place, :] = x


@_compiled()
def _norm_rope(x: Any, has_norm: bool, weight: Any, eps: float, rotation: Any, out: Any) -> None:
    half = x.shape[0] // 2
    factor = np.float32(1)
    if has_norm:
        squares = np.float32(0)
        for i in range(2 * half):
            squares += _widen(x[i]) * _widen(x[i])
        factor = np.float32(1) / np.sqrt(squares / np.float32(2 * half) + np.float32(eps))
    for i in range(half):
        first, second = _widen(x[i]) * factor, _widen(x[half + i]) * factor
        if has_norm:
            first, second = first * _widen(weight[i]), second * _widen(weight[half + i])
        cos, sin = rotation[i], rotation[half + i]
        out[i] = _narrow(first * cos - second * sin, out)
        out[half + i] = _narrow(second * cos + first * sin, out)


@_compiled()
def _decode(
    bits: Any, num_rows: int, num_heads: int, table_width: int,
    cache_shape: tuple[int, int, int, int], scale: float, eps: float, has_norm: bool,
    q_weight_at: int, k_weight_at: int, qkv_at: int, cos_sin_at: int, positions_at: int,
    k_cache_at: int, v_cache_at: int, slots_at: int, lens_at: int, tables_at: int, out_at: int,
) -> None:  # fmt: skip
    # Queries lie where their outputs will be. An array of their own could be freed too early: numba
    # does not know that an address is in use.
    _norm_rope_store(
        bits, num_rows, num_heads, cache_shape, eps, has_norm, q_weight_at, k_weight_at, qkv_at,
        cos_sin_at, positions_at, k_cache_at, v_cache_at, slots_at, out_at,
    )  # fmt: skip
    _decode_attention(
        bits, num_rows, num_heads, table_width, cache_shape, scale, k_cache_at, v_cache_at, lens_at,
        tables_at, out_at,
    )  # fmt: skip


@_compiled(parallel=True)
def _decode_attention(
    bits: Any, num_rows: int, num_heads: int, table_width: int,
    cache_shape: tuple[int, int, int, int], scale: float, k_cache_at: int, v_cache_at: int,
    lens_at: int, tables_at: int, out_at: int,
) -> None:  # fmt: skip
    """At `out_at` are the queries, and then what they have read."""
    num_blocks, block_size, num_kv_heads, head_dim = cache_shape
    by_head = (num_kv_heads, num_blocks, block_size, head_dim)
    group = num_heads // num_kv_heads
    by_group = (num_rows, num_kv_heads, group, head_dim)
    k_cache = carray(_memory(k_cache_at), by_head, bits.dtype)
    v_cache = carray(_memory(v_cache_at), by_head, bits.dtype)
    lens = carray(_memory(lens_at), num_rows, np.int32)
    tables = carray(_memory(tables_at), (num_rows, table_width), np.int32)
    out = carray(_memory(out_at), by_group, bits.dtype)
    for task in prange(num_kv_heads * num_rows):  # by heads, since contexts differ in length
        kv_head, row = task // num_rows, task % num_rows
        queries = np.empty((group, head_dim), np.float32)
        weights = np.empty((group, lens[row]), np.float32)
        sums = np.zeros((group, head_dim), np.float32)
        for g in range(group):
            for i in range(head_dim):
                queries[g, i] = _widen(out[row, kv_head, g, i]) * np.float32(scale)
        _scores(queries, k_cache[kv_head], tables[row], weights)
        for g in range(group):
            _softmax(weights[g])
        _weighted_sum(weights, v_cache[kv_head], tables[row], sums)
        for g in range(group):
            for i in range(head_dim):
                out[row, kv_head, g, i] = _narrow(sums[g, i], out)


@_compiled()
def _scores(queries: Any, keys: Any, table: Any, scores: Any) -> None:
    block_size = keys.shape[1]
    for token in range(scores.shape[1]):
        key = keys[table[token // block_size], token % block_size]
        for g in range(queries.shape[0]):
            score = np.float32(0)
            for i in range(queries.shape[1]):
                score += queries[g, i] * _widen(key[i])
            scores[g, token] = score


@_compiled()
def _softmax(scores: Any) -> None:
    """In place."""
    largest, total = np.float32(-np.inf), np.float32(0)
    for i in range(scores.shape[0]):
        largest = max(largest, scores[i])
    for i in range(scores.shape[0]):
        scores[i] = _exp(scores[i] - largest)
        total += scores[i]
    for i in range(scores.shape[0]):
        scores[i] /= total


@_compiled()
def _weighted_sum(weights: Any, values: Any, table: Any, sums: Any) -> None:
    block_size, num_tokens = values.shape[1], weights.shape[1]
    for start in range(0, num_tokens, block_size):
        block = values[table[start // block_size]]
        end = min(block_size, num_tokens - start)
        for g in range(sums.shape[0]):
            own = weights[g, start : start + end]
            for t in range(0, end - 3, 4):  # four at a time, so that sums are stored less often
                w0, w1, w2, w3 = own[t], own[t + 1], own[t + 2], own[t + 3]
                for i in range(sums.shape[1]):
                    first = w0 * _widen(block[t, i]) + w1 * _widen(block[t + 1, i])
                    second = w2 * _widen(block[t + 2, i]) + w3 * _widen(block[t + 3, i])
                    sums[g, i] += first + second
            for t in range(end // 4 * 4, end):
                for i in range(sums.shape[1]):
                    sums[g, i] += own[t] * _widen(block[t, i])
