"""Greedy in float32 gives transformers' tokens, however the engine gets to them."""

from pathlib import Path

import pytest
import torch

from helpers.cases import in_turns
from helpers.checkpoints import make_checkpoint, random_tokens
from helpers.engines import ORDERS
from helpers.exactness import (
    CROWDS,
    MAX_TOKENS,
    MODELS,
    WAYS,
    Model,
    check_all_lengths,
    check_preemption,
    engine,
)
from nanovllm import LLM, SamplingParams


def model_fixture(device: str):
    @pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS.keys())
    def fixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
        return Model(tmp_path_factory.mktemp("model"), device, request.param)

    return fixture


model = model_fixture("cpu")
gpu_model = model_fixture("cuda")


@in_turns("model, options", MODELS, WAYS, share=4, indirect=["model"])
def test_prompts_of_all_lengths_give_transformers_tokens(model: Model, options: dict):
    check_all_lengths(model, **options)


@in_turns(
    "model, block_size, async_scheduling",
    MODELS, {str(size): size for size in CROWDS}, ORDERS, share=3, indirect=["model"],
)  # fmt: skip
def test_preempted_sequences_give_transformers_tokens(
    model: Model, block_size: int, async_scheduling: bool
):
    chunk = {16: 10, 256: 100, 512: 16384}[block_size]
    check_preemption(
        model, block_size, async_scheduling=async_scheduling, max_num_batched_tokens=chunk
    )


@in_turns("model, async_scheduling", MODELS, ORDERS, share=2, indirect=["model"])
def test_blocks_filled_by_generation_are_shared_correctly(model: Model, async_scheduling: bool):
    """A prompt and its own answer, as in a chat, find the blocks that the answer has filled."""
    with engine(
        model, kvcache_block_size=16, num_kvcache_blocks=100, async_scheduling=async_scheduling
    ) as llm:
        prompt, expected_cached = random_tokens(20, seed=7), 0
        for turn in range(4):
            (output,) = model.check(llm, [prompt])
            assert output["num_cached_tokens"] == expected_cached
            prompt = prompt + output["token_ids"]
            expected_cached = (len(prompt) - 1) // 16 * 16  # the last token was never run
            prompt.append(turn)


@pytest.mark.gpu
@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graph"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("way", WAYS)
def test_gpu_gives_transformers_tokens(
    gpu_model: Model, way: str, backend: str, enforce_eager: bool
):
    assert not torch.backends.cuda.matmul.allow_tf32
    check_all_lengths(
        gpu_model, attention_backend=backend, enforce_eager=enforce_eager, **WAYS[way]
    )


@pytest.mark.gpu
@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graph"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("block_size", CROWDS)
def test_gpu_preempted_sequences_give_transformers_tokens(
    gpu_model: Model, block_size: int, backend: str, enforce_eager: bool
):
    check_preemption(gpu_model, block_size, attention_backend=backend, enforce_eager=enforce_eager)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_flash_attn_is_the_same_eager_and_as_a_graph(tmp_path: Path, head_dim: int):
    """One table width and one batch size, so that both make the very same calls, in bfloat16."""
    pytest.importorskip("flash_attn")
    path = make_checkpoint(tmp_path / "model", head_dim=head_dim)
    prompts = [random_tokens(40 + i, seed=i) for i in range(4)]
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    found = []
    for enforce_eager in (True, False):
        with LLM(
            path, dtype="bfloat16", device="cuda", attention_backend="flash-attn",
            max_model_len=256, num_kvcache_blocks=16, enforce_eager=enforce_eager,
        ) as llm:  # fmt: skip
            for _ in range(2):
                outputs = llm.generate(prompts, params, use_tqdm=False)
                assert [output["finish_reason"] for output in outputs] == ["length"] * 4
                assert [len(output["token_ids"]) for output in outputs] == [MAX_TOKENS] * 4
                found.append([output["token_ids"] for output in outputs])
    assert found[0] == found[1], "eager is not deterministic"
    assert found[2] == found[3], "a graph's replay differs from its capture"
    assert found[0] == found[2], "a graph gives other tokens than eager"
