"""What the kernels ask of the GPU they run on."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import triton

import nanovllm
from helpers.cases import slow
from helpers.checkpoints import Reference
from nanovllm.kernels.launch import Gpu, cdiv, gpu_with, next_power_of_2, pdl

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize(
    ("capability", "kibibytes", "has_pdl", "is_hopper_class"),
    [
        ((8, 0), 164, False, False), ((9, 0), 228, True, True), ((10, 0), 228, True, True),
        ((12, 0), 100, True, False),
    ],
)  # fmt: skip
def test_tiles_for_hopper_go_to_no_smaller_gpu(
    capability: tuple[int, int], kibibytes: int, has_pdl: bool, is_hopper_class: bool
) -> None:
    gpu = Gpu(capability, (kibibytes - 1) * 1024, kibibytes * 1024, num_sms=100)
    assert (gpu.has_pdl, gpu.is_hopper_class) == (has_pdl, is_hopper_class)


def test_the_interpreter_has_no_gpu_and_no_dependent_launch() -> None:
    assert gpu_with(torch.zeros(1)) is None
    assert pdl(torch.zeros(1)) == {"PDL": False, "launch_pdl": False}


def test_sizes_are_rounded_as_triton_rounds_them() -> None:
    for n in (*range(1, 130), 4095, 4096, 4097, 151936):
        assert next_power_of_2(n) == triton.next_power_of_2(n)
        assert cdiv(n, 64) == triton.cdiv(n, 64)


@pytest.mark.gpu
def test_what_a_gpu_says_of_itself_gpu() -> None:
    gpu = gpu_with(torch.zeros(1, device="cuda"))
    assert gpu.capability == torch.cuda.get_device_capability()
    assert 48 * 1024 <= gpu.shared_memory < gpu.shared_memory_of_sm
    assert gpu.num_sms > 0


WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Blocker(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if not any(name == one or name.startswith(one + ".") for one in {blocked!r}):
            return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Blocker
from nanovllm import LLM, SamplingParams

for name in {blocked!r}:
    assert name not in sys.modules, name
with LLM(sys.argv[1], device="cpu", num_kvcache_blocks=4) as llm:
    params = SamplingParams(temperature=0, max_tokens=12)
    greedy = llm.generate([5, 6, 7], params, use_tqdm=False)[0]
    llm.generate([5, 6, 7], SamplingParams(max_tokens=3), use_tqdm=False)
    if "numba" in {blocked!r}:
        assert llm.model_runner.attention_backend == "torch"
    print(*greedy["token_ids"])
"""


@pytest.mark.parametrize(
    "blocked",
    [("triton", "flash_attn", "numba"), slow(("flash_attn", "numba")), ("nanovllm.kernels",)],
    ids=str,
)
def test_generates_on_a_cpu_without_optional_packages(
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
