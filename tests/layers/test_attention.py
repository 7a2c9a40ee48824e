"""The attention backends: which one runs, and that they agree."""

from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.engines import build
from helpers.kernel_inputs import (
    BF16,
    EPS,
    FP16,
    FP32,
    TOLERANCE,
    decode_batch,
    normal,
    relative_error,
)
from nanovllm.kernels import qkv_gemm
from nanovllm.layers import attention_backends
from nanovllm.layers.attention_backends import TritonBackend, make_backend, select_backend
from nanovllm.layers.linear import Linear
from nanovllm.utils.context import AttentionSpec, Context

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.gpu
@pytest.mark.parametrize("stores_at_once", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_backends_agree_gpu(
    monkeypatch: pytest.MonkeyPatch,
    head_dim: int,
    dtype: torch.dtype,
    qk_norm: bool,
    stores_at_once: bool,
) -> None:
    pytest.importorskip("flash_attn")
    if stores_at_once:  # of few tokens, too: the product stores keys and values
        monkeypatch.setattr(qkv_gemm, "MIN_ROWS", 257)
    device = torch.device("cuda")
    sizes = (256, 16, 8, head_dim)
    for is_prefill, query_lens in ((True, [300, 1, 70, 5, 129]), (False, [1, 1, 1, 1, 1])):
        outs = {}
        for name in ("torch", "triton", "flash-attn"):
            backend = make_backend(name, device, dtype, 8, head_dim, 256)
            assert backend.name == name
            batch = decode_batch([300, 1, 326, 5005, 641], sizes, dtype, "cuda", qk_norm=qk_norm)
            # What lies in unwritten slots is for our own kernels to ignore: no NaN for flash-attn.
            caches = [c.nan_to_num_() for c in (batch.before.k_cache, batch.before.v_cache)]
            tokens = sum(query_lens)
            tables, lens = batch.before.block_tables, batch.before.context_lens
            rows = [
                (row, context_len - count + i)
                for row, (count, context_len) in enumerate(zip(query_lens, lens.tolist()))
                for i in range(count)
            ]
            slots = [tables[row, p // 256].item() * 256 + p % 256 for row, p in rows]
            words = max(backend.max_decode_words(5, 5005), backend.max_prefill_words(5, tokens))
            host = torch.zeros(words, dtype=torch.int32)
            if is_prefill:
                lengths = np.array(query_lens, np.int32)
                backend.prepare_prefill(host.numpy(), lens.cpu().numpy() - lengths, lengths)
                step = 5, tokens, max(query_lens), 5005
                metadata = backend.prefill_metadata(host.to(device), *step)
            else:
                host_tables = tables.cpu().numpy()
                backend.prepare_decode(host.numpy(), lens.cpu().numpy(), host_tables, 5)
                metadata = backend.decode_metadata(host.to(device), 5)
            context = Context(
                backend=backend,
                kv_cache=[tuple(caches)],
                cos_sin=batch.cos_sin,
                is_prefill=is_prefill,
                positions=torch.tensor([p for _, p in rows], device=device).int(),
                slot_mapping=torch.tensor(slots, device=device).int(),
                context_lens=lens,
                block_tables=tables,
                cu_seqlens_q=torch.tensor([0, *accumulate(query_lens)], device=device).int(),
                max_seqlen_q=max(query_lens),
                max_context_len=5005,
                metadata=metadata,
            )
            projection = Linear(256, 32 * head_dim).to(device, dtype).requires_grad_(False)
            projection.weight.copy_(normal(32 * head_dim, 256, dtype=dtype, seed=3) / 16)
            qkv = projection(normal(tokens, 256, dtype=dtype, device="cuda", seed=4))
            spec = AttentionSpec(
                16, 8, head_dim, batch.before.scale, batch.q_weight, batch.k_weight, EPS
            )
            outs[name] = backend.attend(qkv, spec, tuple(caches), context)
        for name in ("flash-attn", "triton"):
            assert relative_error(outs[name], outs["torch"]) < 2 * TOLERANCE[dtype], name


def test_triton_lets_the_product_of_prompts_store_keys_and_values(
    monkeypatch: pytest.MonkeyPatch,
):
    """The product knows whether one kernel can do both: see tests/kernels/test_qkv_gemm.py."""
    q, values = torch.randn(3, 2, 8), torch.randn(3, 32)
    asked = []
    qkv = SimpleNamespace(stored=lambda *where: asked.append(where) or q, values=lambda: values)
    kernels = SimpleNamespace(
        paged_prefill=lambda q, *_: q, paged_decode=lambda qkv, *_: qkv[:, :16].view(3, 2, 8)
    )
    monkeypatch.setattr(attention_backends, "kernels", kernels)
    spec = AttentionSpec(2, 1, 8, 0.5, torch.ones(8), torch.ones(8), EPS, torch.ones(2, 1))
    cache = torch.zeros(1, 16, 1, 8), torch.zeros(1, 16, 1, 8)
    ints = torch.arange(3).int()
    context = Context(
        None, [cache], torch.zeros(8, 8), True, ints, ints + 1, ints, ints[:, None], ints, 3, 3
    )
    backend = TritonBackend.__new__(TritonBackend)
    assert torch.equal(backend.attend(qkv, spec, cache, context), q.flatten(1))
    [where] = asked
    expected = (
        spec.q_weight, spec.k_weight, EPS, context.cos_sin, context.positions, *cache,
        context.slot_mapping, spec.kv_scales,
    )  # fmt: skip
    assert len(where) == len(expected)
    assert all(one is other for one, other in zip(where, expected))
    context.is_prefill = False
    assert torch.equal(backend.attend(qkv, spec, cache, context), values[:, :16])
    assert len(asked) == 1


@pytest.mark.parametrize("backend", ["triton", "flash-attn"])
def test_backend_that_needs_a_gpu_says_so_on_a_cpu(tiny: Path, backend: str):
    message = f"attention_backend '{backend}' cannot run: it needs a GPU, and device is 'cpu'"
    with pytest.raises(ValueError, match=message) as raised:
        build(tiny, attention_backend=backend)
    assert "'torch'" in str(raised.value)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """Makes believe that there is a GPU of some generation, and which packages are there."""

    def pretend(capability: tuple[int, int], has_triton: bool, has_flash: bool) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        kernels = SimpleNamespace(MAX_HEAD_DIM=256, num_decode_ranges=lambda *_: 8)
        monkeypatch.setattr(attention_backends, "kernels", kernels if has_triton else None)
        obstacle = None if has_flash else "flash-attn is not installed"
        monkeypatch.setattr(attention_backends, "_flash_obstacle", lambda *_: obstacle)

    return pretend


CUDA = (torch.device("cuda"), BF16, 128, 256)


@pytest.mark.parametrize(
    ("capability", "has_triton", "has_flash", "expected"),
    [
        ((9, 0), True, True, "triton"), ((9, 0), True, False, "triton"),
        ((9, 0), False, True, "flash-attn"), ((9, 0), False, False, "torch"),
        ((8, 0), True, True, "flash-attn"), ((8, 0), True, False, "triton"),
        ((10, 0), True, True, "triton"),
    ],
)  # fmt: skip
def test_the_fastest_that_can_run_is_taken(
    gpu, capability: tuple[int, int], has_triton: bool, has_flash: bool, expected: str
):
    gpu(capability, has_triton, has_flash)
    assert select_backend("auto", *CUDA) == expected


def test_the_one_asked_for_is_taken_or_refused_with_those_that_could_be(gpu):
    gpu((9, 0), True, False)
    assert select_backend("torch", *CUDA) == "torch"
    assert select_backend("triton", *CUDA) == "triton"
    with pytest.raises(ValueError, match=r"not installed; could be: \['triton', 'torch'\]"):
        select_backend("flash-attn", *CUDA)
    gpu((9, 0), False, False)
    with pytest.raises(ValueError, match=r"triton is not installed, .*could be: \['torch'\]"):
        select_backend("triton", *CUDA)


def test_heads_that_no_tile_has_room_for_are_refused_or_go_elsewhere(gpu):
    gpu((9, 0), True, False)
    with pytest.raises(ValueError, match="a head_dim of 256 at most, got 512"):
        select_backend("triton", torch.device("cuda"), BF16, 512, 256)
    assert select_backend("auto", torch.device("cuda"), BF16, 512, 256) == "torch"
    assert select_backend("auto", torch.device("cuda"), BF16, 256, 256) == "triton"


@pytest.mark.parametrize(
    ("capability", "block_size", "expected"),
    [
        ((8, 0), None, ("flash-attn", 256)), ((8, 0), 512, ("flash-attn", 512)),
        ((9, 0), None, ("triton", 64)), ((9, 0), 256, ("triton", 256)),
    ],
)  # fmt: skip
def test_blocks_have_the_size_that_the_backend_takes_unless_told_otherwise(
    gpu, capability: tuple[int, int], block_size: int | None, expected: tuple[str, int]
):
    gpu(capability, True, True)
    backend = make_backend("auto", torch.device("cuda"), BF16, 8, 128, block_size)
    assert (backend.name, backend.block_size) == expected


@pytest.mark.parametrize(
    ("dtype", "block_size", "message"),
    [(FP32, 256, "dtype is torch.float32"), (BF16, 128, "a multiple of 256, got 128")],
)
def test_flash_attn_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block_size: int, message: str
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention_backends, "flash_attn_with_kvcache", lambda *_, **__: None)
    with pytest.raises(ValueError, match=message):
        select_backend("flash-attn", torch.device("cuda"), dtype, 128, block_size)
