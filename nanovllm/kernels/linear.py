"""Matrix products, each by the kernel that `kernels.choice` names: plain, gated, added to the
residual stream, or stored as keys and values."""

import torch
import torch.nn.functional as F

from nanovllm.kernels.activation import silu_and_mul
from nanovllm.kernels.choice import Kernel, ProductShape, Use, choose_kernel
from nanovllm.kernels.fp8_gemv import fp8_gemv
from nanovllm.kernels.fp8_linear import Gated, NormedInput, fp8_partial_sums, fp8_product
from nanovllm.kernels.gated_gemm import gated_gemm
from nanovllm.kernels.gemv import gemv
from nanovllm.kernels.launch import gpu_with
from nanovllm.kernels.qkv_gemm import qkv_gemm
from nanovllm.kernels.rope_store import qk_norm_rope_store
from nanovllm.kernels.split_k import num_splits, split_k
from nanovllm.kernels.tiled_gemm import SPLITS, tiled_gemm
from nanovllm.quantization.fp8 import Fp8Weight


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
    if kernel is Kernel.GATED_GEMM:
        return gated_gemm(x, weight)
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
