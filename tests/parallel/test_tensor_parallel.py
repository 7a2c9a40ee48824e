"""Several ranks, each a process, give what one gives."""

from pathlib import Path

import pytest
import torch

from helpers.cases import slow
from helpers.checkpoints import make_checkpoint, random_tokens
from helpers.engines import assert_empty, build
from helpers.exactness import MODELS, WAYS, Model, check_all_lengths, check_preemption
from nanovllm import LLM, SamplingParams

# Each model by another way; 4 ranks share the 2 heads of keys and values. Experts on two ranks are
# in tests/models.
FOUR_RANKS = ("qwen3-bias-gqa2-dim64-sharded", "llama-gqa2-sharded")
CASES = [
    pytest.param(
        name,
        way,
        4 if name in FOUR_RANKS else 2,
        id=f"{name}-{way}",
        marks=() if name == FOUR_RANKS[0] else pytest.mark.slow,
    )
    for name, way in zip(MODELS, [*WAYS] * 2)
    if not name.startswith(("qwen3moe", "qwen2moe"))
    and name not in ("qwen2-gqa4-window-off-sharded", "mistral-tied-gqa8-dim64-sharded")
]
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")


@pytest.mark.parametrize(("name", "way", "size"), CASES)
def test_greedy_gives_transformers_tokens(tmp_path: Path, name: str, way: str, size: int):
    model = Model(tmp_path / "model", "cpu", MODELS[name])
    check_all_lengths(model, tensor_parallel_size=size, **WAYS[way])


def test_preempted_sequences_give_transformers_tokens(tmp_path: Path):
    model = Model(tmp_path / "model", "cpu", MODELS["qwen3-bias-gqa2-dim64-sharded"])
    check_preemption(model, 16, tensor_parallel_size=2, max_num_batched_tokens=10)


# Whatever a request may ask of the logits, in one batch.
WISHES = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1, "top_k": 40, "top_p": 0.9},
    {"logprobs": 3},
    {"temperature": 0.0, "logprobs": 0, "prompt_logprobs": 2},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"logit_bias": {3: 4.0, 120: -100.0}, "top_k": 10},
    {"allowed_token_ids": [5, 63, 64, 100]},
    {"min_tokens": 5, "stop_token_ids": [7, 90]},
    {"n": 3},
]


def answers(llm: LLM) -> list[dict]:
    params = [SamplingParams(max_tokens=12, seed=i, **wish) for i, wish in enumerate(WISHES)]
    prompts = [random_tokens(3 + 11 * i, seed=i) for i in range(len(params))]
    return llm.generate(prompts, params, use_tqdm=False)


def assert_same(found: list[dict], expected: list[dict]) -> None:
    for output, other in zip(found, expected, strict=True):
        for mine, theirs in zip(output["outputs"], other["outputs"], strict=True):
            assert mine["token_ids"] == theirs["token_ids"]
            assert_same_logprobs(mine["logprobs"], theirs["logprobs"])
        assert_same_logprobs(output["prompt_logprobs"], other["prompt_logprobs"])


def assert_same_logprobs(found: list | None, expected: list | None) -> None:
    assert (found is None) == (expected is None)
    for mine, theirs in zip(found or [], expected or [], strict=True):
        assert (mine is None) == (theirs is None)
        for token_id, entry in (theirs or {}).items():
            assert mine[token_id].rank == entry.rank
            assert mine[token_id].logprob == pytest.approx(entry.logprob, abs=1e-4)


@pytest.mark.parametrize("size", [2, slow(4)])
def test_every_wish_is_answered_as_by_one_rank(tmp_path: Path, size: int):
    path = make_checkpoint(tmp_path / "model", vocab_size=137)  # no multiple of anything
    with build(path, num_kvcache_blocks=200) as llm:
        expected = answers(llm)
    with build(path, num_kvcache_blocks=200, tensor_parallel_size=size) as llm:
        assert_same(answers(llm), expected)
        assert_empty(llm)


def test_random_weights_are_those_of_one_rank(tiny: Path):
    prompts, params = [random_tokens(20)], SamplingParams(max_tokens=8, temperature=0)
    found = []
    for size in (1, 2):
        with build(tiny, load_format="dummy", tensor_parallel_size=size) as llm:
            found.append(llm.generate(prompts, params, use_tqdm=False)[0]["token_ids"])
    assert found[0] == found[1]


def test_blocks_are_computed_for_the_heads_of_a_rank(tiny: Path):
    with build(tiny, num_kvcache_blocks=None, tensor_parallel_size=2) as llm:
        keys, _ = llm.model_runner.kv_cache[0]
        assert keys.shape[2] == 1  # of 2 heads
        assert len(keys) == llm.model_runner.num_kvcache_blocks


@pytest.mark.gpu
@needs_two_gpus
@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graph"])
@pytest.mark.parametrize("way", WAYS)
def test_two_gpus_give_transformers_tokens(tmp_path: Path, way: str, enforce_eager: bool):
    model = Model(tmp_path / "model", "cuda", MODELS["qwen3-bias-gqa2-dim64-sharded"])
    options = WAYS[way] | {"tensor_parallel_size": 2, "enforce_eager": enforce_eager}
    check_all_lengths(model, **options)


@pytest.mark.gpu
@needs_two_gpus
def test_two_gpus_answer_every_wish_as_one(tmp_path: Path):
    path = make_checkpoint(tmp_path / "model", vocab_size=137)
    options = {"num_kvcache_blocks": 200, "device": "cuda", "dtype": "float32"}
    with build(path, **options) as llm:
        expected = answers(llm)
    with build(path, tensor_parallel_size=2, **options) as llm:
        for _ in range(3):  # eager, captured, replayed
            assert_same(answers(llm), expected)


@pytest.mark.gpu
@needs_two_gpus
def test_long_prompts_travel_by_the_copy_engines(tmp_path: Path):
    """Sums of more elements than a slot of peer memory has, in pieces; several steps of them."""
    path = make_checkpoint(
        tmp_path / "model", hidden_size=2048, num_hidden_layers=2, max_position_embeddings=8192
    )
    options = {
        "device": "cuda", "dtype": "float32", "kvcache_block_size": 256, "max_model_len": 8192,
        "num_kvcache_blocks": 100, "max_num_batched_tokens": 5000,
    }  # fmt: skip
    prompts = [random_tokens(length, seed=length) for length in (4500, 3000, 7000, 100)]
    params = SamplingParams(temperature=0, max_tokens=8)
    found = []
    for size in (1, 2):
        with build(path, tensor_parallel_size=size, **options) as llm:
            if size == 2:
                assert llm.model_runner.group.copies is not None
            found.append([o["token_ids"] for o in llm.generate(prompts, params, use_tqdm=False)])
            if size == 2:
                assert llm.model_runner.group.copies._calls > 4
    assert found[0] == found[1]
