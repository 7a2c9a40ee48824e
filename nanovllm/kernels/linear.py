"""What serves a matrix product: the one place where a kernel is chosen.

With few rows a product takes as long as its weight takes to be read, and cuBLAS is not made for
that. So the kernel goes by the number of rows:

- 1, and with small weights 2: `kernels.gemv`, which also does the norm before, and the gate or the
  residual add after;
- up to 128, with large weights up to 64: `kernels.split_k`;
- 129 to 256, with small weights: `kernels.tiled_gemm`;
- of q/k/v, from some thousand on: `kernels.qkv_gemm`, which also does what comes before attention;
- else cuBLAS.

With a weight in fp8 (see `quantization.fp8`) it goes by rows in the same way: to
`kernels.fp8_gemv` with small weights, `kernels.split_k`, the library's `torch._scaled_mm`, and
`kernels.fp8_gemm` where these do not serve.
"""

from enum import Enum
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nanovllm.kernels import fp8_gemv as fp8_gemv_kernel
from nanovllm.kernels import gemv as gemv_kernel
from nanovllm.kernels import qkv_gemm as qkv_gemm_kernel
from nanovllm.kernels import split_k as split_k_kernel
from nanovllm.kernels import tiled_gemm as tiled_gemm_kernel
from nanovllm.kernels.activation import silu_and_mul
from nanovllm.kernels.fp8_gemv import fp8_gemv
from nanovllm.kernels.fp8_linear import Gated, NormedInput, fp8_partial_sums, fp8_product
from nanovllm.kernels.gemv import gemv
from nanovllm.kernels.launch import Gpu, gpu_with
from nanovllm.kernels.qkv_gemm import qkv_gemm
from nanovllm.kernels.rope_store import qk_norm_rope_store
from nanovllm.kernels.split_k import num_splits, split_k
from nanovllm.kernels.tiled_gemm import SPLITS, tiled_gemm
from nanovllm.quantization.fp8 import Fp8Weight

# In-features of GEMVs, with a norm and without: of more, registers spill.
_MAX_NORMED, _MAX_PLAIN = 4096, 27648
_MAX_FP8 = 27648
_SHORT_ROW, _SMALL = 2048, 2**23  # in-features and elements with which GEMV takes two rows
_LARGE = 2**25  # elements of a weight with which cuBLAS is faster past 64 rows
_MAX_ROWS_OF_LARGE = 64
_MAX_TILED = 2**23  # elements of a weight that tiled_gemm takes


class Kernel(Enum):
    """What can make a product."""

    GEMV = "gemv"
    SPLIT_K = "split_k"
    TILED_GEMM = "tiled_gemm"
    FP8_GEMM = "fp8_gemm"
    QKV_GEMM = "qkv_gemm"
    LIBRARY = "library"


class Use(Enum):
    """What becomes of a product: its values are wanted, its halves are gate and up of an MLP, it is
    added to the residual stream, or it is queries, keys and values, and the last two are stored."""

    VALUES = "values"
    GATED = "gated"
    ADDED = "added"
    STORED = "stored"


class ProductShape(NamedTuple):
    """A product x W^T + b, as far as the choice of its kernel goes.

    Attributes:
        rows: of x.
        in_features, out_features: the weight is [out_features, in_features], gate and up together.
        dtype: of x, and of W unless that is in fp8.
        use: what becomes of it.
        has_bias: there is a b.
        has_norm: x has still to be normalised.
        has_partials: and before that, partial sums have to be added to it.
        in_fp8: W is, and x is to be.
        has_groups: their scales are those of groups of inputs.
        head_dim, num_kv_heads: of a product that is stored.
        in_fp8_cache: it is stored in fp8.
    """

    rows: int
    in_features: int
    out_features: int
    dtype: torch.dtype
    use: Use = Use.VALUES
    has_bias: bool = False
    has_norm: bool = False
    has_partials: bool = False
    in_fp8: bool = False
    has_groups: bool = False
    head_dim: int = 0
    num_kv_heads: int = 0
    in_fp8_cache: bool = False


