"""config.json and the tokenizer's files: read as transformers reads them, without its detours."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from helpers.checkpoints import add_tokenizer, edit_json
from helpers.paths import DEMO
from nanovllm.engine.tokenizer import load_tokenizer
from nanovllm.layers.rotary_embedding import rope_cos_sin
from nanovllm.utils.hf_config import SIZES, Qwen3Config

CPU = torch.device("cpu")
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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((size, bad) for size in SIZES for bad in (0, -1, 1.5, "8", True, [4])),
        ("rms_norm_eps", "small"), ("rms_norm_eps", -1e-6), ("rms_norm_eps", float("inf")),
        ("rms_norm_eps", float("nan")), ("initializer_range", None), ("initializer_range", True),
        ("attention_bias", "false"), ("tie_word_embeddings", "no"), ("tie_word_embeddings", 2),
        ("use_sliding_window", True), ("hidden_act", "gelu"), ("hidden_act", None),
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


@pytest.mark.parametrize("value", [False, True, None, 0, 1])
def test_a_flag_may_be_written_as_a_number(value: object):
    assert bool(read(tie_word_embeddings=value).tie_word_embeddings) is bool(value)


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear"},  # without its factor
        {"rope_type": "linear", "factor": 0}, {"rope_type": "yarn", "factor": float("nan")},
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {
            "rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 64,
            "short_factor": [1.0] * 3, "long_factor": [1.0] * 2,
        },
    ],
)  # fmt: skip
def test_scaled_rope_with_parameters_of_no_use_is_refused(parameters: dict):
    with pytest.raises(ValueError, match=f"rope parameters of no use.*{parameters['rope_type']}"):
        rope_cos_sin(read(rope_scaling=parameters), 128, CPU)


def test_the_window_before_scaling_may_be_given_beside_the_parameters():
    """As Phi writes it: longrope takes its long factors past that many positions."""
    parameters = {"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [4.0] * 64}
    shape = {"rope_scaling": parameters, "max_position_embeddings": 4096}
    tables = [
        rope_cos_sin(read(**shape, original_max_position_embeddings=window), 512, CPU)
        for window in (256, 1024)
    ]
    plain = rope_cos_sin(read(), 512, CPU)
    turned = [torch.atan2(table[1, 64], table[1, 0]) for table in (*tables, plain)]
    assert turned[0] == pytest.approx(turned[2] / 4)
    assert turned[1] == pytest.approx(turned[2])


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("demo", "Qwen2Tokenizer"), ("demo", "Qwen2TokenizerFast"),
        ("demo", "PreTrainedTokenizerFast"), ("demo", "TokenizersBackend"), ("demo", None),
        ("words", "PreTrainedTokenizerFast"), ("words", None),
    ],
)  # fmt: skip
def test_the_tokenizer_is_the_one_that_autotokenizer_makes(
    demo_copy: Path, tiny_copy: Path, source: str, name: str | None
):
    if name == "TokenizersBackend" and not hasattr(transformers, name):
        pytest.skip("transformers 4 has no such class")
    path = demo_copy if source == "demo" else add_tokenizer(tiny_copy, eos_token="t7")
    edit_json(path / "tokenizer_config.json", remove=("tokenizer_class",))
    if name is not None:
        edit_json(path / "tokenizer_config.json", tokenizer_class=name)
    ours, theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    assert type(ours) is type(theirs)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.special_tokens_map == theirs.special_tokens_map
    for text in ("t1 t2  t3", "It's  1234,\n\n<|im_start|>user é 漢字 🙂<|im_end|>"):
        assert ours(text).input_ids == theirs(text).input_ids
        ids = theirs(text).input_ids
        assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("content", ["[]", "null", '{"tokenizer_class": []}', "{"])
def test_a_tokenizer_config_of_no_use_is_refused(demo_copy: Path, content: str):
    (demo_copy / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"the tokenizer in .* cannot be read"):
        load_tokenizer(demo_copy)


def test_importing_nanovllm_leaves_transformers_alone():
    """Its import takes a second or more, which a start hides behind the GPU's."""
    code = "import sys, nanovllm; print('transformers' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False"]
