"""Triton's compiler, the GPU that its kernels are made for, and life without either."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import nanovllm
from helpers.checkpoints import Reference
from helpers.kernel_inputs import interpreted
from helpers.paths import ROOT
from nanovllm.kernels import _triton
from nanovllm.kernels._triton import has_large_shared_memory, has_pdl

pytestmark = pytest.mark.usefixtures("poison")


@interpreted
def test_all_kernels_compile_for_hopper(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "compile_kernels.py")],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == "all compiled"


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


WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Blocker(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] not in {blocked!r}:
            return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Blocker
from nanovllm import LLM, SamplingParams

for name in {blocked!r}:
    assert name not in sys.modules, name
with LLM(sys.argv[1], device="cpu", num_kvcache_blocks=4) as llm:
    params = SamplingParams(temperature=0, max_tokens=12)
    greedy = llm.generate([5, 6, 7], params, use_tqdm=False)[0]
    llm.generate([5, 6, 7], SamplingParams(max_tokens=3), use_tqdm=False)
    assert llm.model_runner.attention_backend == "torch"
    print(*greedy["token_ids"])
"""


@pytest.mark.parametrize("blocked", [("triton", "flash_attn"), ("flash_attn",)], ids=str)
def test_generates_on_a_cpu_without_the_gpu_packages(
    tiny: Path, tiny_reference: Reference, blocked: tuple[str, ...]
):
    root = str(Path(nanovllm.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WITHOUT.format(blocked=blocked)), str(tiny)],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert [int(token) for token in done.stdout.split()] == tiny_reference.tokens([5, 6, 7], 12)