def choose_kernel(product: ProductShape, gpu: Gpu) -> Kernel:
    """The kernel that makes a product on a GPU."""
    if product.in_fp8:
        return _choose_in_fp8(product, gpu)
    rows, k, n = product.rows, product.in_features, product.out_features
    # GEMV pays by the norm or the addition that it takes along. It knows no partial sums.
    pays = product.has_norm or product.use is Use.ADDED
    fits = k <= (_MAX_NORMED if product.has_norm else _MAX_PLAIN) and not product.has_partials
    is_small = k <= _SHORT_ROW or k * n <= _SMALL
    if pays and fits and (rows == 1 or (rows == gemv_kernel.MAX_ROWS and is_small)):
        return Kernel.GEMV
    is_large = k * n > _LARGE and product.use is not Use.ADDED
    max_rows = _MAX_ROWS_OF_LARGE if is_large else split_k_kernel.MAX_ROWS
    if not gpu.is_hopper_class or product.dtype.itemsize != 2:
        return Kernel.LIBRARY
    if rows <= max_rows:
        return Kernel.SPLIT_K
    # It adds no bias; its loads want rows of whole 16 bytes.
    can_tile = not product.has_bias and k % 8 == 0 and k * n <= _MAX_TILED
    if can_tile and tiled_gemm_kernel.MIN_ROWS <= rows <= tiled_gemm_kernel.MAX_ROWS:
        return Kernel.TILED_GEMM
    if product.use is Use.STORED and _can_store(product):
        return Kernel.QKV_GEMM
    return Kernel.LIBRARY


def _can_store(product: ProductShape) -> bool:
    """Whether `qkv_gemm` serves: it adds no bias, and a tile of it has whole heads of one kind."""
    head_dim, tile = product.head_dim, qkv_gemm_kernel.TILING.outputs
    kv_outputs = product.num_kv_heads * head_dim
    has_tiles = head_dim in qkv_gemm_kernel.HEAD_DIMS and product.out_features % tile == 0
    fits = has_tiles and kv_outputs % tile == 0 and product.in_features % 8 == 0
    is_plain = not product.has_bias and not product.in_fp8_cache
    return fits and is_plain and product.rows >= qkv_gemm_kernel.MIN_ROWS


def _choose_in_fp8(product: ProductShape, gpu: Gpu) -> Kernel:
    rows, k, n = product.rows, product.in_features, product.out_features
    is_small = k <= _SHORT_ROW or k * n <= _SMALL
    fits = k <= _MAX_FP8 and not product.has_partials
    if fits and is_small and rows <= fp8_gemv_kernel.MAX_ROWS:
        return Kernel.GEMV
    if not gpu.is_hopper_class:
        return Kernel.GEMV if fits and rows == 1 else Kernel.FP8_GEMM
    is_large = k * n > _LARGE and product.use is not Use.ADDED
    max_rows = _MAX_ROWS_OF_LARGE if is_large else split_k_kernel.MAX_ROWS
    if rows <= max_rows:
        return Kernel.SPLIT_K
    has_scaled_mm = product.dtype == torch.bfloat16 and k % 16 == n % 16 == 0
    return Kernel.LIBRARY if has_scaled_mm and not product.has_groups else Kernel.FP8_GEMM


