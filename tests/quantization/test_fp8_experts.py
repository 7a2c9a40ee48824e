"""Mixtures of experts with weights in fp8: quantised as they are loaded, or in fp8 already."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.checkpoints import (
    Reference,
    edit_json,
    make_checkpoint,
    random_tokens,
    rewritten,
    stacked,
)
from helpers.engines import GREEDY, assert_empty, build, greedy
from helpers.fp8 import GROUP, check_tokens, quantized_reference, save_in_blocks
from nanovllm.config import Config
from nanovllm.engine.model_checks import weight_bytes
from nanovllm.models import find_model_class
from nanovllm.parallel.sharding import check_shardable
from nanovllm.quantization.fp8 import FP8

PROMPTS = [random_tokens(length, seed=length) for length in (1, 17, 40)]
# Sizes are no multiples of a block, but for the inner one that two ranks share.
IN_BLOCKS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "hidden_size": 192, "moe_intermediate_size": 256, "num_experts": 4,
        "num_attention_heads": 8,
    },
    "qwen2_moe": {
        "hidden_size": 192, "moe_intermediate_size": 160, "num_experts": 4,
        "num_attention_heads": 6,
    },
}  # fmt: skip
Found = tuple[Path, list[list[int]]]


def tokens_of(reference: Reference) -> list[list[int]]:
    return [reference.tokens(prompt, GREEDY.max_tokens) for prompt in PROMPTS]


@pytest.fixture(scope="module", params=["qwen3_moe", "qwen2_moe"])
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """A checkpoint in float32, and what it says if weights and activations are rounded."""
    path = make_checkpoint(tmp_path_factory.mktemp("moe"), family=request.param)
    return path, tokens_of(quantized_reference(path))


@pytest.fixture(scope="module", params=IN_BLOCKS)
def blocks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """A checkpoint in fp8, a tensor an expert, and what it says."""
    return make_blocks(tmp_path_factory.mktemp("blocks"), request.param)


def make_blocks(directory: Path, family: str) -> Found:
    source = make_checkpoint(directory / "plain", family=family, **IN_BLOCKS[family])
    save_in_blocks(source, directory / "fp8")
    return directory / "fp8", tokens_of(reference_of_blocks(directory / "fp8"))


def reference_of_blocks(path: Path) -> Reference:
    return quantized_reference(path / "widened", GROUP)


@pytest.mark.parametrize("way", [{}, {"max_num_seqs": 1}, {"max_num_batched_tokens": 16}], ids=str)
def test_greedy_gives_the_tokens_of_rounded_weights_and_activations(
    plain: Found, way: dict[str, Any]
) -> None:
    path, expected = plain
    with build(path, quantization="fp8", **way) as llm:
        assert greedy(llm, PROMPTS) == expected
        assert_empty(llm)


@pytest.mark.gpu
@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graph"])
def test_a_gpu_says_what_the_reference_says(plain: Found, enforce_eager: bool) -> None:
    options = {"device": "cuda", "dtype": "float32", "enforce_eager": enforce_eager}
    with build(plain[0], quantization="fp8", **options) as llm:
        check_tokens(llm, quantized_reference(plain[0]), PROMPTS)


@pytest.mark.gpu
def test_a_gpu_says_what_the_reference_of_blocks_says(blocks: Found) -> None:
    with build(blocks[0], device="cuda", dtype="float32") as llm:
        check_tokens(llm, reference_of_blocks(blocks[0]), PROMPTS)


def test_stacks_are_quantized_as_single_experts_are(plain: Found) -> None:
    """And routers, which are not, are there too."""
    path, expected = plain
    with build(path, quantization="fp8", load_format="dummy") as llm:
        assert greedy(llm, PROMPTS) != expected
        llm.update_weights(stacked(load_file(path / "model.safetensors")))
        assert greedy(llm, PROMPTS) == expected


def test_checkpoint_in_blocks_is_loaded_as_it_is(blocks: Found) -> None:
    path, expected = blocks
    with build(path) as llm:
        assert greedy(llm, PROMPTS) == expected


def test_checkpoint_in_stacked_blocks_is_loaded_by_two_ranks(tmp_path: Path) -> None:
    path, expected = make_blocks(tmp_path, "qwen3_moe")
    tensors = stacked(load_file(path / "model.safetensors"))
    assert tensors["model.layers.1.mlp.experts.gate_up_proj_scale_inv"].shape == (4, 4, 2)
    with build(rewritten(path, tmp_path / "stacked", tensors), tensor_parallel_size=2) as llm:
        assert greedy(llm, PROMPTS) == expected


def test_stacked_blocks_of_gate_and_up_at_once_are_refused(blocks: Found, tmp_path: Path) -> None:
    path, _ = blocks
    if "qwen3_moe" in (path / "config.json").read_text(encoding="utf-8"):
        pytest.skip("its blocks end where gate does")
    tensors = stacked(load_file(path / "model.safetensors"))
    with pytest.raises(ValueError, match=r"unexpected tensor .*experts\.gate_up_proj_scale_inv"):
        build(rewritten(path, tmp_path / "stacked", tensors))


def test_some_experts_in_fp8_are_refused(blocks: Found, tmp_path: Path) -> None:
    path, _ = blocks
    names = ["mlp.gate", "layers.1.mlp.experts.3.up_proj"]
    given = {"quant_method": "fp8", "weight_block_size": [GROUP, GROUP]}
    directory = rewritten(path, tmp_path / "model", {})
    edit_json(
        directory / "config.json", quantization_config=given | {"modules_to_not_convert": names}
    )
    with pytest.raises(ValueError, match=r"computed as one matrix.*experts.3.up_proj': False"):
        build(directory, load_format="dummy")


def test_blocks_of_experts_are_not_cut(blocks: Found) -> None:
    content = json.loads((blocks[0] / "config.json").read_text())
    sizes = {"num_attention_heads": 8, "head_dim": 128, "intermediate_size": 512}
    sizes |= {"moe_intermediate_size": 384, "shared_expert_intermediate_size": 512}
    config = find_model_class(content).config_class.from_json(content | sizes)
    with pytest.raises(ValueError, match=r"experts.0.down_proj has blocks of 128 .* 192 inputs"):
        check_shardable(config, 2)


def check_dtypes(path: Path, **options: Any) -> None:
    with build(path, load_format="dummy", dtype="float32", **options) as llm:
        model = llm.model_runner.model
        for layer in model.model.layers:
            assert {gate.weight.dtype for gate in layer.mlp.gates()} == {torch.float32}
            assert layer.mlp.experts.gate_up_proj.dtype == FP8
            assert layer.mlp.experts.down.at(3).dequantized().std() == pytest.approx(0.15, rel=0.1)
            if layer.mlp.shared_expert is not None:
                assert layer.mlp.shared_expert.down_proj.weight.dtype == FP8
        num_bytes = sum(each.nbytes for each in model.parameters())
        greedy(llm, PROMPTS)
    assert weight_bytes(Config(str(path), device="cpu", dtype="float32", **options)) == num_bytes


def test_experts_are_in_fp8_and_their_routers_are_not(plain: Found) -> None:
    check_dtypes(plain[0], quantization="fp8")


def test_so_they_are_in_the_shape_of_a_checkpoint_in_blocks(blocks: Found) -> None:
    check_dtypes(blocks[0])
