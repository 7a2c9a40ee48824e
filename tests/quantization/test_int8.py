"""Weights in int8, on a CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.checkpoints import Reference, make_checkpoint, random_tokens
from helpers.engines import GREEDY, assert_empty, build, greedy
from helpers.fp8 import save_in_blocks
from nanovllm.quantization import int8
from nanovllm.quantization.int8 import Int8Weight

pytestmark = pytest.mark.skipif(not int8._has_vnni(), reason="this CPU has no VNNI instructions")
PROMPTS = [random_tokens(length, seed=length) for length in (12, 13, 14, 15, 40)]
WAYS: dict[str, dict[str, Any]] = {
    "roomy": {},
    "preempted": {"num_kvcache_blocks": 7, "max_model_len": 64, "async_scheduling": True},
    "chunked": {"max_num_batched_tokens": 16},
    "alone": {"max_num_seqs": 1},
}


def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row as integers from -127 to 127, and by what they are multiplied."""
    largest = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)
    scale = largest / 127
    return (x / scale).round(), scale


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    (x, x_scale), (weight, scale) = rounded(x.float()), rounded(weight.float())
    return (x.double() @ weight.double().T) * x_scale.double() * scale.double().T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 40, 96), (5, 33, 300), (70, 16, 1024)])
def test_products_are_those_of_integers(rows: int, n: int, k: int, dtype: torch.dtype):
    torch.manual_seed(k)
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((rows, k), (n, k), (n,)))
    x[0, 3], x[-1] = 1e4, 0
    weight[1], weight[2, 0] = 0, -1e3
    packed = Int8Weight(weight)
    out = packed.multiply(x, bias)
    assert out.dtype == dtype
    exact = product(x, weight) + bias.double()
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance * 1e-2)
    for row in range(rows):
        assert torch.equal(packed.multiply(x[row : row + 1], bias)[0], out[row])


def test_what_is_not_finite_stays_so():
    x, packed = torch.ones(3, 64), Int8Weight(torch.randn(8, 64))
    x[0, 5], x[1, 6] = float("nan"), float("inf")
    out = packed.multiply(x)
    assert not out[:2].isfinite().any() and out[2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_weight_that_is_unpacked_is_packed_as_it_was(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(int8, "_PIECE", 1000)  # some rows at once
    weight = torch.randn(400, 96) * torch.logspace(-9, 3, 400)[:, None]
    packed = Int8Weight(weight.to(dtype))
    again, x = Int8Weight(packed.unpack()), torch.randn(3, 96)
    assert packed.unpack().dtype == dtype
    assert torch.equal(packed.multiply(x), again.multiply(x))
    assert torch.equal(packed.unpack(), again.unpack())


class Largest(TorchDispatchMode):
    """The most elements of a tensor in float32 that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.elements = max(self.elements, result.numel())
        return result


def test_no_weight_is_in_float32_as_a_whole(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(int8, "_PIECE", 1000)
    with Largest() as largest:
        Int8Weight(torch.ones(400, 96, dtype=torch.bfloat16)).unpack()
    assert 0 < largest.elements <= 1000


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), tie_word_embeddings=request.param)


@pytest.fixture(scope="module")
def expected(path: Path) -> list[list[int]]:
    """Of transformers' model, whose linear layers round weights and inputs."""
    reference = Reference(path)
    for module in reference.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(torch.mul(*rounded(module.weight.data)))
            module.register_forward_pre_hook(lambda _, args: (torch.mul(*rounded(args[0])),))
    return [reference.tokens(prompt, GREEDY.max_tokens) for prompt in PROMPTS]


@pytest.mark.parametrize("way", WAYS)
def test_greedy_gives_the_tokens_of_a_model_that_rounds(path: Path, expected: list, way: str):
    with build(path, quantization="int8", **WAYS[way]) as llm:
        assert greedy(llm, PROMPTS) == expected
        assert greedy(llm, PROMPTS) == expected
        assert_empty(llm)


def test_weights_are_replaced_in_part_and_all(path: Path, expected: list, tmp_path: Path):
    weights = load_file(path / "model.safetensors")
    other = make_checkpoint(tmp_path / "other", seed=5)
    with build(path, quantization="int8") as llm:
        name = "model.layers.0.mlp.up_proj.weight"
        llm.update_weights({name: weights[name] * 2})
        assert greedy(llm, PROMPTS) != expected
        llm.update_weights({name: weights[name]})
        assert greedy(llm, PROMPTS) == expected
        if "lm_head.weight" in weights:
            llm.load_weights(other)
            assert greedy(llm, PROMPTS) != expected


def test_weights_that_are_loaded_later_are_rounded_to_the_models_dtype_first(path: Path):
    name = "model.layers.0.mlp.down_proj.weight"
    with build(path, quantization="int8", dtype="bfloat16") as llm:
        linear = llm.model_runner.model.get_submodule(name.removesuffix(".weight"))
        x = torch.randn(2, linear.in_features)
        before = linear.multiply(x)
        llm.update_weights({name: load_file(path / "model.safetensors")[name]})
        assert torch.equal(linear.multiply(x), before)


def test_two_ranks_round_their_parts(tiny: Path):
    """Each rank has scales of its own for its part of an input or a row."""
    with build(tiny, quantization="int8", tensor_parallel_size=2) as llm:
        assert [len(tokens) for tokens in greedy(llm, PROMPTS)] == [GREEDY.max_tokens] * len(
            PROMPTS
        )


def test_where_it_is_not_served_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sparse = make_checkpoint(tmp_path / "sparse", family="qwen3_moe")
    with pytest.raises(ValueError, match="does not serve mixtures of experts"):
        build(sparse, quantization="int8")
    dense = make_checkpoint(tmp_path / "dense")
    save_in_blocks(dense, tmp_path / "fp8")
    with pytest.raises(ValueError, match=r"layers\.0\..* is in fp8 in the checkpoint already"):
        build(tmp_path / "fp8", quantization="int8")
    with pytest.raises(ValueError, match="is for CPUs, and device is 'cuda:0': there, give 'fp8'"):
        int8.check_int8(torch.nn.Module(), torch.device("cuda:0"))
    monkeypatch.setattr(int8, "_has_vnni", lambda: False)
    with pytest.raises(ValueError, match="needs an x86 CPU with VNNI"):
        build(dense, quantization="int8")
