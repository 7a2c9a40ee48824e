"""Mixtures of experts with a shared one: transformers' tokens, from each form of a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.checkpoints import TRANSFORMERS_5, Reference, make_checkpoint, random_tokens
from helpers.engines import build, greedy
from helpers.kernel_inputs import interpreted
from nanovllm import SamplingParams
from nanovllm.config import Config
from nanovllm.engine.model_checks import weight_bytes
from nanovllm.models.qwen2_moe import Qwen2MoeConfig, Qwen2MoeForCausalLM

PROMPTS = [random_tokens(length, seed=length) for length in (1, 17, 40)]
GREEDY = SamplingParams(temperature=0, max_tokens=12)


def expected(path: Path) -> list[list[int]]:
    reference = Reference(path)
    return [reference.tokens(prompt, GREEDY.max_tokens) for prompt in PROMPTS]


def found(path: Path, **options: Any) -> list[list[int]]:
    with build(path, **options) as llm:
        return greedy(llm, PROMPTS, GREEDY)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("moe") / "model", family="qwen2_moe")


@pytest.fixture(scope="module")
def moe_tokens(moe: Path) -> list[list[int]]:
    return expected(moe)


@pytest.mark.parametrize(
    "options",
    [
        {"norm_topk_prob": True, "qkv_bias": False},
        {"num_experts_per_tok": 6, "hidden_act": "gelu"},
        {"num_hidden_layers": 3, "decoder_sparse_step": 2, "tie_word_embeddings": True},
    ],
    ids=str,
)
def test_every_option_gives_transformers_tokens(tmp_path: Path, options: dict[str, Any]):
    path = make_checkpoint(tmp_path / "model", family="qwen2_moe", **options)
    assert found(path) == expected(path)


def test_two_ranks_give_the_tokens_of_one(moe: Path, moe_tokens: list):
    assert found(moe, tensor_parallel_size=2) == moe_tokens


@pytest.mark.skipif(not TRANSFORMERS_5, reason="transformers 4 knows one form only")
def test_stacked_experts_give_transformers_tokens(moe: Path, moe_tokens: list, tmp_path: Path):
    Reference(moe).model.save_pretrained(tmp_path, save_original_format=False)
    written = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.mlp.experts.gate_up_proj" in written
    with build(moe, load_format="dummy") as llm:
        llm.load_weights(tmp_path)
        assert greedy(llm, PROMPTS, GREEDY) == moe_tokens


@interpreted
def test_kernels_give_transformers_tokens(moe: Path, monkeypatch: pytest.MonkeyPatch):
    """Router and experts by kernels in Triton's interpreter, the shared expert in torch."""
    monkeypatch.setattr("nanovllm.layers.moe.has_kernels", lambda tensor: True)
    with build(moe) as llm:
        (tokens,) = greedy(llm, PROMPTS[:1], SamplingParams(temperature=0, max_tokens=3))
    assert tokens == Reference(moe).tokens(PROMPTS[0], 3)


def test_the_bytes_of_the_weights_are_counted(tmp_path: Path):
    path = make_checkpoint(tmp_path / "model", family="qwen2_moe", mlp_only_layers=[1])
    config = Config(str(path), device="cpu", dtype="float32")
    with torch.device("meta"):
        model = config.model_class(config.model_config)
    assert weight_bytes(config) == 4 * sum(each.numel() for each in model.parameters())


def test_published_configs_are_read():
    """As Qwen1.5-MoE-A2.7B and Qwen2-57B-A14B have them."""
    published = {
        "architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0,
        "decoder_sparse_step": 1, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21,
        "model_type": "qwen2_moe", "moe_intermediate_size": 1408, "norm_topk_prob": False,
        "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4,
        "num_hidden_layers": 24, "num_key_value_heads": 16, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "shared_expert_intermediate_size": 5632,
        "sliding_window": 32768, "tie_word_embeddings": False, "use_sliding_window": False,
        "vocab_size": 151936,
    }  # fmt: skip
    larger = {
        "hidden_size": 3584, "intermediate_size": 18944, "moe_intermediate_size": 2560,
        "num_attention_heads": 28, "num_experts": 64, "num_experts_per_tok": 8,
        "num_hidden_layers": 28, "num_key_value_heads": 4,
        "shared_expert_intermediate_size": 20480,
    }  # fmt: skip
    for content, billions in ((published, 14.3), (published | larger, 57.4)):
        config = Qwen2MoeConfig.from_json(content)
        with torch.device("meta"):
            model = Qwen2MoeForCausalLM(config)
        total = sum(parameter.numel() for parameter in model.parameters())
        assert round(total / 1e9, 1) == billions


@pytest.mark.parametrize("size", [0, -1, None, 2.5])
def test_a_shared_expert_of_no_size_is_refused(size: object):
    with pytest.raises(ValueError, match=f"shared_expert_intermediate_size={size}"):
        Qwen2MoeConfig.from_json({"shared_expert_intermediate_size": size})
