"""The network: its logits, and the weights that it wants from a checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.checkpoints import Reference, make_checkpoint, random_tokens
from helpers.engines import build
from nanovllm import SamplingParams
from nanovllm.models.qwen3 import Qwen3Config, Qwen3ForCausalLM


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


# Names of the weights


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_the_checkpoint_is_wanted_name_by_name_and_shape_by_shape(
    tmp_path: Path, is_tied: bool, bias: bool
):
    path = make_checkpoint(tmp_path / "model", tie_word_embeddings=is_tied, attention_bias=bias)
    config = Qwen3Config.from_json(json.loads((path / "config.json").read_text()))
    network = Qwen3ForCausalLM(config)
    wanted = {name: view.shape for name, view in network.checkpoint_views().items()}
    assert wanted == {
        name: tensor.shape for name, tensor in load_file(path / "model.safetensors").items()
    }
    assert (network.lm_head.weight is network.model.embed_tokens.weight) == is_tied


def test_what_is_written_to_a_view_is_in_the_network():
    """Each of the views by a number of its own, so that none can be another's."""
    config = Qwen3Config(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=4, attention_bias=True,
    )  # fmt: skip
    network = Qwen3ForCausalLM(config).requires_grad_(False)
    views = network.checkpoint_views()
    for number, view in enumerate(views.values()):
        view.memory.fill_(number)
    counts: dict[float, int] = {}
    for parameter in network.parameters():
        for number, count in zip(*parameter.unique(return_counts=True)):
            counts[number.item()] = counts.get(number.item(), 0) + count.item()
    assert counts == {number: view.memory.numel() for number, view in enumerate(views.values())}
