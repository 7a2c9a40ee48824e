"""The loops that numba compiles for a CPU, against float64 and their twins in torch."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("numba")

import numba

from helpers.checkpoints import Reference
from helpers.engines import GREEDY, build
from helpers.kernel_inputs import (
    BF16,
    EPS,
    FP16,
    FP32,
    TOLERANCE,
    DecodeBatch,
    Sizes,
    decode_batch,
    normal,
    relative_error,
    rms_norm_float64,
)
from nanovllm.layers import cpu_kernels, paged_attention
from nanovllm.layers.activation import ACTIVATIONS, activate_and_mul
from nanovllm.layers.attention_backends import make_backend, select_backend
from nanovllm.layers.layernorm import RMSNorm, rms_norm
from nanovllm.utils import kernels as utils_kernels

CPU = torch.device("cpu")
dtypes = pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
threads = pytest.mark.parametrize("num_threads", [1, 2], indirect=True)
# Blocks of one token, of sizes that are no power of two, groups of 1 to 5 heads, odd head dims.
sizes = pytest.mark.parametrize(
    "sizes", [(1, 2, 2, 8), (16, 6, 3, 20), (48, 5, 1, 64), (64, 16, 8, 128)], ids=str
)


@pytest.fixture
def num_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(cpu_kernels, "_VALUES_OF_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    return request.param


def by_head(cache: torch.Tensor) -> torch.Tensor:
    """As `engine.kv_cache.allocate_kv_cache` lays it out on a CPU."""
    return cache.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)


def new_tokens(context_lens: list[int], sizes: Sizes, dtype: torch.dtype, **options: Any):
    batch = decode_batch(context_lens, sizes, dtype, **options)
    caches = [by_head(batch.before.k_cache), by_head(batch.before.v_cache)]
    args = (*batch.new_token[:6], *caches, batch.slot_mapping)
    return batch, args, caches


def decode(batch: DecodeBatch, args: tuple, rows: slice = slice(None)) -> torch.Tensor:
    qkv, q_weight, k_weight, eps, cos_sin, positions, k_cache, v_cache, slots = args
    lens, tables = batch.after.context_lens[rows], batch.after.block_tables[rows]
    return cpu_kernels.decode(
        qkv[rows], q_weight, k_weight, eps, cos_sin, positions[rows], k_cache, v_cache,
        slots[rows], lens, tables, batch.after.scale,
    )  # fmt: skip


@dtypes
@sizes
@threads
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.usefixtures("poison")
def test_new_tokens_are_stored_and_attend_to_their_contexts(
    sizes: Sizes, dtype: torch.dtype, num_threads: int, qk_norm: bool
):
    batch, args, caches = new_tokens([1, 100, 64, 65, 0], sizes, dtype, qk_norm=qk_norm)
    found = decode(batch, args)
    assert relative_error(found, batch.after.expected()) < TOLERANCE[dtype]
    written = batch.after.k_cache.isfinite()
    for cache, expected in zip(caches, (batch.after.k_cache, batch.after.v_cache)):
        assert torch.equal(cache.isfinite(), written), "what nobody wrote stays as it was"
        cache, expected = (each.masked_fill(~written, 0.0) for each in (cache, expected))
        assert relative_error(cache.flatten(0, 2), expected.flatten(0, 2)) < TOLERANCE[dtype]


@dtypes
@threads
def test_a_prompt_is_stored_as_by_torch(dtype: torch.dtype, num_threads: int):
    tokens, (block_size, num_heads, num_kv_heads, head_dim) = 300, (16, 4, 2, 64)
    slots = torch.randperm(20 * block_size, generator=torch.Generator().manual_seed(1))
    slots = slots[:tokens].int()
    slots[[3, 299]] = -1
    stored = {}
    for kernels in (cpu_kernels, paged_attention):
        shape = (20, block_size, num_kv_heads, head_dim)
        caches = [by_head(torch.zeros(shape, dtype=dtype)) for _ in range(2)]
        q = kernels.norm_rope_store(
            normal(tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype),
            *(normal(head_dim, dtype=dtype, seed=seed) for seed in (2, 3)), EPS,
            normal(400, head_dim, dtype=FP32, seed=4), torch.arange(50, 50 + tokens).int(),
            *caches, slots,
        )  # fmt: skip
        stored[kernels] = (q, *caches)
    for own, theirs in zip(*stored.values()):
        assert relative_error(own.flatten(0, -2), theirs.flatten(0, -2)) < TOLERANCE[dtype] / 2


@dtypes
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype):
    batch, args, _ = new_tokens([70, 3, 65, 200], (16, 4, 2, 64), dtype)
    together = decode(batch, args)
    for row in range(4):
        own = slice(row, row + 1)
        assert torch.equal(decode(batch, args, own), together[own])


@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_and_in_its_row(dtype: torch.dtype, value: float):
    batch, args, _ = new_tokens([70, 80], (16, 4, 2, 64), dtype)
    args[0][1, :64] = value  # the first query of the second row
    out = decode(batch, args)
    assert out[0].isfinite().all() and out[1, 1:].isfinite().all()
    assert out[1, 0].isnan().all()


@dtypes
@pytest.mark.parametrize("shape", [(1, 1024), (3, 8), (16, 1000)], ids=str)
@pytest.mark.usefixtures("poison")
def test_norm(dtype: torch.dtype, shape: tuple[int, int]):
    x, weight = 30 * normal(*shape, dtype=dtype), normal(shape[1], dtype=dtype, seed=1)
    found = cpu_kernels.rms_norm(x, weight, EPS)
    assert relative_error(found, rms_norm_float64(x, weight, EPS)) < TOLERANCE[dtype] / 2
    torch.testing.assert_close(found, rms_norm(x, weight, EPS))


@dtypes
def test_gate(dtype: torch.dtype):
    gate = torch.cat((torch.linspace(-100, 100, 5001), torch.tensor([torch.inf, torch.nan])))
    gate_up = torch.stack((gate, normal(5003, dtype=FP32))).view(1, -1).to(dtype)
    found = cpu_kernels.silu_and_mul(gate_up)
    gate, up = gate_up.double().chunk(2, dim=-1)
    rtol = 1e-5 if dtype == FP32 else 2**-8
    expected = F.silu(gate) * up
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=1e-35, equal_nan=True)


def test_a_gate_takes_the_loop_for_few_rows_of_silu(monkeypatch: pytest.MonkeyPatch):
    seen, loop = [], cpu_kernels.silu_and_mul
    monkeypatch.setattr(cpu_kernels, "silu_and_mul", lambda x: seen.append(len(x)) or loop(x))
    for rows, activation in ((1, "silu"), (16, "silu"), (17, "silu"), (1, "gelu")):
        gate, up = (gate_up := normal(rows, 4096, dtype=FP32)).chunk(2, dim=-1)
        expected = ACTIVATIONS[activation](gate) * up
        torch.testing.assert_close(activate_and_mul(gate_up, activation), expected)
    assert seen == [1, 16]


def test_a_norm_takes_the_loop_for_few_rows_in_its_dtypes(monkeypatch: pytest.MonkeyPatch):
    norm, seen = RMSNorm(1024, EPS).requires_grad_(False), []
    norm.weight.fill_(1.0)
    loop = cpu_kernels.rms_norm
    monkeypatch.setattr(cpu_kernels, "rms_norm", lambda *a: seen.append(len(a[0])) or loop(*a))
    for rows, dtype in ((1, FP32), (64, BF16), (65, BF16), (1, FP16)):
        x = normal(rows, 1024, dtype=dtype)
        out = torch.empty_like(x)
        assert norm.to(dtype).normalize(x, None, out) is out
        torch.testing.assert_close(out, rms_norm(x, norm.weight, EPS))
    assert seen == [1, 64]


def test_rounding_to_bf16_is_that_of_torch():
    """All values just below, at and above the middle of two neighbours; infinities; NaN."""
    upper = torch.arange(2**16, dtype=torch.int64) << 16
    bits = torch.cat([upper + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    x = bits.to(torch.uint32).view(FP32)
    expected = x.to(BF16)
    found = torch.empty_like(expected)

    @numba.njit
    def narrow(x: Any, out: Any) -> None:
        for i in range(len(x)):
            out[i] = cpu_kernels._narrow(x[i], out)

    narrow(x.numpy(), found.view(torch.uint16).numpy())
    same = found.view(torch.int16) == expected.view(torch.int16)
    assert (same | (found.isnan() & expected.isnan())).all()


def test_torch_keeps_its_threads():
    """numba's and torch's may be those of one OpenMP, whose number numba sets at its start."""
    code = (
        "import torch; torch.set_num_threads(1); from nanovllm.layers import cpu_kernels as own; "
        "own._by_threads(2**30, lambda: None); assert torch.get_num_threads() == 1"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=os.environ | {"OMP_NUM_THREADS": "4"}
    )


@pytest.mark.parametrize(
    "setting", [{"NUMBA_DISABLE_JIT": "1"}, {"NUMBA_THREADING_LAYER": "tbb"}], ids=str
)
def test_numba_that_cannot_run_is_none(setting: dict[str, str]):
    code = (
        "import sys; sys.modules['numba.np.ufunc.tbbpool'] = None; import torch; "
        "from nanovllm.layers.attention_backends import select_backend; "
        "print(select_backend('auto', torch.device('cpu'), torch.float32, 64, 64))"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, check=True, env=os.environ | setting, stdout=subprocess.PIPE)
    assert result.stdout.split() == [b"torch"]


def test_small_work_is_done_by_one_thread_and_numbas_number_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(cpu_kernels, "_MOST_THREADS", 8)
    taken: list[int] = []
    monkeypatch.setattr(numba, "set_num_threads", taken.append)
    monkeypatch.setattr(numba, "get_num_threads", lambda: 7)
    for num_values in (1, 2**19 - 1, 2**19, 2**30):
        cpu_kernels._by_threads(num_values, lambda: None)
    assert taken == [1, 7, 1, 7, 2, 7, 3, 7]


@pytest.mark.slow
def test_no_memory_is_freed_while_it_is_read(tmp_path: Path):
    """By default numba happens to free arrays late; its compiled code may do so after their last
    use by name."""
    names = "test_new_tokens_are_stored_and_attend_to_their_contexts or test_without_numba"
    early = {"NUMBA_LLVM_REFPRUNE_PASS": "0", "NUMBA_CACHE_DIR": str(tmp_path)}
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", names]
    subprocess.run(run, check=True, env=os.environ | early, cwd=Path(__file__).parents[2])


def test_code_is_compiled_where_nothing_may_be_kept(monkeypatch: pytest.MonkeyPatch):
    compile_function, calls = cpu_kernels.njit, []

    def njit(function: Any, cache: bool = False, **options: Any) -> Any:
        calls.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return compile_function(function, **options)

    monkeypatch.setattr(cpu_kernels, "njit", njit)
    assert cpu_kernels._compiled()(lambda x: x + 1)(1) == 2 and calls == [True, False]


def test_who_takes_them():
    assert select_backend("auto", CPU, BF16, 128, 64) == "numba"
    for dtype, fp8_cache, why in (
        (FP16, False, "float32 and bfloat16 only, and dtype is torch.float16"),
        (BF16, True, "no cache with kv_cache_dtype='fp8'"),
    ):
        assert select_backend("auto", CPU, dtype, 128, 64, fp8_cache) == "torch"
        with pytest.raises(ValueError, match=f"{why}; could be: .'torch'."):
            select_backend("numba", CPU, dtype, 128, 64, fp8_cache)
    with pytest.raises(ValueError, match="it needs a CPU, and device is 'meta'"):
        select_backend("numba", torch.device("meta"), BF16, 128, 64)
    assert make_backend("numba", CPU, BF16, 2, 128, None).block_size == 64


def test_without_numba_torch_computes_the_same(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    prompts = [[5, 6, 7], [9] * 40]
    with build(tiny) as llm:
        assert llm.model_runner.attention_backend == "numba"
        expected = [out["token_ids"] for out in llm.generate(prompts, GREEDY, use_tqdm=False)]
    monkeypatch.setattr(utils_kernels, "_import_cpu_kernels", lambda: None)
    with pytest.raises(ValueError, match=r"numba is not installed \(pip install 'nanovllm.cpu.'\)"):
        build(tiny, attention_backend="numba")
    with build(tiny) as llm:
        assert llm.model_runner.attention_backend == "torch"
        assert [o["token_ids"] for o in llm.generate(prompts, GREEDY, use_tqdm=False)] == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_goes_on_with_torch(tiny: Path, tiny_reference: Reference):
    """Where torch has one thread, it can; numba's threads cannot."""
    code = """
import os, sys, torch
from nanovllm import LLM, SamplingParams
torch.set_num_threads(1)
llm = LLM(sys.argv[1], device="cpu", num_kvcache_blocks=4)
greedy = SamplingParams(temperature=0, max_tokens=12)
llm.generate([5, 6, 7], greedy, use_tqdm=False)
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(*llm.generate([5, 6, 7], greedy, use_tqdm=False)[0]["token_ids"], flush=True)
again = LLM(sys.argv[1], device="cpu", num_kvcache_blocks=4)
print(again.model_runner.attention_backend, flush=True)
os._exit(0)
"""
    command = [sys.executable, "-c", code, str(tiny)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=120)
    tokens, backend = result.stdout.splitlines()
    assert [int(token) for token in tokens.split()] == tiny_reference.tokens([5, 6, 7], 12)
    assert backend == "torch"


def test_numba_is_imported_by_who_needs_it():
    code = "import sys, nanovllm.llm; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
