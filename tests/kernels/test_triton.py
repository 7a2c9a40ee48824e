"""What the kernels ask of the GPU they run on."""

from types import SimpleNamespace

import pytest
import torch

from nanovllm.kernels import _triton
from nanovllm.kernels._triton import has_large_shared_memory, has_pdl

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize(
    ("capability", "kibibytes", "is_large"),
    [((8, 0), 164, False), ((9, 0), 228, True), ((10, 0), 228, True), ((12, 0), 100, False)],
)
def test_tiles_for_hopper_go_to_no_smaller_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], kibibytes: int, is_large: bool
) -> None:
    properties = SimpleNamespace(shared_memory_per_multiprocessor=kibibytes * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    tensor = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), get_device=lambda: 0)
    has_pdl.cache_clear()
    try:
        assert has_large_shared_memory(tensor) == is_large
        has_pdl.cache_clear()
        monkeypatch.setattr(_triton, "HAS_TRITON", False)
        assert not has_large_shared_memory(tensor)
    finally:
        has_pdl.cache_clear()
    assert not has_large_shared_memory(torch.zeros(1))
