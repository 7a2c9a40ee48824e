"""Weights in fp8: quantised as they are loaded, or in fp8 already."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.checkpoints import (
    Reference,
    edit_json,
    link_checkpoint,
    make_checkpoint,
    random_tokens,
)
from helpers.engines import GREEDY, assert_empty, build, greedy
from helpers.fp8 import GROUP, check_tokens, quantized_reference, rounded, save_in_blocks
from nanovllm import LLM, SamplingParams
from nanovllm.config import Config
from nanovllm.layers.linear import Linear
from nanovllm.quantization import fp8_weights
from nanovllm.quantization.fp8 import FP8, dequantize, fp8_linear, quantize

PROMPTS = [random_tokens(length, seed=length) for length in (12, 13, 14, 15, 40)]
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {}, "llama": {"attention_bias": True, "mlp_bias": True},
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "roomy": {},
    "preempted": {"num_kvcache_blocks": 7, "max_model_len": 64, "async_scheduling": True},
    "chunked": {"max_num_batched_tokens": 16},
    "alone": {"max_num_seqs": 1},
}


UNCONVERTED = "model.layers.1.mlp.down_proj"


def tokens_of(reference: Reference) -> list[list[int]]:
    return [reference.tokens(prompt, GREEDY.max_tokens) for prompt in PROMPTS]


@pytest.fixture(scope="module", params=FAMILIES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    return make_checkpoint(directory, family=request.param, **FAMILIES[request.param])


@pytest.fixture(scope="module")
def reference(path: Path) -> Reference:
    return quantized_reference(path)


@pytest.fixture(scope="module")
def expected(reference: Reference) -> list[list[int]]:
    return tokens_of(reference)


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A checkpoint in fp8, and what it says. Sizes are no multiples of a block, but for one; the
    scales of a row of blocks are those of parts of several projections."""
    directory = tmp_path_factory.mktemp("blocks")
    plain = make_checkpoint(
        directory / "plain", hidden_size=192, intermediate_size=256, num_attention_heads=8
    )
    save_in_blocks(plain, directory / "fp8", (UNCONVERTED,))
    return directory / "fp8", tokens_of(reference_of_blocks(directory / "fp8"))


def reference_of_blocks(path: Path) -> Reference:
    reference = quantized_reference(path / "widened", GROUP)
    reference.model.get_submodule(UNCONVERTED)._forward_pre_hooks.clear()
    return reference


def test_numbers_are_the_nearest_ones() -> None:
    x = torch.randn(9, 300, generator=torch.Generator().manual_seed(0))
    x[1], x[2], x[3, 7] = 0, 3e38 * x[2].sign(), 1e6
    x[4] *= 1e-20
    x[5, :150] *= 1000
    for group in (None, GROUP):
        values, scale = quantize(x, group)
        assert values.dtype == FP8 and scale.shape == (9, 1 if group is None else 3)
        assert torch.equal(dequantize(values, scale), rounded(x, group))
        assert (scale.log2() % 1 == 0).all()
    assert dequantize(*quantize(x[:0])).shape == (0, 300)


def test_part_of_a_row_is_as_in_the_whole_row() -> None:
    x = torch.rand(4, 64, generator=torch.Generator().manual_seed(0)) + 0.01
    x[:, 32:] *= 50
    halves = [dequantize(*quantize(half)) for half in x.chunk(2, dim=1)]
    assert torch.equal(torch.cat(halves, dim=1), dequantize(*quantize(x)))


