"""Which kernel serves a product: a table over rows, shapes, uses, dtypes and GPUs; and that what is
launched then compiles and fits."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from helpers.cases import slow
from helpers.compile_launches import run_compiler
from helpers.kernel_inputs import interpreted
from nanovllm.kernels import gated_gemm, qkv_gemm
from nanovllm.kernels.choice import Kernel, ProductShape, Use, choose_kernel
from nanovllm.kernels.launch import Gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GEMV, SPLIT_K, LIBRARY = Kernel.GEMV, Kernel.SPLIT_K, Kernel.LIBRARY
TILED_GEMM, FP8_GEMM, QKV_GEMM = Kernel.TILED_GEMM, Kernel.FP8_GEMM, Kernel.QKV_GEMM
GATED_GEMM = Kernel.GATED_GEMM
LETTERS = {kernel: kernel.value[0] for kernel in Kernel} | {GATED_GEMM: "G"}
MIN_ROWS = gated_gemm.MIN_ROWS
KIB = 1024
GPUS = {
    "A100": Gpu((8, 0), 163 * KIB, 164 * KIB, 108),
    "RTX 3090": Gpu((8, 6), 99 * KIB, 100 * KIB, 82),
    "L4": Gpu((8, 9), 99 * KIB, 100 * KIB, 58),
    "H100": Gpu((9, 0), 227 * KIB, 228 * KIB, 132),
    "B200": Gpu((10, 0), 227 * KIB, 228 * KIB, 148),
    "RTX 5090": Gpu((12, 0), 99 * KIB, 100 * KIB, 170),
}
HOPPER_CLASS = ("H100", "B200")


class Shape(NamedTuple):
    """A published model: hidden, intermediate, q/k/v outputs, attention's width, vocabulary."""

    hidden: int
    inner: int
    qkv: int
    attended: int
    vocab: int

    def products(self) -> dict[str, tuple[int, int, Use, bool]]:
        """In and out features, what becomes of it, and whether a norm comes before."""
        return {
            "qkv": (self.hidden, self.qkv, Use.VALUES, True),
            "output": (self.attended, self.hidden, Use.ADDED, False),
            "gate_up": (self.hidden, 2 * self.inner, Use.GATED, True),
            "down": (self.inner, self.hidden, Use.ADDED, False),
            "head": (self.hidden, self.vocab, Use.VALUES, True),
        }


MODELS = {
    "Qwen3-0.6B": Shape(1024, 3072, 4096, 2048, 151936),
    "Qwen3-4B": Shape(2560, 9728, 6144, 4096, 151936),
    "Qwen3-8B": Shape(4096, 12288, 6144, 4096, 151936),
    "Qwen3-32B": Shape(5120, 25600, 10240, 8192, 151936),
    "Qwen2.5-0.5B": Shape(896, 4864, 1152, 896, 151936),
    "Qwen2.5-7B": Shape(3584, 18944, 4608, 3584, 152064),
    "Llama-3.2-1B": Shape(2048, 8192, 3072, 2048, 128256),
    "Llama-3.1-8B": Shape(4096, 14336, 6144, 4096, 128256),
    "Mistral-7B": Shape(4096, 14336, 6144, 4096, 32768),
}
NAMES = ("qkv", "output", "gate_up", "down", "head")

