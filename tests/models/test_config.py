"""config.json: read as transformers reads it, and refused where the engine does not compute it."""

import json
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import transformers

from helpers.checkpoints import (
    TRANSFORMERS_5,
    Reference,
    edit_json,
    make_checkpoint,
    random_tokens,
)
from helpers.engines import build, greedy
from helpers.paths import DEMO
from nanovllm import SamplingParams
from nanovllm.config import Config
from nanovllm.models import MODELS
from nanovllm.models.config import SIZES, ModelConfig
from nanovllm.models.qwen3 import Qwen3Config
from nanovllm.models.qwen3_moe import Qwen3MoeConfig

FAMILIES: dict[str, type[ModelConfig]] = {
    model.config_class.model_type: model.config_class for model in MODELS.values()
}
# Contents of a config.json for every family, and for each besides.
CONTENTS: list[dict[str, Any]] = [
    {},
    {"hidden_size": 320, "num_hidden_layers": 3, "vocab_size": 77, "eos_token_id": [1, 2]},
    {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 40},
    {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "hidden_act": "gelu"},
    {"intermediate_size": 64, "max_position_embeddings": 40960, "initializer_range": 0.5},
    {"quantization_config": None, "eos_token_id": None},
]
NULL_HEADS: list[dict[str, Any]] = [
    {"num_key_value_heads": None},
    {"num_attention_heads": 8, "num_key_value_heads": None, "head_dim": 40},
]
SWITCHED_WINDOWS: list[dict[str, Any]] = [
    {"use_sliding_window": False, "sliding_window": 64},
    {"use_sliding_window": True, "sliding_window": 64},
    {"use_sliding_window": True},
]
OWN_CONTENTS: dict[str, list[dict[str, Any]]] = {
    "qwen3": [
        *NULL_HEADS, *SWITCHED_WINDOWS, {"attention_bias": True},
        json.loads((DEMO / "config.json").read_text()),
    ],
    "qwen3_moe": [
        *SWITCHED_WINDOWS, {"attention_bias": True}, {"head_dim": None}, {"norm_topk_prob": True},
        {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 96},
        {"num_local_experts" if TRANSFORMERS_5 else "num_experts": 16},
        {"mlp_only_layers": None}, {"mlp_only_layers": [0, 3]}, {"decoder_sparse_step": 2},
    ],
    "qwen2": [*NULL_HEADS, *SWITCHED_WINDOWS],
    "qwen2_moe": [
        *SWITCHED_WINDOWS, {"qkv_bias": False}, {"norm_topk_prob": True},
        {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 96},
        {"shared_expert_intermediate_size": 96}, {"mlp_only_layers": None},
        {"mlp_only_layers": [0, 3]}, {"decoder_sparse_step": 2},
    ],
    "llama": [*NULL_HEADS, {"attention_bias": True}, {"mlp_bias": True}, {"head_dim": None}],
    "mistral": [{"head_dim": None}, {"sliding_window": None}, {"sliding_window": 64}],
}  # fmt: skip
FAMILY_AND_CONTENT = [
    (name, content) for name in FAMILIES for content in CONTENTS + OWN_CONTENTS.get(name, [])
]
COMPARED_ELSEWHERE = {
    "rope_parameters", "original_max_position_embeddings", "dtype", "fp8_blocks",
}  # fmt: skip


def read(**content: Any) -> Qwen3Config:
    return Qwen3Config.from_json({"model_type": "qwen3", **content})


def value_of(theirs: transformers.PretrainedConfig, name: str) -> Any:
    """What transformers' model makes of its config."""
    if name == "head_dim":  # not an option of every family
        head_dim = getattr(theirs, "head_dim", None)
        return head_dim or theirs.hidden_size // theirs.num_attention_heads
    if name == "sliding_window":
        switch = getattr(theirs, "use_sliding_window", True)
        return getattr(theirs, "sliding_window", None) if switch else None
    return getattr(theirs, name)


@pytest.mark.parametrize(("family", "content"), FAMILY_AND_CONTENT)
def test_values_and_defaults_are_those_of_transformers(family: str, content: dict[str, Any]):
    ours = FAMILIES[family].from_json({"model_type": family, **content})
    theirs = transformers.CONFIG_MAPPING[family](**content)
    names = {f.name for f in fields(ours)}
    assert names >= {name for name in vars(theirs) if name.endswith("bias")}
    for name in names - COMPARED_ELSEWHERE:
        assert getattr(ours, name) == value_of(theirs, name), name


@pytest.mark.parametrize("family", FAMILIES)
def test_default_rope_is_that_of_transformers(family: str):
    ours = FAMILIES[family].from_json({"model_type": family}).rope_parameters
    theirs = transformers.CONFIG_MAPPING[family]()
    if TRANSFORMERS_5:
        assert ours == theirs.rope_parameters
    else:
        assert (ours["rope_theta"], theirs.rope_scaling) == (theirs.rope_theta, None)


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
        *((size, bad) for size in SIZES for bad in (0, -1, 1.5, "8", True, [4], 10**9)),
        ("rms_norm_eps", "small"), ("rms_norm_eps", -1e-6), ("rms_norm_eps", float("inf")),
        ("rms_norm_eps", float("nan")), ("initializer_range", None), ("initializer_range", True),
        ("attention_bias", "false"), ("tie_word_embeddings", "no"), ("tie_word_embeddings", 2),
        ("use_sliding_window", "yes"), ("hidden_act", "relu"), ("hidden_act", None),
        ("hidden_act", ["silu"]), ("hidden_act", {}),
        ("quantization_config", {"bits": 4}), ("partial_rotary_factor", 0.5),
        ("rope_theta", "10000"), ("rope_theta", -1.0), ("rope_theta", 10**400),
        ("rope_scaling", [1]), ("rope_scaling", "yarn"),
        ("num_key_value_heads", 3), ("head_dim", 33), ("head_dim", 2**24),
    ],
)  # fmt: skip
def test_a_value_of_no_use_is_refused_by_name(name: str, value: object):
    with pytest.raises(ValueError, match=name):
        read(**{name: value})


