"""What serves a matrix product: the one place where a kernel is chosen.

With few rows a product takes as long as its weight takes to be read, and cuBLAS is not made for
that. So the kernel goes by the number of rows:

- 1, and with small weights 2: `kernels.gemv`, which also does the norm before, and the gate or the
  residual add after;
- up to 128, with large weights up to 64: `kernels.split_k`;
- 129 to 256, with small weights: `kernels.tiled_gemm`;
- on Hopper, without biases, from 1024 on q/k/v of small models: `kernels.qkv_gemm`, which also does
  what comes before attention;
- the same from 2048 on, gate and up: `kernels.gated_gemm`, with the gate inside;
- else cuBLAS.

With a weight in fp8 (see `quantization.fp8`) it goes by rows in the same way: to
`kernels.fp8_gemv` with small weights, `kernels.split_k`, the library's `torch._scaled_mm`, and
`kernels.fp8_gemm` where these do not serve.
"""

from enum import Enum
from typing import NamedTuple

import torch

from nanovllm.kernels import fp8_gemv, gated_gemm, gemv, qkv_gemm, split_k, tiled_gemm
from nanovllm.kernels.launch import Gpu

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
    GATED_GEMM = "gated_gemm"
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
    if pays and fits and (rows == 1 or (rows == gemv.MAX_ROWS and is_small)):
        return Kernel.GEMV
    is_large = k * n > _LARGE and product.use is not Use.ADDED
    max_rows = _MAX_ROWS_OF_LARGE if is_large else split_k.MAX_ROWS
    if not gpu.is_hopper_class or product.dtype.itemsize != 2:
        return Kernel.LIBRARY
    if rows <= max_rows:
        return Kernel.SPLIT_K
    # Those that follow add no bias; their loads want rows of whole 16 bytes.
    if product.has_bias or k % 8 != 0:
        return Kernel.LIBRARY
    is_few = tiled_gemm.MIN_ROWS <= rows <= tiled_gemm.MAX_ROWS
    if is_few and k * n <= _MAX_TILED:
        return Kernel.TILED_GEMM
    if not gpu.is_hopper:  # the next two are measured nowhere else
        return Kernel.LIBRARY
    if product.use is Use.STORED and rows >= qkv_gemm.MIN_ROWS and _suits_qkv_gemm(product):
        return Kernel.QKV_GEMM
    # Rows of n / 2 are stored by 16 bytes, too.
    if product.use is Use.GATED and rows >= gated_gemm.MIN_ROWS and n % 16 == 0:
        return Kernel.GATED_GEMM
    return Kernel.LIBRARY


def _suits_qkv_gemm(product: ProductShape) -> bool:
    """Whether each of its tiles has whole heads of one kind, and it is faster than two kernels."""
    outputs = product.out_features, product.num_kv_heads * product.head_dim
    has_tiles = all(some % qkv_gemm.OUTPUTS == 0 for some in outputs)
    serves = product.head_dim in qkv_gemm.HEAD_DIMS and not product.in_fp8_cache
    return has_tiles and serves and product.in_features <= qkv_gemm.MAX_IN_FEATURES


def _choose_in_fp8(product: ProductShape, gpu: Gpu) -> Kernel:
    rows, k, n = product.rows, product.in_features, product.out_features
    is_small = k <= _SHORT_ROW or k * n <= _SMALL
    fits = k <= _MAX_FP8 and not product.has_partials
    if fits and is_small and rows <= fp8_gemv.MAX_ROWS:
        return Kernel.GEMV
    if not gpu.is_hopper_class:
        return Kernel.GEMV if fits and rows == 1 else Kernel.FP8_GEMM
    is_large = k * n > _LARGE and product.use is not Use.ADDED
    max_rows = _MAX_ROWS_OF_LARGE if is_large else split_k.MAX_ROWS
    if rows <= max_rows:
        return Kernel.SPLIT_K
    has_scaled_mm = product.dtype == torch.bfloat16 and k % 16 == n % 16 == 0
    return Kernel.LIBRARY if has_scaled_mm and not product.has_groups else Kernel.FP8_GEMM
