"""The network's logits."""

from pathlib import Path

import pytest
import torch

from helpers.checkpoints import Reference, random_tokens
from helpers.engines import build
from nanovllm import SamplingParams


def check_first_logits(path: Path, reference: Reference, device: str, length: int) -> None:
    """Of a lone prompt in bf16: each kind of matrix product has its range of lengths."""
    prompt, seen = random_tokens(length, seed=length), []
    with build(path, device=device, dtype="bfloat16") as llm:
        compute_logits = llm.model_runner.model.compute_logits

        def spy(stream, out=None):
            seen.append(compute_logits(stream, out))
            return seen[-1]

        llm.model_runner.model.compute_logits = spy
        llm.generate(prompt, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        (logits,) = (logits.float().cpu() for logits in seen)
    with torch.inference_mode():
        expected = reference.model(torch.tensor([prompt])).logits[:, -1]
    assert ((logits - expected).norm() / expected.norm()).item() < 0.05


@pytest.mark.parametrize("length", [1, 5, 129])
def test_first_logits_in_bfloat16(tiny: Path, tiny_reference: Reference, length: int):
    check_first_logits(tiny, tiny_reference, "cpu", length)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 2, 4, 5, 33, 64, 65, 128, 129, 300])
def test_first_logits_in_bfloat16_gpu(tiny: Path, tiny_reference: Reference, length: int):
    check_first_logits(tiny, tiny_reference, "cuda", length)
