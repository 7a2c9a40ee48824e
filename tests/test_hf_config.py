"""config.json and the tokenizer's files: read as transformers reads them, without its detours."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from checkpoints import add_tokenizer, edit_json
from transformers import AutoTokenizer

from nanovllm.engine.tokenizer import load_tokenizer
from nanovllm.utils.hf_config import SIZES, Qwen3Config

DEMO = Path(__file__).parent.parent / "demo" / "tiny-qwen3"
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
        ("rms_norm_eps", "small"), ("rms_norm_eps", 0), ("initializer_range", None),
        ("use_sliding_window", True), ("hidden_act", "gelu"), ("hidden_act", None),
        ("quantization_config", {"bits": 4}), ("partial_rotary_factor", 0.5),
        ("rope_theta", "10000"), ("rope_theta", -1.0), ("rope_scaling", [1]),
        ("rope_scaling", "yarn"), ("num_key_value_heads", 3), ("head_dim", 33),
    ],
)  # fmt: skip
def test_a_value_of_no_use_is_refused_by_name(name: str, value: object):
    with pytest.raises(ValueError, match=name):
        read(**{name: value})


def test_scaled_rope_without_its_parameters_is_refused(tiny_copy: Path):
    from nanovllm import LLM

    rope_keys = ("rope_theta", "rope_scaling", "rope_parameters")
    edit_json(tiny_copy / "config.json", remove=rope_keys, rope_scaling={"rope_type": "linear"})
    with pytest.raises(ValueError, match=r"rope parameters of no use.*linear.*factor"):
        LLM(tiny_copy, device="cpu", num_kvcache_blocks=4)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("demo", "Qwen2Tokenizer"), ("demo", "Qwen2TokenizerFast"),
        ("demo", "PreTrainedTokenizerFast"), ("demo", None), ("words", "PreTrainedTokenizerFast"),
        ("words", None),
    ],
)  # fmt: skip
def test_the_tokenizer_is_the_one_that_autotokenizer_makes(
    demo_copy: Path, tiny_copy: Path, source: str, name: str | None
):
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


@pytest.mark.parametrize("content", ["[]", '{"tokenizer_class": []}', "{"])
def test_a_tokenizer_config_of_no_use_is_refused(demo_copy: Path, content: str):
    (demo_copy / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"the tokenizer in .* cannot be read"):
        load_tokenizer(demo_copy)


def test_importing_nanovllm_leaves_transformers_alone():
    """Its import takes a second or more, which a start hides behind the GPU's."""
    code = "import sys, nanovllm; print('transformers' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False"]