def test_a_rope_type_that_is_no_name_is_refused():
    with pytest.raises(ValueError, match="rope_type"):
        read(rope_scaling={"rope_type": []})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_experts", 0), ("num_experts", 2.0), ("num_experts_per_tok", 9),
        ("num_experts_per_tok", 0), ("moe_intermediate_size", "768"),
        ("moe_intermediate_size", 2**26), ("decoder_sparse_step", 0), ("mlp_only_layers", 3),
        ("mlp_only_layers", [0, "1"]), ("norm_topk_prob", "yes"),
    ],
)  # fmt: skip
def test_experts_of_no_use_are_refused_by_name(name: str, value: object):
    with pytest.raises(ValueError, match=name):
        Qwen3MoeConfig.from_json({"num_experts": 8, name: value})


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}, "Phi3ForCausalLM"),
        ({"model_type": "phi3", "architectures": ["Qwen3ForCausalLM"]}, "Qwen3ForCausalLM"),
        ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}, "Mixtral"),
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


# How long a sequence may be

YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("content", "length"),
    [
        ({}, 40960),
        # As Qwen tells people to switch it on, in the form of transformers 4 and of 5.
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 32768}}, 131072),
        ({"rope_parameters": YARN | {"original_max_position_embeddings": 32768}}, 131072),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "rope_theta": 1e6}}, 81920),
        ({"rope_scaling": YARN | {"factor": 2.5}, "original_max_position_embeddings": 100}, 250),
        # What says no length leaves it as it is; the rotary table refuses it.
        ({"rope_scaling": {"rope_type": "yarn"}}, 40960),
        ({"rope_scaling": YARN | {"factor": "4"}}, 40960),
        ({"rope_scaling": YARN | {"factor": float("inf")}}, 40960),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 10**400}}, 40960),
        ({"rope_scaling": YARN | {"factor": 1e308}}, 2**28),
        # Published with the length that they are scaled to.
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 40960),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192,
                }
            },
            40960,
        ),
    ],
    ids=str,
)  # fmt: skip
def test_yarn_makes_sequences_longer_by_its_factor(tmp_path: Path, content: dict, length: int):
    assert read(max_position_embeddings=40960, **content).max_length == length
    edit_json(
        tmp_path / "config.json", model_type="qwen3", max_position_embeddings=40960, **content
    )
    assert Config(str(tmp_path), device="cpu").max_model_len == length


def test_sequences_past_the_positions_of_training_give_transformers_tokens(tmp_path: Path):
    rope = YARN | {"original_max_position_embeddings": 128, "rope_theta": 10000.0}
    path = make_checkpoint(tmp_path / "model", rope=rope, max_position_embeddings=160)
    prompt, params = random_tokens(400), SamplingParams(temperature=0, max_tokens=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm = build(path, max_model_len=512)
    with llm:
        assert greedy(llm, [prompt], params) == [Reference(path).tokens(prompt, 10)]


# The sliding window


@pytest.mark.parametrize(
    ("content", "window"),
    [
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "mistral", "sliding_window": 64}, 64),
        ({"model_type": "qwen2", "use_sliding_window": True}, 4096),
        ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 64}, 64),
    ],
)
def test_sequences_may_be_as_long_as_the_window(tmp_path: Path, content: dict, window: int):
    edit_json(tmp_path / "config.json", max_position_embeddings=8192, **content)
    config = Config(str(tmp_path), max_model_len=window)
    assert config.max_model_len == config.model_config.sliding_window == window
    assert Config(str(tmp_path)).max_model_len == window
    refused = rf"sliding window of {window} tokens.*give max_model_len={window} or less"
    with pytest.raises(ValueError, match=refused):
        Config(str(tmp_path), max_model_len=window + 1)


def test_a_window_that_is_null_is_none(tmp_path: Path):
    edit_json(tmp_path / "config.json", model_type="mistral", sliding_window=None)
    assert Config(str(tmp_path), max_model_len=100_000).max_model_len == 100_000


@pytest.mark.parametrize("value", [0, -1, 1.5, "8", True, [4]])
def test_a_window_of_no_use_is_refused_by_name(tmp_path: Path, value: object):
    edit_json(tmp_path / "config.json", model_type="mistral", sliding_window=value)
    with pytest.raises(ValueError, match="sliding_window"):
        Config(str(tmp_path))


def test_sequences_that_fill_the_window_give_transformers_tokens(tmp_path: Path):
    path = make_checkpoint(tmp_path / "model", family="mistral", sliding_window=64)
    prompt, params = random_tokens(50), SamplingParams(temperature=0, max_tokens=14)
    with build(path, max_model_len=64) as llm:
        (tokens,) = greedy(llm, [prompt], params)
    assert tokens == Reference(path).tokens(prompt, 14)
