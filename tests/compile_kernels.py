"""Compile every Triton kernel for Hopper, which takes no GPU: what the interpreter lets pass, the
compiler may not (a variable that changes its type between branches, say). Run as a script, without
TRITON_INTERPRET."""

from itertools import product
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nanovllm.kernels import (
    embed,
    gemv,
    gumbel_sample,
    paged_decode,
    paged_prefill,
    qk_norm_rope_store,
    rms_norm,
    silu_and_mul,
    split_k,
    tiled_gemm,
    truncate,
)

INTEGERS = (
    "positions", "slots", "bounds", "tiles", "chunk_counts", "cu_seqlens", "context_lens",
    "block_tables", "token_ids", "best_token", "turn", "top_k",
)  # fmt: skip
FLOATS = (
    "cos_sin", "partial", "best", "total", "partials", "temperatures", "top_p", "min_p",
    "thresholds",
)  # fmt: skip
LONGS = ("seeds", "sampled", "copies")
PROGRAM_LIMIT = 227 * 1024  # bytes of shared memory that a program may have on Hopper
SIZES: dict[str, Any] = {"num_kv_heads": 8, "head_dim": 128}


def compile_kernel(
    kernel: Any, options: dict[str, int], dtype: str = "bf16", out: str = "",
    boxes: dict[str, list[int]] | None = None, **constants: Any,
) -> int:  # fmt: skip
    """The shared memory that a program takes, in bytes.

    `constants` are the kernel's compile-time arguments, `boxes` its tensor descriptors; the
    types of others go by their name."""
    signature = {}
    for name in kernel.arg_names:
        base = name.removesuffix("_ptr")
        if name in constants:
            signature[name] = "constexpr"
        elif boxes and name in boxes:
            signature[name] = f"tensordesc<{dtype}{boxes[name]}>"
        elif not name.endswith("_ptr"):
            signature[name] = "fp32" if name in ("eps", "scale_log2") else "i32"
        elif base == "out" and out:
            signature[name] = "*" + out
        else:
            kinds = {"i32": INTEGERS, "fp32": FLOATS, "i64": LONGS}
            kind = next((kind for kind, names in kinds.items() if base in names), dtype)
            signature[name] = "*" + kind
    indices = {name: (kernel.arg_names.index(name),) for name in kernel.arg_names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={indices[name]: value for name, value in constants.items()},
        attrs={
            indices[name]: [["tt.divisibility", 16]]
            for name, kind in signature.items()
            if kind.startswith("*")
        },
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    shared = compiled.metadata.shared
    assert shared <= PROGRAM_LIMIT, f"{kernel.__name__} wants {shared} bytes of shared memory"
    return shared


def main() -> None:
    for dtype in ("bf16", "fp32"):
        wide = dtype == "bf16"
        precision = "tf32" if wide else "ieee"
        for fused in (True, False):
            compile_kernel(
                paged_decode._decode_kernel,
                {"num_warps": 4, "num_stages": 4 if fused else 3}
                if wide
                else {"num_warps": 8, "num_stages": 1},
                dtype, **SIZES, GROUP=2, BLOCK_G=16, BLOCK_D=128, BLOCK_N=64,
                MAX_CHUNKS=32, FUSED=fused, FIRST=128, LAST=256, NEWEST=512, PRECISION=precision,
                PDL=True,
            )  # fmt: skip
        compile_kernel(
            paged_prefill._prefill_kernel, {"num_warps": 4, "num_stages": 3 if wide else 1},
            dtype, **SIZES, block_size=256, num_heads=16, BLOCK_D=128, BLOCK_M=64,
            BLOCK_N=64 if wide else 16, PRECISION=precision, PDL=True,
        )  # fmt: skip
        compile_kernel(truncate._thresholds_kernel, {"num_warps": 16}, dtype, LANES=4096, PDL=True)
    for fused in (True, False):
        compile_kernel(
            paged_decode._combine_kernel, {"num_warps": 1}, MAX_CHUNKS=32, BLOCK_C=8, BLOCK_D=128,
            FUSED=fused, PDL=True,
        )  # fmt: skip
    compile_kernel(
        qk_norm_rope_store._qk_norm_rope_store_kernel, {"num_warps": 4}, **SIZES, num_heads=16,
        HEADS=8, BLOCK_D=128, PDL=True,
    )  # fmt: skip
    gemvs = [(1, 1024, True, False), (2, 1024, True, True), (1, 2560, True, True)]
    for rows, k, norm, gated in [*gemvs, (1, 9728, False, False)]:
        blocks, ahead, per_warp = gemv.tiling(k, norm, gated, element_size=2)
        compile_kernel(
            gemv._gemv_kernel, {"num_warps": 4}, k=k, GATED=gated, ADD=not norm,
            HAS_BIAS=not gated, HAS_NORM=norm, WARPS=4, ROWS=rows, PER_WARP=per_warp,
            BLOCKS=blocks, AHEAD=ahead, PDL=True,
        )  # fmt: skip
    for splits in (0, 8):
        compile_kernel(
            rms_norm._rms_norm_kernel, {"num_warps": 2}, SPLITS=splits, BLOCK=1024, PDL=True
        )
    for rows, gated in product((3, 32, 64, 128), (False, True)):
        padded_rows, block_k, stages = split_k.tiling(rows)
        shared = compile_kernel(
            split_k._split_k_kernel, {"num_warps": 4, "num_stages": stages}, out="fp32", n=1024,
            k=3072, slice_k=3072, ROWS=padded_rows, TILE=64, BLOCK_K=block_k, GATED=gated, PDL=True,
        )  # fmt: skip
        assert 2 * shared > PROGRAM_LIMIT, f"two programs of {rows} rows share a multiprocessor"
    for gated in (False, True):
        outputs = 32 if gated else 64
        compile_kernel(
            tiled_gemm._tiled_gemm_kernel, {"num_warps": 4, "num_stages": 4 if gated else 6},
            out="fp32", n=1024, k=3072, slice_k=768, ROWS=64, OUTPUTS=outputs, BLOCK_K=64,
            GATED=gated, LATE=gated, PDL=True,
            boxes={"x_desc": [64, 64], "weight_desc": [outputs, 64]},
        )  # fmt: skip
    compile_kernel(silu_and_mul._silu_and_mul_kernel, {"num_warps": 4}, BLOCK=1024, PDL=True)
    compile_kernel(embed._embed_kernel, {"num_warps": 2}, BLOCK=1024, PDL=True)
    compile_kernel(
        gumbel_sample._best_of_tile_kernel,
        {"num_warps": 8},
        TILE=4096,
        PDL=True,
        FAST_LOG=True,
        TRUNCATED=True,
    )
    compile_kernel(
        gumbel_sample._best_of_row_kernel, {"num_warps": 1}, out="i64", BLOCK=64, PDL=True
    )
    print("all compiled")


if __name__ == "__main__":
    main()
