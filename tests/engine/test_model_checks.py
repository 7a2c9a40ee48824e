"""A model that cannot be, or that is not as config.json says: seen before anything is built."""

import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from helpers.checkpoints import Reference, edit_json, make_checkpoint, random_tokens
from helpers.engines import build, greedy
from nanovllm.config import Config
from nanovllm.engine import model_checks
from nanovllm.engine.model_checks import check_memory, checked_model_config, weight_bytes
from nanovllm.utils.checkpoint_files import read_headers

PROMPT = random_tokens(20, seed=1)


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """A checkpoint whose head is the embedding's matrix, and not in its file."""
    return make_checkpoint(tmp_path / "tied", tie_word_embeddings=True)


@pytest.fixture
def differing(tied: Path) -> Path:
    """One that says the same, and has a head of its own."""
    tensors = load_file(tied / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, tied / "model.safetensors", metadata={"format": "pt"})
    return tied


def untied_tokens(path: Path) -> list[int]:
    """Of transformers, with the head of the file, whatever its version does of its own accord."""
    edit_json(path / "config.json", tie_word_embeddings=False)
    tokens = Reference(path).tokens(PROMPT, 12)
    edit_json(path / "config.json", tie_word_embeddings=True)
    return tokens


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_head_that_is_not_the_embedding_is_used_with_a_warning(differing: Path, ranks: int):
    expected = untied_tokens(differing)
    with pytest.warns(UserWarning, match=r"tie_word_embeddings=true, but lm_head\.weight in .*"):
        llm = build(differing, tensor_parallel_size=ranks)
    with llm:
        assert greedy(llm, [PROMPT]) == [expected]


def test_a_head_that_is_the_embedding_stays_tied_without_a_warning(tied: Path):
    tensors = load_file(tied / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tied / "model.safetensors", metadata={"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = checked_model_config(Config(str(tied), device="cpu"), read_headers(tied))
        assert found.tie_word_embeddings is True


def test_dummy_weights_have_no_head_of_their_own(differing: Path):
    config = Config(str(differing), device="cpu", load_format="dummy")
    assert checked_model_config(config, {}).tie_word_embeddings is True


# Sizes that cannot be

ABSURD: list[dict[str, Any]] = [
    {"num_hidden_layers": 10**6}, {"hidden_size": 10**8}, {"hidden_size": 10**9},
    {"vocab_size": 10**8}, {"vocab_size": 10**12}, {"intermediate_size": 10**8},
    {"intermediate_size": 10**30}, {"num_attention_heads": 10**6, "num_key_value_heads": 1},
    {"num_attention_heads": 2**28, "num_key_value_heads": 2**28}, {"head_dim": 10**7},
    {"hidden_size": 2**28, "intermediate_size": 2**28, "vocab_size": 2**28},
    {"num_hidden_layers": 2**28, "hidden_size": 2**28, "intermediate_size": 2**28},
]  # fmt: skip


@pytest.mark.parametrize("changes", ABSURD, ids=str)
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_absurd_sizes_are_refused_at_once(
    tiny_copy: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, load_format: str
):
    monkeypatch.setattr(model_checks, "available_memory", lambda device: 2**30)
    edit_json(tiny_copy / "config.json", **changes)
    start = time.monotonic()
    with pytest.raises((ValueError, RuntimeError), match=r"config\.json"):
        build(tiny_copy, load_format=load_format)
    assert time.monotonic() - start < 20


def test_more_layers_than_the_files_have_are_named(tiny_copy: Path):
    edit_json(tiny_copy / "config.json", num_hidden_layers=10**6)
    with pytest.raises(ValueError, match=r"num_hidden_layers=1000000, .*there are 2"):
        build(tiny_copy)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2, 7])
def test_the_bytes_of_the_weights_are_counted(tiny_copy: Path, num_layers: int, is_tied: bool):
    edit_json(tiny_copy / "config.json", num_hidden_layers=num_layers, tie_word_embeddings=is_tied)
    config = Config(str(tiny_copy), device="cpu", dtype="bfloat16")
    model = config.model_class(config.model_config)
    assert weight_bytes(config) == 2 * sum(each.numel() for each in model.parameters())


@pytest.mark.parametrize("ranks", [1, 2])
def test_dummy_weights_that_do_not_fit_are_refused_with_both_sizes(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
):
    config = Config(str(tiny), device="cpu", load_format="dummy", tensor_parallel_size=ranks)
    needed = weight_bytes(config)
    monkeypatch.setattr(model_checks, "available_memory", lambda device: needed)
    check_memory(config)
    monkeypatch.setattr(model_checks, "available_memory", lambda device: needed - 1)
    with pytest.raises(RuntimeError, match=r"they take 0\.0 GiB, and 0\.0 GiB are free on cpu"):
        check_memory(config)
