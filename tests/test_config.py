"""Options and the checkpoint's own settings: resolved, or refused by name."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.checkpoints import edit_json
from helpers.engines import GREEDY, PROMPTS, build
from nanovllm import LLM
from nanovllm.config import Config

# Options

BAD_OPTIONS = [
    ("max_num_batched_tokens", 0), ("max_num_batched_tokens", -1), ("max_num_batched_tokens", 1.5),
    ("max_num_seqs", 0), ("max_num_seqs", "8"), ("max_num_seqs", True),
    ("max_model_len", 1), ("max_model_len", 0), ("max_model_len", 2.5),
    ("gpu_memory_utilization", 0), ("gpu_memory_utilization", 1.01),
    ("gpu_memory_utilization", math.nan), ("gpu_memory_utilization", "all"),
    ("gpu_memory_utilization", True),
    ("enforce_eager", 1), ("enforce_eager", "yes"),
    ("kvcache_block_size", 0), ("kvcache_block_size", 17), ("kvcache_block_size", 16.0),
    ("num_kvcache_blocks", 0), ("num_kvcache_blocks", -5), ("num_kvcache_blocks", 2.5),
    ("device", "tpu"), ("device", "meta"), ("device", ""), ("device", "cuda:99"),
    ("device", 3), ("device", "cpu:x"),
    ("dtype", "int8"), ("dtype", torch.int8), ("dtype", 16),
    ("attention_backend", "cuda"), ("attention_backend", "Triton"),
    ("load_format", "pt"),
    ("seed", -1), ("seed", 0.5),
    ("async_scheduling", 1), ("async_scheduling", "auto"), ("enable_prefix_caching", 1),
    ("skip_tokenizer_init", "no"), ("hf_overrides", "rope_scaling"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_OPTIONS, ids=[f"{n}={v!r}" for n, v in BAD_OPTIONS])
def test_impossible_option_is_refused_by_name(tiny: Path, name: str, value: object):
    with pytest.raises((ValueError, TypeError), match=name) as raised:
        LLM(tiny, **{"num_kvcache_blocks": 4, "device": "cpu", name: value})
    assert repr(value) in str(raised.value) or str(value) in str(raised.value)


def test_unknown_option_is_refused_and_the_known_ones_listed(tiny: Path):
    with pytest.raises(TypeError, match=r"unknown engine option 'max_seqs'.*max_num_seqs"):
        build(tiny, max_seqs=3)


@pytest.mark.parametrize("name", ["model_dir", "model_config", "eos_token_ids", "torch_device"])
def test_what_the_config_computes_is_not_an_option(tiny: Path, name: str):
    with pytest.raises(TypeError, match=f"unknown engine option '{name}'"):
        build(tiny, **{name: 1})


def test_a_model_decides_how_long_sequences_are_unless_told_otherwise(tiny: Path):
    assert config(tiny).max_model_len == 640
    assert config(tiny, max_model_len=np.int64(100)).max_model_len == 100
    assert config(tiny, max_model_len=100_000).max_model_len == 640


# Where the model is


@pytest.mark.parametrize("model", [None, 5, b"model", ""])
def test_model_that_is_no_name_is_refused(model: object):
    with pytest.raises((TypeError, ValueError), match="model"):
        LLM(model)


def test_missing_directory_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        build(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["./nowhere", "~/nowhere-at-all", "nowhere", "a/b/c", ""])
def test_missing_path_is_not_taken_for_a_hub_id(name: str, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    def refuse(*args: object, **kwargs: object) -> str:
        raise AssertionError("asked the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises((FileNotFoundError, ValueError), match="directory"):
        build(name)


def test_file_in_place_of_a_directory_is_refused(tiny: Path):
    with pytest.raises(ValueError, match=r"must be a directory.*config\.json' is a file"):
        build(tiny / "config.json")


@pytest.mark.parametrize("error", [OSError("no route to host"), RuntimeError("")])
def test_hub_id_that_cannot_be_fetched_is_named(monkeypatch: pytest.MonkeyPatch, error: Exception):
    import huggingface_hub

    def refuse(*args: object, **kwargs: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match=r"'some/model' is neither") as raised:
        build("some/model")
    assert type(error).__name__ in str(raised.value)


def test_hub_id_is_fetched_when_no_such_directory_exists(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
):
    import huggingface_hub

    asked = []

    def fetch(
        name: str, allow_patterns: list[str], ignore_patterns: list[str], **where: object
    ) -> str:
        asked.append(name)
        assert "*.safetensors" in allow_patterns
        assert "consolidated*.safetensors" in ignore_patterns
        assert where == {"revision": "v2", "cache_dir": "here"}
        return str(tiny)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with build("some/model", revision="v2", download_dir="here") as llm:
        assert asked == ["some/model"]
        assert len(llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)[0]["token_ids"]) == 12


def test_path_may_be_a_string(tiny: Path):
    with build(str(tiny)) as llm:
        assert llm.config.model_dir == tiny


# Its files


def test_directory_without_config_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        build(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '"qwen3"', "\x00\xff"])
def test_corrupt_config_is_refused(tiny_copy: Path, content: str):
    (tiny_copy / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json is not a valid JSON object"):
        build(tiny_copy)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00\xff"])
def test_corrupt_generation_config_is_refused(tiny_copy: Path, content: str):
    (tiny_copy / "generation_config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"generation_config\.json is not a valid JSON object"):
        build(tiny_copy)


@pytest.mark.parametrize("eos", ["2", 2.0, [[1]], {}, True])
def test_eos_that_is_no_token_id_is_refused(tiny_copy: Path, eos: object):
    edit_json(tiny_copy / "generation_config.json", eos_token_id=eos)
    with pytest.raises(ValueError, match="eos_token_id"):
        build(tiny_copy)


def test_auto_takes_the_checkpoints_dtype(tiny_copy: Path):
    for name in ("dtype", "torch_dtype"):
        edit_json(tiny_copy / "config.json", remove=("dtype", "torch_dtype"), **{name: "bfloat16"})
        with build(tiny_copy) as llm:
            assert llm.config.torch_dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_auto_takes_the_dtype_of_the_weights_if_the_config_has_none(
    tiny_copy: Path, dtype: torch.dtype
):
    edit_json(tiny_copy / "config.json", remove=("dtype", "torch_dtype"))
    path = tiny_copy / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    path.unlink()  # a link to the shared file
    save_file(tensors, path)
    with build(tiny_copy) as llm:
        assert llm.config.torch_dtype == dtype


def test_unknown_dtype_of_a_checkpoint_is_refused(tiny_copy: Path):
    edit_json(tiny_copy / "config.json", remove=("dtype", "torch_dtype"), torch_dtype="int8")
    with pytest.raises(ValueError, match="int8"):
        build(tiny_copy)


# What comes of them, without an engine


def config(path: Path, **options: object) -> Config:
    return Config.from_options(path, {"device": "cpu"} | options)


def test_numpy_numbers_are_options(tiny: Path):
    found = config(
        tiny, max_num_seqs=np.int64(3), seed=np.uint8(7), gpu_memory_utilization=np.float32(0.5)
    )
    assert (found.max_num_seqs, found.seed, found.gpu_memory_utilization) == (3, 7, 0.5)
    assert {type(found.max_num_seqs), type(found.seed)} == {int}


def test_a_cpu_runs_one_step_after_another_unless_told_otherwise(tiny: Path):
    assert config(tiny).async_scheduling is False
    assert config(tiny, async_scheduling=True).async_scheduling is True


def test_a_model_of_a_single_position_is_refused(tiny_copy: Path):
    edit_json(tiny_copy / "config.json", max_position_embeddings=1)
    with pytest.raises(ValueError, match="max_position_embeddings=1"):
        config(tiny_copy)


def test_the_home_directory_has_its_short_name(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tiny.parent))
    assert config(f"~/{tiny.name}").model_dir == tiny
