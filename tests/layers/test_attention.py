"""The attention backends: which one runs, and that they agree."""

from itertools import accumulate
from pathlib import Path

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
from nanovllm.kernels.paged_decode import plan_decode
from nanovllm.layers import attention
from nanovllm.layers.attention import BACKENDS, select_backend
from nanovllm.utils.context import Context

pytestmark = pytest.mark.usefixtures("poison")


# Which one runs


@pytest.mark.parametrize("backend", ["triton", "flash-attn"])
def test_backend_that_needs_a_gpu_says_so_on_a_cpu(tiny: Path, backend: str):
    message = f"attention_backend '{backend}' cannot run: it needs a GPU, and device is 'cpu'"
    with pytest.raises(ValueError, match=message) as raised:
        build(tiny, attention_backend=backend)
    assert "'torch'" in str(raised.value)


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch):
    """Makes believe that there is a GPU of some generation, and which packages are there."""

    def set_up(capability: tuple[int, int], has_triton: bool, has_flash: bool) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(attention, "HAS_TRITON", has_triton)
        obstacle = None if has_flash else "flash-attn is not installed"
        monkeypatch.setattr(attention, "_flash_obstacle", lambda *_: obstacle)

    return set_up


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
    pretend, capability: tuple[int, int], has_triton: bool, has_flash: bool, expected: str
):
    pretend(capability, has_triton, has_flash)
    assert select_backend("auto", *CUDA) == expected


def test_the_one_asked_for_is_taken_or_refused_with_those_that_could_be(pretend):
    pretend((9, 0), True, False)
    assert select_backend("torch", *CUDA) == "torch"
    assert select_backend("triton", *CUDA) == "triton"
    with pytest.raises(ValueError, match=r"not installed; could be: \['triton', 'torch'\]"):
        select_backend("flash-attn", *CUDA)
    pretend((9, 0), False, False)
    with pytest.raises(ValueError, match=r"triton is not installed, .*could be: \['torch'\]"):
        select_backend("triton", *CUDA)


@pytest.mark.parametrize(
    ("dtype", "block_size", "message"),
    [(FP32, 256, "dtype is torch.float32"), (BF16, 128, "a multiple of 256, got 128")],
)
def test_flash_attn_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block_size: int, message: str
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "flash_attn_with_kvcache", lambda *_, **__: None)
    with pytest.raises(ValueError, match=message):
        select_backend("flash-attn", torch.device("cuda"), dtype, 128, block_size)


# That they agree


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_backends_agree_gpu(head_dim: int, dtype: torch.dtype) -> None:
    pytest.importorskip("flash_attn")
    device = torch.device("cuda")
    assert select_backend("flash-attn", device, dtype, head_dim, 256) == "flash-attn"
    sizes = (256, 16, 8, head_dim)
    for is_prefill, query_lens in ((True, [300, 1, 70, 5, 129]), (False, [1, 1, 1, 1, 1])):
        outs = {}
        for backend, attend in BACKENDS.items():
            batch = decode_batch([300, 1, 326, 5005, 641], sizes, dtype, "cuda")
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
            plan = plan_decode(lens.cpu().numpy(), tables.cpu().numpy(), 256, 33, len(lens))
            context = Context(
                cos_sin=batch.cos_sin,
                is_prefill=is_prefill,
                positions=torch.tensor([p for _, p in rows], device=device).int(),
                slot_mapping=torch.tensor(slots, device=device).int(),
                context_lens=lens,
                block_tables=tables,
                decode_plan=tuple(torch.from_numpy(piece).to(device) for piece in plan),
                cu_seqlens_q=torch.tensor([0, *accumulate(query_lens)], device=device).int(),
                logits_indices=None,
                max_seqlen_q=max(query_lens),
                max_context_len=5005,
            )
            qkv = normal(tokens, 32 * head_dim, dtype=dtype, device="cuda", seed=3)
            norms = (batch.q_weight, batch.k_weight, EPS)
            outs[backend] = attend(qkv, norms, *caches, context, batch.before.scale)
        for backend in ("flash-attn", "triton"):
            assert relative_error(outs[backend], outs["torch"]) < 2 * TOLERANCE[dtype], backend
