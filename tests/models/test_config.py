"""config.json: read as transformers reads it, and refused where the engine does not compute it."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from helpers.checkpoints import edit_json
from helpers.engines import build
from helpers.paths import DEMO
from nanovllm.models.config import SIZES
from nanovllm.models.qwen3 import Qwen3Config

SAME_AS_THEIRS = (
    *SIZES, "rms_norm_eps", "initializer_range", "attention_bias", "tie_word_embeddings",
    "eos_token_id",
)  # fmt: skip


def read(**content: Any) -> Qwen3Config:
    return Qwen3Config.from_json({"model_type": "qwen3", **content})


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"hidden_size": 320, "num_hidden_layers": 3, "vocab_size": 77, "eos_token_id": [1, 2]},
        {"num_attention_heads": 8, "num_key_value_heads": None, "head_dim": 40},
        {"num_key_value_heads": None},
        {"tie_word_embeddings": True, "attention_bias": True, "rms_norm_eps": 1e-5},
        {"use_sliding_window": False, "sliding_window": 4096, "quantization_config": None},
        {"intermediate_size": 64, "max_position_embeddings": 40960, "initializer_range": 0.5},
        json.loads((DEMO / "config.json").read_text()),
    ],
)
def test_values_and_defaults_are_those_of_transformers(content: dict[str, Any]):
    ours, theirs = read(**content), transformers.Qwen3Config(**content)
    for name in SAME_AS_THEIRS:
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtype_has_two_names(name: str):
    assert read(**{name: "bfloat16"}).dtype == "bfloat16"
    assert read().dtype is None


@pytest.mark.parametrize(
    ("content", "rope"),
    [
        ({}, {"rope_type": "default", "rope_theta": 10000.0}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 5e5}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"type": "linear", "rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7e5}},
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 7e5},
        ),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_theta": 7e5},
            {"rope_type": "default", "rope_theta": 7e5},
        ),
    ],
)
def test_rope_parameters_in_the_form_of_transformers_4_and_5(content: dict, rope: dict):
    assert read(**content).rope_parameters == rope


@pytest.mark.parametrize("value", [False, True, None, 0, 1])
def test_a_flag_may_be_written_as_a_number(value: object):
    assert bool(read(tie_word_embeddings=value).tie_word_embeddings) is bool(value)


# Refusals


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((size, bad) for size in SIZES for bad in (0, -1, 1.5, "8", True, [4])),
        ("rms_norm_eps", "small"), ("rms_norm_eps", -1e-6), ("rms_norm_eps", float("inf")),
        ("rms_norm_eps", float("nan")), ("initializer_range", None), ("initializer_range", True),
        ("attention_bias", "false"), ("tie_word_embeddings", "no"), ("tie_word_embeddings", 2),
        ("use_sliding_window", "yes"), ("hidden_act", "relu"), ("hidden_act", None),
        ("quantization_config", {"bits": 4}), ("partial_rotary_factor", 0.5),
        ("rope_theta", "10000"), ("rope_theta", -1.0), ("rope_theta", 10**400),
        ("rope_scaling", [1]), ("rope_scaling", "yarn"),
        ("num_key_value_heads", 3), ("head_dim", 33),
    ],
)  # fmt: skip
def test_a_value_of_no_use_is_refused_by_name(name: str, value: object):
    with pytest.raises(ValueError, match=name):
        read(**{name: value})


def test_a_rope_type_that_is_no_name_is_refused():
    with pytest.raises(ValueError, match="rope_type"):
        read(rope_scaling={"rope_type": []})


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}, "Phi3ForCausalLM"),
        ({"model_type": "phi3", "architectures": ["Qwen3ForCausalLM"]}, "Qwen3ForCausalLM"),
        ({"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3Moe"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "Qwen3ForSequenceClassification"),
        ({"model_type": "gpt2", "architectures": None}, "gpt2"),
        ({"model_type": None, "architectures": None}, "None"),
    ],
)
def test_other_architecture_is_refused_by_name(tiny_copy: Path, changes: dict, name: str):
    edit_json(tiny_copy / "config.json", **changes)
    with pytest.raises(ValueError, match=rf"architecture '?{name}.*Qwen3ForCausalLM"):
        build(tiny_copy)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_act", "relu"),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("num_key_value_heads", 3), ("num_key_value_heads", 0), ("head_dim", 33),
        ("head_dim", 0),
        ("vocab_size", "many"), ("num_hidden_layers", -1), ("max_position_embeddings", None),
    ],
)  # fmt: skip
def test_option_of_qwen3_that_is_not_computed_is_refused_by_name(
    tiny_copy: Path, name: str, value: object
):
    edit_json(tiny_copy / "config.json", **{name: value})
    with pytest.raises(ValueError, match=name):
        build(tiny_copy)
