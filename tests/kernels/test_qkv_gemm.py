"""The q/k/v product with norm, rotation and store at its end, against two steps in torch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from helpers.compile_launches import run_compiler
from helpers.kernel_inputs import (
    BF16,
    EPS,
    FP16,
    TOLERANCE,
    cos_sin_table,
    interpreted,
    normal,
    relative_error,
)
from nanovllm.kernels import linear as kernels_linear
from nanovllm.kernels import qkv_gemm as qkv_gemm_kernel
from nanovllm.kernels.launch import Gpu
from nanovllm.kernels.linear import store_matmul
from nanovllm.kernels.qkv_gemm import qkv_gemm
from nanovllm.layers.paged_attention import norm_rope_store

pytestmark = pytest.mark.usefixtures("poison")

BLOCK_SIZE, MAX_LEN = 16, 512
H100 = Gpu((9, 0), 227 * 1024, 228 * 1024, 132)


@dataclass
class Case:
    """Prompts' tokens on the way to attention. A third are padding rows."""

    x: torch.Tensor
    weight: torch.Tensor
    norms: tuple[torch.Tensor | None, torch.Tensor | None]
    positions: torch.Tensor
    slots: torch.Tensor
    heads: tuple[int, int, int]  # of queries, of keys, and the size of each

    @classmethod
    def random(
        cls,
        tokens: int,
        k: int,
        heads: tuple[int, int, int],
        dtype: torch.dtype,
        device: str = "cpu",
        qk_norm: bool = True,
    ) -> "Case":
        num_heads, num_kv_heads, head_dim = heads
        outputs = (num_heads + 2 * num_kv_heads) * head_dim
        generator = torch.Generator().manual_seed(0)
        positions = torch.randint(MAX_LEN, (tokens,), generator=generator).int()
        slots = torch.randperm(2 * tokens, generator=generator)[:tokens].int()
        slots[::3] = -1
        q_norm, k_norm = (
            normal(head_dim, dtype=dtype, device=device, seed=s) if qk_norm else None
            for s in (2, 3)
        )
        x = normal(tokens, k, dtype=dtype, device=device)
        weight = normal(outputs, k, dtype=dtype, device=device, seed=1) / k**0.5
        return cls(x, weight, (q_norm, k_norm), positions.to(device), slots.to(device), heads)

    def memory(self, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        """For keys and values. The block in front is not the cache's: slot -1 would be in it."""
        _, num_kv_heads, head_dim = self.heads
        shape = 1 + -(-2 * len(self.x) // BLOCK_SIZE), BLOCK_SIZE, num_kv_heads, head_dim
        made = [torch.full(shape, float("nan"), dtype=self.x.dtype) for _ in range(2)]
        return [one.to(self.x.device, dtype) for one in made]

    def where(self, memory: list[torch.Tensor]) -> tuple:
        cos_sin = cos_sin_table(MAX_LEN, self.heads[2], str(self.x.device))
        caches = (one[1:] for one in memory)
        return (*self.norms, EPS, cos_sin, self.positions, *caches, self.slots)

    def check(self, function: Callable[..., torch.Tensor], bias: torch.Tensor | None = None):
        """Whether `function`, of `where`, does what two steps in torch do."""
        (num_heads, _, head_dim), dtype = self.heads, self.x.dtype
        found, expected = self.memory(), self.memory()
        q = function(*self.where(found))
        q_expected = norm_rope_store(F.linear(self.x, self.weight, bias), *self.where(expected))
        assert q.dtype == dtype
        assert q.shape == (len(self.x), num_heads, head_dim)
        assert relative_error(q.flatten(0, 1), q_expected.flatten(0, 1)) < TOLERANCE[dtype]
        for one, other in zip(found, expected):
            written = other.isfinite()
            assert torch.equal(one.isfinite(), written)
            rows = (memory[written].view(-1, head_dim) for memory in (one, other))
            assert relative_error(*rows) < TOLERANCE[dtype]


@interpreted
@pytest.mark.parametrize(
    ("tokens", "k", "heads"),
    [
        (300, 72, (4, 2, 128)), (129, 64, (4, 1, 128)), (128, 136, (8, 2, 64)),
        (7, 40, (4, 4, 64)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("qk_norm", [True, False])
def test_qkv_gemm(tokens: int, k: int, heads: tuple[int, int, int], qk_norm: bool) -> None:
    case = Case.random(tokens, k, heads, FP16, qk_norm=qk_norm)
    case.check(lambda *where: qkv_gemm(case.x, case.weight, *where))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("tokens", [2048, 3001])
@pytest.mark.parametrize(
    ("k", "heads"), [(1024, (16, 8, 128)), (4096, (32, 8, 128)), (2048, (32, 8, 64))]
)
@pytest.mark.parametrize("qk_norm", [True, False])
def test_qkv_gemm_gpu(
    tokens: int, k: int, heads: tuple[int, int, int], dtype: torch.dtype, qk_norm: bool
) -> None:
    case = Case.random(tokens, k, heads, dtype, "cuda", qk_norm)
    case.check(lambda *where: qkv_gemm(case.x, case.weight, *where))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which kernel stored keys and values, on what might be an H100. From 258 tokens on it is the
    product; the other is slow in the interpreter, and played by torch."""
    names: list[str] = []

    def noted(name: str, function: Callable) -> None:
        called = lambda *args: names.append(name) or function(*args)  # noqa: E731
        monkeypatch.setattr(kernels_linear, name, called)

    noted("qkv_gemm", qkv_gemm)
    noted("qk_norm_rope_store", norm_rope_store)
    monkeypatch.setattr(kernels_linear, "gpu_with", lambda tensor: H100)
    monkeypatch.setattr(qkv_gemm_kernel, "MIN_ROWS", 258)
    return names


@interpreted
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_product_stores_itself_where_it_can(calls: list[str], normed: bool, has_bias: bool):
    """And nothing is dropped where it cannot: here a bias."""
    for tokens in (257, 258):
        case = Case.random(tokens, 64, (2, 1, 128), FP16)
        bias = normal(512, dtype=FP16, seed=4) if has_bias else None
        x = SimpleNamespace(x=case.x, partials=None, values=lambda x=case.x: x)
        args = x if normed else case.x, case.weight, bias
        case.check(lambda *where, args=args: store_matmul(*args, *where), bias)
    assert calls == ["qk_norm_rope_store", "qk_norm_rope_store" if has_bias else "qkv_gemm"]


def test_a_cache_in_fp8_gets_its_scales(calls: list[str]) -> None:
    case = Case.random(258, 64, (2, 1, 128), FP16)
    scales = torch.tensor([[0.5], [2.0]])
    found, expected = (case.memory(torch.float8_e4m3fn) for _ in range(2))
    store_matmul(case.x, case.weight, None, *case.where(found), scales)
    norm_rope_store(F.linear(case.x, case.weight), *case.where(expected), scales)
    for one, other in zip(found, expected):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    assert calls == ["qk_norm_rope_store"]


COMPILED = """
import torch
from helpers.compile_launches import H100, launches
from nanovllm.kernels.linear import store_matmul
from nanovllm.kernels.qkv_gemm import MIN_ROWS

def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

def compiled(card, tokens, k, num_heads, num_kv_heads, head_dim, has_norm=True):
    norm = empty(head_dim) if has_norm else None
    cache = empty(100, 64, num_kv_heads, head_dim)
    ints = empty(tokens, dtype=torch.int32)
    [launch] = launches(
        store_matmul, empty(tokens, k), empty((num_heads + 2 * num_kv_heads) * head_dim, k), None,
        norm, norm, 1e-6, empty(4096, head_dim, dtype=torch.float32), ints, cache, cache, ints,
        card=card,
    )
    assert launch.name == "_qkv_gemm_kernel" and launch.fits, (launch.name, launch.shared)
    return launch

for sizes in ((16384, 1024, 16, 8, 128), (MIN_ROWS, 2048, 32, 8, 64, False)):
    launch = compiled(H100, *sizes)
    registers = launch.registers * 32 * launch.num_warps
    assert launch.spills == 0, launch.spills
    assert 2 * registers <= 2**16, launch.registers
    assert 2 * (launch.shared + 1024) <= H100.shared_per_multiprocessor, launch.shared
"""


@pytest.mark.slow
@interpreted
def test_two_programs_share_a_multiprocessor(tmp_path: Path) -> None:
    """One finishes its tile beside the products of the other, and keeps it in registers."""
    run_compiler(COMPILED, tmp_path)
