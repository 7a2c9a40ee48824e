"""A real checkpoint of random weights, and how long a fresh process takes to be ready with it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from bench import write_shape

ROOT = Path(__file__).parent.parent
STAGES = ("import torch", "import nanovllm", "LLM(...)", "first request")
SCRIPT = """
import json, sys, time
times = [time.perf_counter()]
import torch
times.append(time.perf_counter())
from nanovllm import LLM, SamplingParams
times.append(time.perf_counter())
llm = LLM(sys.argv[1], **json.loads(sys.argv[2]))
times.append(time.perf_counter())
llm.generate([[1] * 128], SamplingParams(max_tokens=16, ignore_eos=True), use_tqdm=False)
times.append(time.perf_counter())
print(json.dumps([end - start for start, end in zip(times, times[1:])]))
"""


def seconds_to_ready(model: Path, options: dict[str, Any], caches: str) -> list[float]:
    """Seconds of each of `STAGES` in a process of its own.

    `caches` is the directory of Triton's cache, and of Python's bytecode, whatever the environment
    says: without that cache every import compiles its modules anew.
    """
    environment = {
        "TRITON_CACHE_DIR": f"{caches}/triton", "PYTHONPYCACHEPREFIX": f"{caches}/bytecode",
        "PYTHONDONTWRITEBYTECODE": "",
    }  # fmt: skip
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(model), json.dumps(options)], cwd=ROOT,
        env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(process.stdout.splitlines()[-1])


def write_checkpoint(path: Path, shape: str, changes: dict[str, Any], device: torch.device) -> None:
    """bf16 weights in a shape (see `bench.write_shape`), in one file, with the demo's tokenizer."""
    path.mkdir()
    write_shape(shape, str(path), changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    tensors = {}
    for name, parameter in model.named_parameters():  # a tied head is not among them
        noise = torch.randn(parameter.shape, dtype=torch.bfloat16, device=device)
        tensors[name] = (noise.mul_(0.02) if parameter.dim() > 1 else noise.fill_(1)).cpu()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    for file in (ROOT / "demo" / "tiny-qwen3").glob("tokenizer*"):
        shutil.copy(file, path)