# On Hopper in bf16: rows, then the kernels of the five products in the order of NAMES, by their
# LETTERS (g: GEMV, s: split K, t: tiled GEMM, l: library).
ON_HOPPER = [
    (
        "Qwen3-0.6B",
        {1: "ggggg", 2: "ggggg", 3: "sssss", 64: "sssss", 65: "ssssl", 129: "ttttl", 256: "ttttl"},
    ),
    ("Qwen3-4B", {1: "ggggg", 2: "sssss", 3: "sssss", 64: "sssss", 65: "sslsl", 128: "sslsl"}),
    ("Qwen3-8B", {1: "ggggg", 2: "sssss", 64: "sssss", 65: "sslsl", 128: "sslsl"}),
    ("Qwen3-32B", {1: "sgsgs", 2: "sssss", 64: "sssss", 65: "lslsl", 129: "lllll"}),
    ("Qwen2.5-0.5B", {1: "ggggg", 2: "ggggg", 64: "sssss", 65: "ssssl", 129: "ttltl"}),
    ("Qwen2.5-7B", {1: "ggggg", 2: "sssss", 64: "sssss", 65: "sslsl", 129: "lllll"}),
    ("Llama-3.2-1B", {1: "ggggg", 2: "gggsg", 3: "sssss", 64: "sssss", 65: "ssssl", 129: "ttlll"}),
    ("Llama-3.1-8B", {1: "ggggg", 2: "sssss", 64: "sssss", 65: "sslsl", 128: "sslsl"}),
    ("Mistral-7B", {1: "ggggg", 2: "sssss", 64: "sssss", 65: "sslsl", 128: "sslsl"}),
]
# The same in fp8 (f: GEMM for fp8), of all but the head, which is not in fp8.
IN_FP8_ON_HOPPER = [
    ("Qwen3-0.6B", {1: "gggg", 2: "gggg", 3: "ssss", 128: "ssss", 129: "llll"}),
    ("Qwen3-8B", {1: "ssss", 64: "ssss", 65: "ssls", 129: "llll"}),
    ("Qwen3-32B", {1: "ssss", 64: "ssss", 65: "lsls", 129: "llll"}),
    ("Qwen2.5-0.5B", {1: "gggg", 2: "gggg", 64: "ssss", 128: "ssss", 129: "llll"}),
    ("Llama-3.2-1B", {1: "gggs", 2: "gggs", 3: "ssss", 128: "ssss", 129: "llll"}),
]


# First in its file, as it takes longest.
@interpreted
@pytest.mark.parametrize("sample", ["SAMPLE", slow("SECOND_SAMPLE")])
def test_a_sample_of_models_and_gpus_compiles_and_fits(tmp_path: Path, sample: str) -> None:
    """What the interpreter lets pass, the compiler may not (a variable that changes its type
    between branches, say), and only the compiler tells how much shared memory a program takes."""
    code = f"from helpers.compile_models import *; compile_steps({sample})"
    assert run_compiler(code, tmp_path).endswith("all compiled\n")


def chosen(model: str, gpu: str, rows: int, **options: Any) -> str:
    options = {"dtype": BF16} | options
    products = MODELS[model].products()
    kernels = []
    for name in NAMES:
        k, n, use, has_norm = products[name]
        product = ProductShape(rows, k, n, use=use, has_norm=has_norm, **options)
        kernels.append(LETTERS[choose_kernel(product, GPUS[gpu])])
    return "".join(kernels)


@pytest.mark.parametrize(("model", "table"), ON_HOPPER)
@pytest.mark.parametrize("gpu", HOPPER_CLASS)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_products_of_published_models_on_hopper(
    model: str, table: dict[int, str], gpu: str, dtype: torch.dtype
):
    assert {rows: chosen(model, gpu, rows, dtype=dtype) for rows in table} == table
    for rows in (257, MIN_ROWS - 1):
        assert chosen(model, gpu, rows, dtype=dtype) == "lllll"
    many = "llGll" if GPUS[gpu].is_hopper else "lllll"
    for rows in (MIN_ROWS, 16384):
        assert chosen(model, gpu, rows, dtype=dtype) == many


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("gpu", sorted(GPUS.keys() - set(HOPPER_CLASS)))
def test_other_gpus_have_gemv_and_the_library(model: str, gpu: str):
    """Split K is made for Hopper's shared memory."""
    on_hopper = dict(ON_HOPPER)[model]
    for rows in (1, 2):
        assert chosen(model, gpu, rows) == on_hopper[rows].replace("s", "l")
    for rows in (3, 64, 128, 129, MIN_ROWS):
        assert chosen(model, gpu, rows) == "lllll"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("gpu", GPUS)