def matmul(
    x: torch.Tensor | NormedInput,
    weight: torch.Tensor | Fp8Weight,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x W^T + b: [rows, out], in the dtype of x.

    Args:
        x: [rows, in], or what has still to be normalised to that.
        weight: [out, in].
        bias: [out].
        out: [rows, out], the memory of the result if it is to be a given one.
    """
    return _matmul(_choose(x, weight, bias, Use.VALUES), x, weight, bias, out)


def _matmul(
    kernel: Kernel,
    x: torch.Tensor | NormedInput,
    weight: torch.Tensor | Fp8Weight,
    bias: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    if isinstance(weight, Fp8Weight):
        return _in_fp8(kernel, x, weight, bias, out=out)
    if kernel is Kernel.GEMV and not isinstance(x, torch.Tensor):  # it is chosen for no other x
        return gemv(x.x, weight, bias, x.weight, x.eps, out=out)
    x = _values(x)
    if kernel is Kernel.SPLIT_K:
        return split_k(x, weight, bias, out=out)
    if kernel is Kernel.TILED_GEMM:
        return tiled_gemm(x, weight, out=out)
    if out is None:
        return F.linear(x, weight, bias)
    torch.mm(x, weight.t(), out=out)
    return out if bias is None else out.add_(bias)


def store_matmul(
    x: torch.Tensor | NormedInput,
    weight: torch.Tensor | Fp8Weight,
    bias: torch.Tensor | None,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """`qk_norm_rope_store` of x W^T + b.

    Args:
        x: [tokens, in], or what has still to be normalised to that.
        weight: [(num_heads + 2 * num_kv_heads) * head_dim, in].
        bias: [(num_heads + 2 * num_kv_heads) * head_dim].

    The others, and what is returned, are those of `qk_norm_rope_store`.
    """
    norms = q_weight, k_weight, eps
    where = cos_sin, positions, k_cache, v_cache, slot_mapping
    kernel = _choose(x, weight, bias, Use.STORED, k_cache)
    if kernel is Kernel.QKV_GEMM:
        assert isinstance(weight, torch.Tensor), "it is chosen for no weight in fp8"
        return qkv_gemm(_values(x), weight, *norms, *where)
    return qk_norm_rope_store(_matmul(kernel, x, weight, bias), *norms, *where, kv_scales)


def gated_matmul(
    x: torch.Tensor | NormedInput,
    weight: torch.Tensor | Fp8Weight,
    bias: torch.Tensor | None = None,
) -> torch.Tensor | Gated:
    """silu(gate) * up, [rows, out], gate and up being the halves of x W^T + b.

    Args:
        x: [rows, in], or what has still to be normalised to that.
        weight: [2 * out, in].
        bias: [2 * out].

    Returns:
        It, or what becomes it in fp8 if the next product is in fp8; for `add_matmul` only.
    """
    kernel = _choose(x, weight, bias, Use.GATED)
    if isinstance(weight, Fp8Weight):
        if kernel in (Kernel.GEMV, Kernel.SPLIT_K):
            return _in_fp8(kernel, x, weight, bias, gated=True)
        return Gated(_in_fp8(kernel, x, weight, bias))
    if kernel is Kernel.GEMV and not isinstance(x, torch.Tensor):
        return gemv(x.x, weight, bias, x.weight, x.eps, gated=True)
    x = _values(x)
    if kernel is Kernel.SPLIT_K:
        return split_k(x, weight, bias, gated=True)
    if kernel is Kernel.TILED_GEMM:
        return tiled_gemm(x, weight, gated=True)
    return silu_and_mul(F.linear(x, weight, bias))


def add_matmul(
    stream: torch.Tensor,
    x: torch.Tensor | Gated,
    weight: torch.Tensor | Fp8Weight,
    bias: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Add x W^T + b to `stream` [rows, out], in place, or return what has still to be added.

    Args:
        x: [rows, in], or what `gated_matmul` returns.
        weight: [out, in].
        bias: [out].

    Returns:
        None, or partial sums [splits, rows, out] for the norm that comes next, float32, or one in
        the dtype of x.
    """
    kernel = _choose(x.x if isinstance(x, Gated) else x, weight, bias, Use.ADDED)
    if isinstance(weight, Fp8Weight):
        return _add_in_fp8(kernel, stream, x, weight, bias)
    x = x.values() if isinstance(x, Gated) else x
    if kernel in (Kernel.SPLIT_K, Kernel.TILED_GEMM):
        return _partial_sums(kernel, x, weight, bias)
    if kernel is Kernel.GEMV:
        gemv(x, weight, bias, add_to=stream)
    else:
        stream.addmm_(x, weight.t())  # the add is the product's epilogue
        if bias is not None:
            stream.add_(bias)
    return None


def summands(
    x: torch.Tensor, weight: torch.Tensor | Fp8Weight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """What `add_matmul` would add: [rows, out] in the dtype of x, or partial sums of it, [splits,
    rows, out] float32."""
    kernel = _choose(x, weight, bias, Use.ADDED)
    if isinstance(weight, Fp8Weight):
        is_split = kernel is Kernel.SPLIT_K
        return fp8_partial_sums(x, weight, bias) if is_split else _in_fp8(kernel, x, weight, bias)
    if kernel in (Kernel.SPLIT_K, Kernel.TILED_GEMM):
        return _partial_sums(kernel, x, weight, bias)
    return gemv(x, weight, bias) if kernel is Kernel.GEMV else F.linear(x, weight, bias)


def _in_fp8(
    kernel: Kernel,
    x: torch.Tensor | NormedInput,
    weight: Fp8Weight,
    bias: torch.Tensor | None,
    gated: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    if kernel is Kernel.GEMV and not isinstance(x, torch.Tensor):
        return fp8_gemv(x.x, weight, bias, x.weight, x.eps, gated, out=out)
    if kernel is Kernel.GEMV:
        return fp8_gemv(_values(x), weight, bias, gated=gated, out=out)
    return fp8_product(
        x, weight, bias, by_split_k=kernel is Kernel.SPLIT_K,
        by_library=kernel is Kernel.LIBRARY, gated=gated, out=out,
    )  # fmt: skip


def _add_in_fp8(
    kernel: Kernel,
    stream: torch.Tensor,
    x: torch.Tensor | Gated,
    weight: Fp8Weight,
    bias: torch.Tensor | None,
) -> torch.Tensor | None:
    if kernel is Kernel.GEMV:
        fp8_gemv(x.values() if isinstance(x, Gated) else x, weight, bias, add_to=stream)
        return None
    if kernel is Kernel.SPLIT_K:
        return fp8_partial_sums(x, weight, bias)
    by_library = kernel is Kernel.LIBRARY
    return fp8_product(x, weight, bias, by_split_k=False, by_library=by_library)[None]


def _partial_sums(
    kernel: Kernel, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    if kernel is Kernel.SPLIT_K:
        return split_k(x, weight, bias, splits=num_splits(weight.shape[0]))
    return tiled_gemm(x, weight, splits=SPLITS)  # chosen only without a bias


def _choose(
    x: torch.Tensor | NormedInput,
    weight: torch.Tensor | Fp8Weight,
    bias: torch.Tensor | None,
    use: Use,
    k_cache: torch.Tensor | None = None,
) -> Kernel:
    normed = None if isinstance(x, torch.Tensor) else x
    values = x if isinstance(x, torch.Tensor) else x.x
    in_fp8 = has_groups = False
    if isinstance(weight, Fp8Weight):
        in_fp8, has_groups, weight = True, weight.has_groups, weight.values
    product = ProductShape(
        values.shape[0], weight.shape[1], weight.shape[0], values.dtype, use, bias is not None,
        normed is not None, normed is not None and normed.partials is not None, in_fp8, has_groups,
    )  # fmt: skip
    if k_cache is not None:
        num_kv_heads, head_dim = k_cache.shape[-2:]
        product = product._replace(
            head_dim=head_dim, num_kv_heads=num_kv_heads,
            in_fp8_cache=k_cache.dtype != values.dtype,
        )  # fmt: skip
    gpu = gpu_with(weight)
    assert gpu is not None, "kernels run on a GPU"
    return choose_kernel(product, gpu)


def _values(x: torch.Tensor | NormedInput) -> torch.Tensor:
    return x if isinstance(x, torch.Tensor) else x.values()