@pytest.mark.parametrize("not_finite", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_lost(not_finite: float) -> None:
    x = torch.ones(2, 8)
    x[0, 3] = not_finite
    found = dequantize(*quantize(x))
    assert not found[0].isfinite().all() and torch.equal(found[1], x[1])


@pytest.mark.parametrize("way", WAYS)
def test_greedy_gives_the_tokens_of_rounded_weights_and_activations(
    path: Path, expected: list[list[int]], way: str
) -> None:
    with build(path, quantization="fp8", **WAYS[way]) as llm:
        for _ in range(2):  # the second time from the prefix cache
            assert greedy(llm, PROMPTS) == expected
        if way == "preempted":
            assert llm.scheduler.num_preemptions
        assert_empty(llm)


@pytest.mark.gpu
@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graph"])
def test_a_gpu_says_what_the_reference_says(
    path: Path, reference: Reference, enforce_eager: bool
) -> None:
    options = {"device": "cuda", "dtype": "float32", "enforce_eager": enforce_eager}
    with build(path, quantization="fp8", **options) as llm:
        check_tokens(llm, reference, PROMPTS)


@pytest.mark.gpu
def test_a_gpu_says_what_the_reference_of_blocks_says(
    blocks: tuple[Path, list[list[int]]],
) -> None:
    with build(blocks[0], device="cuda", dtype="float32") as llm:
        check_tokens(llm, reference_of_blocks(blocks[0]), PROMPTS)


def test_sums_of_few_digits_are_noticed(
    monkeypatch: pytest.MonkeyPatch, path: Path, reference: Reference
) -> None:
    """Those of tensor cores in fp8 are off by 2^-11."""

    def imprecise(*factors: Any) -> torch.Tensor:
        y = fp8_linear(*factors)
        return y * (1 + 2.0**-11 * torch.randn(y.shape, generator=generator))

    generator = torch.Generator().manual_seed(0)
    with build(path, quantization="fp8") as llm:
        check_tokens(llm, reference, PROMPTS)
        monkeypatch.setattr("nanovllm.layers.linear.fp8_linear", imprecise)
        llm.reset_prefix_cache()
        with pytest.raises(AssertionError):
            check_tokens(llm, reference, PROMPTS)


def test_several_completions_begin_alike(path: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, n=3)
    with build(path, quantization="fp8") as llm:
        [output] = llm.generate([PROMPTS[0]], params, use_tqdm=False)
        [alone] = greedy(llm, PROMPTS[:1], SamplingParams(temperature=0, max_tokens=6))
    assert [completion["token_ids"] for completion in output["outputs"]] == [alone] * 3


def test_two_ranks_give_the_tokens_of_one(path: Path, expected: list[list[int]]) -> None:
    if "qwen3" in (path / "config.json").read_text(encoding="utf-8"):
        pytest.skip("once is enough: here with biases")
    with build(path, quantization="fp8", tensor_parallel_size=2) as llm:
        assert greedy(llm, PROMPTS) == expected


def test_bf16_is_close_to_float32(path: Path) -> None:
    """The weights are not packed for the CPU, and products are rounded once."""
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=0)
    found = []
    for dtype in ("float32", "bfloat16"):
        with build(path, quantization="fp8", kv_cache_dtype="fp8", dtype=dtype) as llm:
            outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        found.append([output["outputs"][0]["cumulative_logprob"] for output in outputs])
    assert found[1] == pytest.approx(found[0], abs=0.5)