def test_float32_has_gemv_and_the_library(model: str, gpu: str):
    on_hopper = dict(ON_HOPPER)[model]
    for rows in (1, 2):
        assert chosen(model, gpu, rows, dtype=FP32) == on_hopper[rows].replace("s", "l")
    for rows in (3, 64, MIN_ROWS):
        assert chosen(model, gpu, rows, dtype=FP32) == "lllll"


@pytest.mark.parametrize("gpu", GPUS)
def test_a_norm_with_partial_sums_before_it_is_not_for_gemv(gpu: str):
    """It knows none: they would be lost."""
    few = SPLIT_K if gpu in HOPPER_CLASS else LIBRARY
    for use in (Use.VALUES, Use.GATED):
        product = ProductShape(1, 1024, 4096, BF16, use, has_norm=True)
        assert choose_kernel(product, GPUS[gpu]) is GEMV
        assert choose_kernel(product._replace(has_partials=True), GPUS[gpu]) is few


@pytest.mark.parametrize("gpu", GPUS)
def test_gemv_serves_what_it_takes_a_norm_or_an_addition_from(gpu: str):
    few = SPLIT_K if gpu in HOPPER_CLASS else LIBRARY
    for use in (Use.VALUES, Use.GATED):
        assert choose_kernel(ProductShape(1, 1024, 4096, BF16, use), GPUS[gpu]) is few
    assert choose_kernel(ProductShape(1, 1024, 4096, BF16, Use.ADDED), GPUS[gpu]) is GEMV


@pytest.mark.parametrize("use", list(Use))
def test_tiled_gemm_adds_no_bias_and_wants_whole_loads(use: Use):
    product = ProductShape(200, 1024, 4096, BF16, use)
    assert choose_kernel(product, GPUS["H100"]) is TILED_GEMM
    assert choose_kernel(product._replace(has_bias=True), GPUS["H100"]) is LIBRARY
    assert choose_kernel(product._replace(in_features=1020), GPUS["H100"]) is LIBRARY


def test_gated_gemm_adds_no_bias_and_wants_whole_loads_and_stores():
    product = ProductShape(MIN_ROWS, 1024, 6144, BF16, Use.GATED)
    assert choose_kernel(product, GPUS["H100"]) is GATED_GEMM
    normed = product._replace(has_norm=True, has_partials=True)
    assert choose_kernel(normed, GPUS["H100"]) is GATED_GEMM  # the norm comes first
    for change in ({"has_bias": True}, {"in_features": 1020}, {"out_features": 6136}):
        assert choose_kernel(product._replace(**change), GPUS["H100"]) is LIBRARY


QKV = ProductShape(16384, 1024, 4096, BF16, Use.STORED, has_norm=True, head_dim=128, num_kv_heads=8)


@pytest.mark.parametrize("gpu", GPUS)
def test_prompts_are_stored_by_their_product_on_hopper(gpu: str):
    few = QKV._replace(rows=qkv_gemm.MIN_ROWS - 1)
    assert choose_kernel(few, GPUS[gpu]) is LIBRARY
    for dtype in (BF16, FP16):
        many = QKV._replace(rows=qkv_gemm.MIN_ROWS, dtype=dtype)
        assert choose_kernel(many, GPUS[gpu]) is (QKV_GEMM if gpu == "H100" else LIBRARY)
    assert choose_kernel(QKV._replace(dtype=FP32), GPUS[gpu]) is LIBRARY
    assert choose_kernel(QKV._replace(use=Use.VALUES), GPUS[gpu]) is LIBRARY


