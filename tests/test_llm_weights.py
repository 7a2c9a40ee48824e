"""New weights for an engine that runs: those of a model in training, or of another checkpoint."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.checkpoints import Reference, make_checkpoint
from helpers.engines import GREEDY, PROMPTS, build, greedy
from nanovllm import LLM

NAME = "model.layers.1.self_attn.k_proj.weight"
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def make_two(folder: Path, tied: bool) -> list[Path]:
    return [
        make_checkpoint(folder / str(seed), seed=seed, tie_word_embeddings=tied) for seed in (0, 1)
    ]


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


@DTYPES
@TIED
@pytest.mark.parametrize("way", ["update", "load"])
def test_all_weights_are_exchanged(tmp_path: Path, way: str, tied: bool, dtype: str):
    """Nothing of the old ones is left: not packed, and not in the prefix cache."""
    old, new = make_two(tmp_path, tied)
    with build(new, dtype=dtype) as llm:
        expected = greedy(llm, PROMPTS)
    with build(old, dtype=dtype) as llm:
        assert greedy(llm, PROMPTS) != expected
        places = {name: one.data_ptr() for name, one in llm.model_runner.model.named_parameters()}
        if way == "update":
            llm.update_weights(iter(tensors_of(new).items()))
        else:
            llm.load_weights(new)
        assert greedy(llm, PROMPTS) == expected
        if dtype == "float32":
            parameters = llm.model_runner.model.named_parameters()
            assert places == {name: one.data_ptr() for name, one in parameters}


@DTYPES
@TIED
def test_some_weights_are_exchanged(tmp_path: Path, tied: bool, dtype: str):
    """Of a packed projection one part; of tied ends both; in another dtype, with a gradient."""
    old, new = make_two(tmp_path, tied)
    names = (NAME, "model.embed_tokens.weight", "model.norm.weight")
    some = {name: tensors_of(new)[name].double().requires_grad_() for name in names}
    both = make_checkpoint(tmp_path / "both", tie_word_embeddings=tied)
    mixed = tensors_of(old) | {name: tensor.detach().float() for name, tensor in some.items()}
    save_file(mixed, both / "model.safetensors", metadata={"format": "pt"})
    with build(both, dtype=dtype) as llm:
        expected = greedy(llm, PROMPTS)
    with build(old, dtype=dtype) as llm:
        llm.update_weights(some)
        assert greedy(llm, PROMPTS) == expected


def test_a_tied_head_may_come_too(tmp_path: Path):
    old, new = make_two(tmp_path, tied=True)
    tensors = tensors_of(new)
    with build(old) as llm:
        llm.update_weights(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
        assert greedy(llm, PROMPTS[:1]) == [Reference(new).tokens(PROMPTS[0], 12)]


@pytest.mark.parametrize(
    ("name", "tensor", "error", "message"),
    [
        ("model.layers.7.mlp.up_proj.weight", torch.ones(96, 64), ValueError, "unexpected tensor"),
        (NAME, torch.ones(3, 64), ValueError, r"has shape \[3, 64\], .* asks for \[64, 64\]"),
        (NAME, torch.ones(64, 64, dtype=torch.int8), ValueError, "has torch.int8; supported are"),
        (NAME, [[1.0]], TypeError, "must be a tensor, got list"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_by_name(
    llm: LLM, tiny_reference: Reference, name: str, tensor: object, error: type, message: str
):
    with pytest.raises(error, match=message) as caught:
        llm.update_weights([(name, tensor)])
    assert name in str(caught.value)
    assert greedy(llm, PROMPTS[:1]) == [tiny_reference.tokens(PROMPTS[0], 12)]


def test_a_checkpoint_that_lacks_a_tensor_changes_nothing(
    llm: LLM, tiny_reference: Reference, tmp_path: Path
):
    path = make_checkpoint(tmp_path / "new", seed=1, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"'lm_head.weight' .* is missing"):
        llm.load_weights(path)
    assert greedy(llm, PROMPTS[:1]) == [tiny_reference.tokens(PROMPTS[0], 12)]


def test_code_that_makes_the_tensors_may_compute_gradients(llm: LLM):
    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        weight = torch.ones(64, requires_grad=True)
        (weight * 2).sum().backward()
        yield "model.norm.weight", weight

    llm.update_weights(tensors())


@pytest.mark.parametrize("change", ["update_weights", "load_weights", "reset_prefix_cache"])
def test_a_change_beside_unfinished_requests_is_refused(
    llm: LLM, tiny: Path, tiny_reference: Reference, change: str
):
    argument = {"update_weights": [{}], "load_weights": [tiny], "reset_prefix_cache": []}[change]
    llm.add_request(PROMPTS[0], GREEDY)
    llm.step()
    with pytest.raises(RuntimeError, match="1 requests are unfinished: let them end"):
        getattr(llm, change)(*argument)
    while not llm.is_finished():
        outputs = llm.step()
    assert outputs[0]["token_ids"] == tiny_reference.tokens(PROMPTS[0], 12)
    getattr(llm, change)(*argument)


def test_several_ranks_are_refused(llm: LLM):
    llm.config.tensor_parallel_size = 2
    with pytest.raises(RuntimeError, match="tensor_parallel_size=2: build a new LLM"):
        llm.update_weights({})


def test_the_prefix_cache_can_be_emptied(llm: LLM):
    def num_cached() -> int:
        return llm.generate(PROMPTS[1], GREEDY, use_tqdm=False)[0]["num_cached_tokens"]

    assert [num_cached(), num_cached()] == [0, 32]
    llm.reset_prefix_cache()
    assert num_cached() == 0