def test_weights_that_change_are_quantized(
    monkeypatch: pytest.MonkeyPatch, path: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(fp8_weights, "_PIECE", 1000)  # some rows at once
    family = "qwen3" if "qwen3" in (path / "config.json").read_text() else "llama"
    other = make_checkpoint(tmp_path, family=family, seed=5, **FAMILIES[family])
    expected = tokens_of(quantized_reference(other))
    with build(path, quantization="fp8") as llm:
        llm.update_weights(load_file(other / "model.safetensors"))
        assert greedy(llm, PROMPTS) == expected
        llm.load_weights(path)
        assert greedy(llm, PROMPTS) != expected


def test_layers_are_in_fp8_and_the_ends_are_not(tiny: Path) -> None:
    with build(tiny, quantization="fp8", load_format="dummy", dtype="bfloat16") as llm:
        model = llm.model_runner.model
        for name, module in model.named_modules():
            if isinstance(module, Linear):
                in_fp8 = module.weight.dtype == FP8
                assert in_fp8 == name.startswith("model.layers")
                if in_fp8:
                    sizes = module.dequantized_weight().std().item()
                    assert sizes == pytest.approx(0.15, rel=0.1)  # the checkpoint's
        assert model.model.embed_tokens.weight.dtype == torch.bfloat16
        greedy(llm, PROMPTS)


# With two ranks the second one's rows begin in the middle of a block.
@pytest.mark.parametrize("options", [{}, {"quantization": "fp8"}, {"tensor_parallel_size": 2}])
def test_checkpoint_in_blocks_is_loaded_as_it_is(
    blocks: tuple[Path, list[list[int]]], options: dict[str, Any]
) -> None:
    path, expected = blocks
    with build(path, **options) as llm:
        assert greedy(llm, PROMPTS) == expected
        if not options:
            with pytest.raises(ValueError, match="whose checkpoint is in fp8"):
                llm.update_weights({})
            llm.load_weights(path)
            assert greedy(llm, PROMPTS) == expected
        assert_empty(llm)


def test_random_weights_in_the_shape_of_a_checkpoint_in_blocks(
    blocks: tuple[Path, list[list[int]]],
) -> None:
    with build(blocks[0], load_format="dummy") as llm:
        linear = llm.model_runner.model.model.layers[0].self_attn.qkv_proj
        assert linear.weight.dtype == FP8 and linear.weight_scale.shape == (8 * 32 + 128, 2)
        assert linear.dequantized_weight().std().item() == pytest.approx(0.15, rel=0.1)
        greedy(llm, PROMPTS)
        llm.load_weights(blocks[0])
        assert greedy(llm, PROMPTS) == blocks[1]


def config_with(source: Path, target: Path, quantization_config: Any) -> Path:
    directory = link_checkpoint(source, target)
    edit_json(directory / "config.json", quantization_config=quantization_config)
    return directory


FP8_CONFIG = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"quant_method": "awq", "bits": 4}, "quant_method='awq', which is not served: give the"),
        ({"quant_method": "gptq"}, "'gptq'"),
        ({"load_in_4bit": True}, "'load_in_4bit'"),
        ({"quant_method": "mxfp4"}, "'mxfp4'.*blocks of 128 x 128"),
        ({"quant_method": "compressed-tensors"}, "quantization='fp8' if it should be small"),
        ({"quant_method": "fp8"}, "weight_block_size=None"),
        (FP8_CONFIG | {"weight_block_size": [64, 128]}, "weight_block_size=.64, 128."),
        (FP8_CONFIG | {"activation_scheme": "static"}, "activation_scheme='static'"),
        (FP8_CONFIG | {"fmt": "e5m2"}, "fmt='e5m2'"),
        (FP8_CONFIG | {"modules_to_not_convert": "lm_head"}, "must list names"),
        ("fp8", "quantization_config='fp8'"),
    ],
)
def test_other_formats_are_refused_by_name(
    tiny: Path, tmp_path: Path, given: Any, message: str
) -> None:
    directory = config_with(tiny, tmp_path / "model", given)
    with pytest.raises(ValueError, match=message):
        build(directory, load_format="dummy")


def test_part_of_a_merged_projection_is_refused(tiny: Path, tmp_path: Path) -> None:
    names = ["model.layers.0.self_attn.k_proj"]
    given = FP8_CONFIG | {"modules_to_not_convert": names}
    directory = config_with(tiny, tmp_path / "model", given)
    with pytest.raises(ValueError, match=r"computed as one matrix.*k_proj': False"):
        build(directory, load_format="dummy")


def test_weights_in_another_dtype_than_config_json_says(tiny: Path, tmp_path: Path) -> None:
    directory = config_with(tiny, tmp_path / "model", FP8_CONFIG)
    with pytest.raises(ValueError, match=r"has dtype F32; supported are .'F8_E4M3'., as config"):
        build(directory)


def test_weights_in_fp8_of_which_config_json_says_nothing(
    blocks: tuple[Path, list[list[int]]],
) -> None:
    with pytest.raises(ValueError, match=r"dtype F8_E4M3; .* has no quantization_config that"):
        build(blocks[0], hf_overrides={"quantization_config": None})


def test_other_quantizations_are_refused(tiny: Path) -> None:
    with pytest.raises(ValueError, match="quantization='awq' is not served: give the bf16"):
        build(tiny, quantization="awq")


def test_gpus_that_cannot_are_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    with pytest.raises(ValueError, match=r"capability 8.9 .Ada. or later, and 'cuda:0' has 8.6"):
        Config(str(tiny), device="cuda", quantization="fp8")


def test_memory_is_counted_as_it_is_taken(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanovllm.engine.model_checks.available_memory", lambda _: 200_000)
    with pytest.raises(RuntimeError, match="no memory for the weights"):
        LLM(tiny, load_format="dummy", dtype="float32", device="cpu", num_kvcache_blocks=8)
    with build(tiny, load_format="dummy", dtype="float32", quantization="fp8"):
        pass
