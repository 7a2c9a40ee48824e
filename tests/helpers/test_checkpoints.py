"""The checkpoints that tests make: transformers reads them, and every weight matters."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.checkpoints import FAMILIES, Reference, make_checkpoint, random_tokens


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_runs_every_family(tmp_path: Path, family: str, is_tied: bool):
    path = make_checkpoint(tmp_path / "model", family=family, tie_word_embeddings=is_tied)
    content = json.loads((path / "config.json").read_text())
    reference = Reference(path)
    assert content["architectures"] == [type(reference.model).__name__]
    assert (content["model_type"], content["tie_word_embeddings"]) == (family, is_tied)
    assert ("head_dim" in content) == (family in ("qwen3", "qwen3_moe"))
    assert len(reference.tokens(random_tokens(9), 5)) == 5


@pytest.mark.parametrize(
    ("family", "options", "biases"),
    [
        ("qwen3", {}, set()), ("qwen3", {"attention_bias": True}, {"q", "k", "v", "o"}),
        ("qwen3_moe", {}, set()), ("qwen2", {}, {"q", "k", "v"}),
        ("qwen2_moe", {}, {"q", "k", "v"}), ("qwen2_moe", {"qkv_bias": False}, set()),
        ("mistral", {}, set()), ("llama", {}, set()),
        ("llama", {"attention_bias": True}, {"q", "k", "v", "o"}),
        ("llama", {"mlp_bias": True}, {"gate", "up", "down"}),
    ],
)  # fmt: skip
def test_all_weights_are_random(
    tmp_path: Path, family: str, options: dict[str, Any], biases: set[str]
):
    path = make_checkpoint(tmp_path / "model", family=family, **options)
    parameters = dict(Reference(path).model.named_parameters())
    for name, parameter in parameters.items():
        assert parameter.std() > 0.1, name
    found = {name.split(".")[-2] for name in parameters if name.endswith(".bias")}
    assert found == {f"{name}_proj" for name in biases}


def test_options_are_in_the_config_as_given(tmp_path: Path):
    """Also those that transformers itself would leave out."""
    options = {"use_sliding_window": False, "sliding_window": 64, "num_key_value_heads": 1}
    path = make_checkpoint(tmp_path / "model", family="qwen2", **options)
    content = json.loads((path / "config.json").read_text())
    assert {name: content[name] for name in options} == options
    assert Reference(path).model.config.sliding_window is None


def test_a_seed_makes_the_same_weights_again(tmp_path: Path):
    first, again, other = (
        Reference(make_checkpoint(tmp_path / name, seed=seed)).model.lm_head.weight
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert torch.equal(first, again)
    assert not torch.isclose(first, other).any(dim=1).all()
