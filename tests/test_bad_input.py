"""Bad options, checkpoints and requests: refused with a message, the engine none the worse."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.checkpoints import VOCAB_SIZE, Reference, edit_json, make_checkpoint, random_tokens
from nanovllm import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=8)
GOOD = random_tokens(20, seed=1)


def build(path: Path | str, **options) -> LLM:
    settings = {"kvcache_block_size": 16, "num_kvcache_blocks": 40, "device": "cpu"}
    return LLM(path, **settings | options)


@pytest.fixture(scope="module")
def engine(tiny: Path):
    with build(tiny, max_model_len=64) as llm:
        yield llm


@pytest.fixture
def llm(engine: LLM, tiny_reference: Reference):
    """An engine that, after the test, has nothing queued and gives a good request its tokens."""
    yield engine
    assert engine.is_finished(), "a refused request was queued"
    (output,) = engine.generate(GOOD, GREEDY, use_tqdm=False)
    assert output["token_ids"] == tiny_reference.tokens(GOOD, 8)
    manager = engine.scheduler.block_manager
    assert manager.num_free_blocks == len(manager.blocks)


# Requests

BAD_PROMPTS = {
    "empty string": ("", ValueError, "prompt 0 is empty"),
    "no prompts": ([], ValueError, "prompts is empty"),
    "empty token list": ([[]], ValueError, "prompt 0 is empty"),
    "token beyond the vocabulary": ([1, VOCAB_SIZE], ValueError, "token id 128, outside"),
    "negative token": ([1, -1, 2], ValueError, "token id -1, outside"),
    "huge token": ([2**70], ValueError, "outside the vocabulary"),
    "bool token": ([1, True], TypeError, "token 1 must be an integer, got True"),
    "bool first": ([True, 1], TypeError, "token 0 must be an integer, got True"),
    "float token": ([1, 2.0], TypeError, r"token 1 must be an integer, got 2\.0"),
    "nan token": ([math.nan], TypeError, "must be an integer, got nan"),
    "None token": ([None], TypeError, "must be an integer, got None"),
    "string among tokens": ([1, "t1"], TypeError, "token 1 must be an integer, got 't1'"),
    "list among tokens": ([1, [2]], TypeError, r"token 1 must be an integer, got \[2\]"),
    "token among prompts": (["t1", 2], TypeError, "prompt 1 must be a string or a list"),
    "None among prompts": (["t1", None], TypeError, "prompt 1 must be a string or a list"),
    "nested too deep": ([[[1]]], TypeError, r"token 0 must be an integer, got \[1\]"),
    "None": (None, TypeError, "prompts must be a string, a list"),
    "integer": (7, TypeError, "prompts must be a string, a list"),
    "bytes": (b"t1", TypeError, "prompts must be a string, a list"),
    "dict of both": ({"prompt": "t1", "prompt_token_ids": [1]}, ValueError, "prompt 0 must have a"),
    "dict of neither": ([{"text": "t1"}], ValueError, "prompt 0 must have a string as 'prompt'"),
    "dict of another type": ([{"prompt": [1]}], ValueError, "prompt 0 must have a string as"),
    "float array": (np.ones(3), TypeError, "prompts must be a string, a list"),
    "as long as max_model_len": (random_tokens(64), ValueError, "has 64 tokens, and at most 63"),
    "longer than max_model_len": (random_tokens(99), ValueError, "has 99 tokens, and at most 63"),
    "long string": (" ".join(["t1"] * 64), ValueError, "has 64 tokens, and at most 63"),
}


@pytest.mark.parametrize(("prompt", "error", "message"), BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_bad_prompt_is_refused(llm: LLM, prompt: object, error: type, message: str):
    with pytest.raises(error, match=message):
        llm.generate(prompt, GREEDY, use_tqdm=False)


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ("", ValueError), ([], ValueError), ([-1], ValueError), ([VOCAB_SIZE], ValueError),
        ([1.5], TypeError), ([True], TypeError), (None, TypeError), (3, TypeError),
        (random_tokens(64), ValueError),
    ],
)  # fmt: skip
def test_bad_prompt_is_refused_by_add_request(llm: LLM, prompt: object, error: type):
    with pytest.raises(error):
        llm.add_request(prompt, GREEDY)


def test_one_bad_prompt_among_many_queues_nothing(llm: LLM):
    for bad in ([], [VOCAB_SIZE], random_tokens(64)):
        for place in range(3):
            prompts = [GOOD, GOOD]
            prompts.insert(place, bad)
            with pytest.raises(ValueError, match=f"prompt {place} "):
                llm.generate(prompts, GREEDY, use_tqdm=False)
            assert llm.is_finished()


def test_numpy_integers_are_tokens(llm: LLM, tiny_reference: Reference):
    (output,) = llm.generate([np.int64(token) for token in GOOD], GREEDY, use_tqdm=False)
    assert output["token_ids"] == tiny_reference.tokens(GOOD, 8)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_lists_of_unequal_length_are_refused(llm: LLM, count: int):
    with pytest.raises(ValueError, match=f"2 prompts need as many sampling_params.*got {count}"):
        llm.generate([GOOD, GOOD], [GREEDY] * count, use_tqdm=False)


@pytest.mark.parametrize("params", [{"max_tokens": 3}, "greedy", 0.5, [GREEDY, {}]])
def test_params_of_another_type_are_refused(llm: LLM, params: object):
    with pytest.raises(TypeError, match="sampling_params must be SamplingParams"):
        llm.generate([GOOD, GOOD], params, use_tqdm=False)


BAD_PARAMS = [
    ({"temperature": -0.1}, ValueError), ({"temperature": math.nan}, ValueError),
    ({"temperature": math.inf}, ValueError), ({"temperature": -math.inf}, ValueError),
    ({"temperature": "1"}, TypeError), ({"temperature": None}, TypeError),
    ({"temperature": True}, TypeError), ({"temperature": 1j}, TypeError),
    ({"temperature": 10**400}, ValueError), ({"temperature": np.ones(2)}, TypeError),
    ({"max_tokens": 0}, ValueError), ({"max_tokens": -3}, ValueError),
    ({"max_tokens": 1.5}, TypeError), ({"max_tokens": math.inf}, TypeError),
    ({"max_tokens": "8"}, TypeError), ({"max_tokens": True}, TypeError),
    ({"ignore_eos": 1}, TypeError), ({"ignore_eos": None}, TypeError),
    ({"seed": 1.0}, TypeError), ({"seed": "1"}, TypeError), ({"seed": True}, TypeError),
    ({"seed": 2**64}, ValueError), ({"seed": -(2**63) - 1}, ValueError),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error"), BAD_PARAMS, ids=[str(p[0])[:30] for p in BAD_PARAMS])
def test_impossible_sampling_params_are_refused_by_name(options: dict, error: type):
    (name,) = options
    with pytest.raises(error, match=name):
        SamplingParams(**options)


def test_unknown_sampling_param_is_refused():
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)


def test_extreme_but_possible_params_work(llm: LLM):
    params = [
        SamplingParams(temperature=1e30, max_tokens=4),
        SamplingParams(temperature=1e-30, max_tokens=4),
        SamplingParams(temperature=np.float32(0.5), max_tokens=np.int64(4), seed=np.int32(3)),
        SamplingParams(max_tokens=2**80, seed=2**64 - 1),
        SamplingParams(max_tokens=4, seed=-(2**63)),
    ]
    outputs = llm.generate([GOOD] * 5, params, use_tqdm=False)
    assert [len(output["token_ids"]) for output in outputs] == [4, 4, 4, 44, 4]


@pytest.mark.filterwarnings("error")
def test_temperature_beyond_float32_is_no_warning(llm: LLM):
    """A finite number by SamplingParams' own rule, too large for the device's float32."""
    params = SamplingParams(temperature=1e300, max_tokens=4, seed=1)
    (output,) = llm.generate([GOOD], params, use_tqdm=False)
    assert len(output["token_ids"]) == 4


# Options

BAD_OPTIONS = [
    ("max_num_batched_tokens", 0), ("max_num_batched_tokens", -1), ("max_num_batched_tokens", 1.5),
    ("max_num_seqs", 0), ("max_num_seqs", "8"), ("max_num_seqs", True),
    ("max_model_len", 1), ("max_model_len", 0), ("max_model_len", None),
    ("gpu_memory_utilization", 0), ("gpu_memory_utilization", 1.01),
    ("gpu_memory_utilization", math.nan), ("gpu_memory_utilization", "all"),
    ("gpu_memory_utilization", True),
    ("enforce_eager", 1), ("enforce_eager", "yes"), ("enforce_eager", None),
    ("kvcache_block_size", 0), ("kvcache_block_size", 17), ("kvcache_block_size", 16.0),
    ("num_kvcache_blocks", 0), ("num_kvcache_blocks", -5), ("num_kvcache_blocks", 2.5),
    ("device", "tpu"), ("device", "meta"), ("device", ""), ("device", "cuda:99"),
    ("device", None), ("device", 3), ("device", "cpu:x"),
    ("dtype", "int8"), ("dtype", "half"), ("dtype", torch.float32), ("dtype", None),
    ("attention_backend", "cuda"), ("attention_backend", None), ("attention_backend", "Triton"),
    ("load_format", "pt"), ("load_format", None),
    ("seed", -1), ("seed", 0.5), ("seed", None),
    ("async_scheduling", 1), ("async_scheduling", "auto"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_OPTIONS, ids=[f"{n}={v!r}" for n, v in BAD_OPTIONS])
def test_impossible_option_is_refused_by_name(tiny: Path, name: str, value: object):
    with pytest.raises((ValueError, TypeError), match=name) as raised:
        LLM(tiny, **{"num_kvcache_blocks": 4, "device": "cpu", name: value})
    assert repr(value) in str(raised.value) or str(value) in str(raised.value)


def test_unknown_option_is_refused_and_the_known_ones_listed(tiny: Path):
    with pytest.raises(TypeError, match=r"unknown engine option 'max_seqs'.*max_num_seqs"):
        build(tiny, max_seqs=3)


@pytest.mark.parametrize("name", ["model_dir", "hf_config", "eos_token_ids", "torch_device"])
def test_what_the_config_computes_is_not_an_option(tiny: Path, name: str):
    with pytest.raises(TypeError, match=f"unknown engine option '{name}'"):
        build(tiny, **{name: 1})


@pytest.mark.parametrize("backend", ["triton", "flash-attn"])
def test_backend_that_needs_a_gpu_says_so_on_a_cpu(tiny: Path, backend: str):
    message = f"attention_backend '{backend}' cannot run: it needs a GPU, and device is 'cpu'"
    with pytest.raises(ValueError, match=message) as raised:
        build(tiny, attention_backend=backend)
    assert "'torch'" in str(raised.value)


# Checkpoints


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

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        assert "*.safetensors" in allow_patterns
        return str(tiny)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with build("some/model") as llm:
        assert asked == ["some/model"]
        assert len(llm.generate(GOOD, GREEDY, use_tqdm=False)[0]["token_ids"]) == 8


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


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
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
        ("use_sliding_window", True), ("hidden_act", "gelu"),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("num_key_value_heads", 3), ("num_key_value_heads", 0), ("head_dim", 33),
        ("head_dim", None), ("head_dim", 0),
        ("vocab_size", "many"), ("num_hidden_layers", -1), ("max_position_embeddings", None),
    ],
)  # fmt: skip
def test_option_of_qwen3_that_is_not_computed_is_refused_by_name(
    tiny_copy: Path, name: str, value: object
):
    edit_json(tiny_copy / "config.json", **{name: value})
    with pytest.raises(ValueError, match=name):
        build(tiny_copy)


def test_missing_tokenizer_leaves_token_ids(tmp_path: Path):
    path = make_checkpoint(tmp_path / "model")
    with build(path) as llm:
        for _ in range(2):
            with pytest.raises(ValueError, match=r"prompt 0 is a string, and .* has no tokenizer"):
                llm.generate("t1 t2", GREEDY, use_tqdm=False)
            (output,) = llm.generate(GOOD, GREEDY, use_tqdm=False)
            assert output["token_ids"] == Reference(path).tokens(GOOD, 8)
            assert output["text"] == ""


@pytest.mark.parametrize("content", ["", "{", "{}", "\x00\xff"])
def test_corrupt_tokenizer_is_refused(tiny_copy: Path, content: str):
    (tiny_copy / "tokenizer.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"the tokenizer in .* cannot be read"):
        build(tiny_copy)


@pytest.mark.parametrize("eos", ["2", 2.0, [[1]], {}, True])
def test_eos_that_is_no_token_id_is_refused(tiny_copy: Path, eos: object):
    edit_json(tiny_copy / "generation_config.json", eos_token_id=eos)
    with pytest.raises(ValueError, match="eos_token_id"):
        build(tiny_copy)


def test_lone_surrogate_is_refused_by_the_number_of_its_prompt(llm: LLM):
    with pytest.raises(ValueError, match="prompt 1 is not valid Unicode"):
        llm.generate(["t1", "t1 \ud800"], GREEDY, use_tqdm=False)


@pytest.mark.parametrize("model", [None, 5, b"model", ""])
def test_model_that_is_no_name_is_refused(model: object):
    with pytest.raises((TypeError, ValueError), match="model"):
        LLM(model)