@pytest.mark.parametrize("rows", [1, 2, 8, 128, 129, 256, 257, 1000])
def test_what_stores_a_few_rows_is_chosen_as_for_values(rows: int):
    product = QKV._replace(rows=rows)
    values = choose_kernel(product._replace(use=Use.VALUES), GPUS["H100"])
    assert choose_kernel(product, GPUS["H100"]) is values


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"has_bias": True}, LIBRARY), ({"in_fp8_cache": True}, LIBRARY),
        ({"in_fp8": True}, LIBRARY), ({"in_features": 1020}, LIBRARY),
        ({"in_features": 4096}, LIBRARY),
        ({"head_dim": 96, "out_features": 3072}, LIBRARY),
        ({"head_dim": 256, "out_features": 8192}, LIBRARY),
        ({"head_dim": 64, "out_features": 2048}, QKV_GEMM),
        ({"num_kv_heads": 1, "out_features": 2304}, QKV_GEMM),
        # Half a tile of heads: one would have keys and values.
        ({"head_dim": 64, "num_kv_heads": 1, "out_features": 1024}, LIBRARY),
        ({"head_dim": 64, "num_kv_heads": 2, "out_features": 1088}, LIBRARY),
    ],
)  # fmt: skip
def test_what_the_product_that_stores_does_not_serve(change: dict[str, Any], expected: Kernel):
    assert choose_kernel(QKV._replace(**change), GPUS["H100"]) is expected


@pytest.mark.parametrize("rows", [1, 2, 3, 64])
def test_a_bias_changes_nothing_in_small_batches(rows: int):
    for name, (k, n, use, has_norm) in MODELS["Qwen2.5-0.5B"].products().items():
        product = ProductShape(rows, k, n, BF16, use, has_norm=has_norm)
        for gpu in GPUS.values():
            biased = choose_kernel(product._replace(has_bias=True), gpu)
            assert biased is choose_kernel(product, gpu), name


@pytest.mark.parametrize(("model", "table"), IN_FP8_ON_HOPPER)
@pytest.mark.parametrize("gpu", HOPPER_CLASS)
@pytest.mark.parametrize("has_groups", [False, True])
def test_products_in_fp8_on_hopper(
    model: str, table: dict[int, str], gpu: str, has_groups: bool
) -> None:
    """The library's product knows no scales of groups."""
    options = {"in_fp8": True, "has_groups": has_groups}
    found = {rows: chosen(model, gpu, rows, **options)[:4] for rows in table}
    if has_groups:
        table = {rows: kernels.replace("l", "f") for rows, kernels in table.items()}
    assert found == table


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("gpu", ["L4", "RTX 5090"])
def test_products_in_fp8_on_other_gpus(model: str, gpu: str) -> None:
    assert chosen(model, gpu, 1, in_fp8=True)[:4] == "gggg"
    for rows in (3, 64, 1000, MIN_ROWS):
        assert chosen(model, gpu, rows, in_fp8=True)[:4] == "ffff"


@pytest.mark.parametrize("use", list(Use))
def test_what_the_library_lacks_in_fp8(use: Use) -> None:
    product = ProductShape(200, 1024, 4096, BF16, use, in_fp8=True)
    assert choose_kernel(product, GPUS["H100"]) is LIBRARY
    for change in ({"dtype": FP16}, {"dtype": FP32}, {"in_features": 1000}, {"out_features": 4088}):
        assert choose_kernel(product._replace(**change), GPUS["H100"]) is FP8_GEMM


@pytest.mark.parametrize("gpu", ["L4", "H100", "B200", "RTX 5090"])
def test_gemv_in_fp8_knows_no_partial_sums(gpu: str) -> None:
    product = ProductShape(1, 1024, 4096, BF16, has_norm=True, in_fp8=True)
    assert choose_kernel(product, GPUS[gpu]) is GEMV
    few = SPLIT_K if gpu in HOPPER_CLASS else FP8_GEMM
    assert choose_kernel(product._replace(has_partials=True), GPUS[gpu]) is few
