"""Mixtures of experts: transformers' tokens, from each form of a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.checkpoints import (
    TRANSFORMERS_5,
    Reference,
    make_checkpoint,
    random_tokens,
    rewritten,
    stacked,
)
from helpers.engines import build, greedy
from helpers.kernel_inputs import interpreted
from nanovllm import SamplingParams
from nanovllm.config import Config
from nanovllm.engine.model_checks import weight_bytes
from nanovllm.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

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
    return make_checkpoint(tmp_path_factory.mktemp("moe") / "model", family="qwen3_moe", seed=2)


@pytest.fixture(scope="module")
def moe_tokens(moe: Path) -> list[list[int]]:
    return expected(moe)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


@pytest.mark.parametrize(
    "options",
    [
        {"norm_topk_prob": True, "mlp_only_layers": [0]},
        {"mlp_only_layers": [0, 1]},
        {"num_experts_per_tok": 1, "norm_topk_prob": True},
        {"num_experts_per_tok": 8, "hidden_act": "gelu"},
        {"num_hidden_layers": 3, "decoder_sparse_step": 3, "attention_bias": True},
    ],
    ids=str,
)
def test_every_option_gives_transformers_tokens(tmp_path: Path, options: dict[str, Any]):
    path = make_checkpoint(tmp_path / "model", family="qwen3_moe", **options)
    assert found(path) == expected(path)


@interpreted
@pytest.mark.parametrize("renormalize", [False, True])
def test_kernels_give_transformers_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renormalize: bool
):
    """Router and experts by kernels in Triton's interpreter: prefill by the grouped products, and
    decode by GEMVs."""
    path = make_checkpoint(tmp_path / "model", family="qwen3_moe", norm_topk_prob=renormalize)
    monkeypatch.setattr("nanovllm.layers.moe.has_kernels", lambda tensor: True)
    with build(path) as llm:
        (tokens,) = greedy(llm, PROMPTS[1:2], SamplingParams(temperature=0, max_tokens=4))
    assert tokens == Reference(path).tokens(PROMPTS[1], 4)


def test_experts_that_tie_are_chosen_as_by_transformers(moe: Path, tmp_path: Path):
    """Each of the router's rows is there twice, and an odd number of experts is taken."""
    tensors = tensors_of(moe)
    for name in [name for name in tensors if name.endswith("mlp.gate.weight")]:
        tensors[name][1::2] = tensors[name][::2]
    path = rewritten(moe, tmp_path / "model", tensors)
    assert found(path) == expected(path)


@pytest.mark.skipif(not TRANSFORMERS_5, reason="transformers 4 knows one form only")
def test_stacks_are_what_transformers_5_writes(moe: Path, tmp_path: Path):
    Reference(moe).model.save_pretrained(tmp_path, save_original_format=False)
    written, ours = tensors_of(tmp_path), stacked(tensors_of(moe))
    assert written.keys() == ours.keys() != tensors_of(moe).keys()
    assert all(torch.equal(ours[name], written[name]) for name in written)


@pytest.mark.parametrize(
    ("is_stacked", "ranks"), [(False, 1), (True, 1), (True, 2)], ids=["apart", "stacked", "ranks"]
)
def test_both_forms_of_a_checkpoint_give_transformers_tokens(
    moe: Path, moe_tokens: list, tmp_path: Path, is_stacked: bool, ranks: int
):
    tensors = tensors_of(moe)
    path = rewritten(moe, tmp_path / "model", stacked(tensors) if is_stacked else tensors)
    assert found(path, tensor_parallel_size=ranks) == moe_tokens


def test_weights_may_be_changed_in_both_forms(moe: Path, moe_tokens: list):
    tensors = tensors_of(moe)
    for weights in (tensors, stacked(tensors)):
        with build(moe, load_format="dummy") as llm:
            assert greedy(llm, PROMPTS, GREEDY) != moe_tokens
            llm.update_weights(weights)
            assert greedy(llm, PROMPTS, GREEDY) == moe_tokens


def test_an_expert_that_is_missing_is_named(moe: Path, tmp_path: Path):
    tensors, name = tensors_of(moe), "model.layers.1.mlp.experts.5.up_proj.weight"
    del tensors[name]
    with pytest.raises(ValueError, match=rf"'{name}' .*0 more.* is missing"):
        build(rewritten(moe, tmp_path / "model", tensors))


def test_an_expert_that_is_in_both_forms_is_named(moe: Path, tmp_path: Path):
    tensors = tensors_of(moe)
    stack = "model.layers.0.mlp.experts.down_proj"
    tensors[stack] = stacked(tensors)[stack]
    match = r"'model\.layers\.0\.mlp\.experts\.\S*down_proj\S*' is both in .*safetensors"
    with pytest.raises(ValueError, match=match):
        build(rewritten(moe, tmp_path / "model", tensors))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.mlp.experts.gate_up_proj", (8, 64, 96)),
        ("model.layers.1.mlp.experts.down_proj", (7, 64, 48)),
        ("model.layers.1.mlp.gate.weight", (7, 64)),
        ("model.layers.0.mlp.experts.gate_proj", (8, 48, 64)),
        ("model.layers.0.mlp.experts.8.up_proj.weight", (48, 64)),
        ("model.layers.0.mlp.gate_proj.weight", (96, 64)),
    ],
)
def test_other_tensors_are_refused_by_name(
    moe: Path, tmp_path: Path, name: str, shape: tuple[int, ...]
):
    tensors = stacked(tensors_of(moe)) | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=name):
        build(rewritten(moe, tmp_path / "model", tensors))


# Without weights


@pytest.mark.parametrize("step", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("dense", [[], [0], [1, 2, 7, -1, 99], [1, 1, 3, 5], list(range(8))])
def test_dense_and_sparse_layers_are_counted(step: int, dense: list[int]):
    config = Qwen3MoeConfig(num_hidden_layers=8, decoder_sparse_step=step, mlp_only_layers=dense)
    kinds = [config.is_sparse(index) for index in range(8)]
    expected = {kinds.index(kind): kinds.count(kind) for kind in set(kinds)}
    assert {kinds[index]: count for index, count in config.layer_kinds().items()} == {
        kinds[index]: count for index, count in expected.items()
    }


@pytest.mark.parametrize("options", [{}, {"mlp_only_layers": [1]}, {"decoder_sparse_step": 3}])
def test_the_bytes_of_the_weights_are_counted(tmp_path: Path, options: dict[str, Any]):
    path = make_checkpoint(tmp_path / "model", family="qwen3_moe", num_hidden_layers=4, **options)
    config = Config(str(path), device="cpu", dtype="float32")
    with torch.device("meta"):
        model = config.model_class(config.model_config)
    assert weight_bytes(config) == 4 * sum(each.numel() for each in model.parameters())


def test_published_configs_are_read():
    """As Qwen3-30B-A3B and 235B-A22B have them."""
    published = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu",
        "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128, "hidden_size": 2048,
        "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
        "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True,
        "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "rope_scaling": None, "sliding_window": None,
        "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
    }  # fmt: skip
    larger = {
        "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536,
        "num_attention_heads": 64, "num_hidden_layers": 94,
    }  # fmt: skip
    for content, billions in ((published, 30.5), (published | larger, 235.1)):
        config = Qwen3MoeConfig.from_json(content)
        with torch.device("meta"):
            model = Qwen3MoeForCausalLM(config)
        total = sum(parameter.numel() for parameter in model.parameters())
        assert round(total / 1e9, 1) == billions
