"""With a cache in fp8: the tokens of transformers with keys and values rounded in the same way."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import DynamicCache

from helpers.checkpoints import Reference, make_checkpoint, random_tokens
from helpers.engines import GREEDY, assert_empty, build, greedy
from helpers.paths import DEMO
from nanovllm import LLM, SamplingParams
from nanovllm.layers.attention import Attention
from nanovllm.layers.attention_backends import select_backend
from nanovllm.layers.paged_attention import in_fp8

PROMPTS = [random_tokens(length, seed=length) for length in (12, 13, 14, 15, 40)]
# transformers renames it.
CACHE = "past_key_values" if transformers.__version__ < "5.20" else "cache"
FAMILIES: dict[str, dict[str, Any]] = {"qwen3": {}, "qwen2": {}, "llama": {"attention_bias": True}}


def attentions(llm: LLM) -> list[Attention]:
    return [m for m in llm.model_runner.model.modules() if isinstance(m, Attention)]


class RoundedCache(DynamicCache):
    """Keys and values as they come back from fp8."""

    def __init__(self, scales: list[torch.Tensor]) -> None:
        super().__init__()
        self.scales = scales

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        pair = zip((key_states, value_states), self.scales[layer_idx], strict=True)
        keys, values = (rounded(states, scales) for states, scales in pair)
        return super().update(keys, values, layer_idx, *args, **kwargs)


def rounded(states: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[1, heads, tokens, head_dim]."""
    return (
        in_fp8(states[0].transpose(0, 1), scales).float().transpose(0, 1)[None]
        * scales[:, None, None]
    )


@pytest.fixture(scope="module", params=FAMILIES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    return make_checkpoint(directory, family=request.param, **FAMILIES[request.param])


@pytest.fixture(scope="module")
def expected(path: Path) -> list[list[int]]:
    with build(path, kv_cache_dtype="fp8") as llm:
        scales = [attention.kv_scales.clone() for attention in attentions(llm)]
    model = Reference(path).model
    found = []
    for prompt in PROMPTS:
        output = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False,
            max_new_tokens=GREEDY.max_tokens, eos_token_id=None, pad_token_id=0,
            **{CACHE: RoundedCache(scales)},
        )  # fmt: skip
        found.append(output[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize(
    "options",
    [
        {}, {"num_kvcache_blocks": 7, "max_model_len": 64, "async_scheduling": True},
        {"max_num_batched_tokens": 16}, {"kvcache_block_size": 64, "max_num_seqs": 1},
    ],
    ids=["roomy", "preempted", "chunked", "alone"],
)  # fmt: skip
def test_greedy_gives_transformers_tokens(
    path: Path, expected: list[list[int]], options: dict[str, Any]
) -> None:
    with build(path, kv_cache_dtype="fp8_e4m3", **options) as llm:
        assert llm.model_runner.kv_cache[0][0].dtype == torch.float8_e4m3fn
        for _ in range(2):  # the second time from the prefix cache
            assert greedy(llm, PROMPTS) == expected
        if "max_model_len" in options:
            assert llm.scheduler.num_preemptions
        assert_empty(llm)


def test_two_ranks_give_the_tokens_of_one(path: Path, expected: list[list[int]]) -> None:
    with build(path, kv_cache_dtype="fp8", tensor_parallel_size=2) as llm:
        assert greedy(llm, PROMPTS) == expected


@pytest.fixture
def demo() -> Iterator[LLM]:
    with build(DEMO, kv_cache_dtype="fp8") as llm:
        yield llm


def test_scales_bring_what_is_stored_to_where_fp8_is_precise(demo: LLM) -> None:
    """Trained weights: what was estimated without data holds."""
    demo.generate("What is 12 + 30? " * 8, SamplingParams(max_tokens=40), use_tqdm=False)
    blocks = [block.block_id for block in demo.scheduler.block_manager.blocks if block.token_ids]
    for keys, values in demo.model_runner.kv_cache:
        for cache in (keys, values):
            stored = cache.view(torch.uint8)[blocks].view(torch.float8_e4m3fn).float()
            sizes = stored.square().mean(dim=(0, 1, 3)).sqrt()
            assert ((sizes > 1) & (sizes < 64)).all() and stored.abs().max() < 448


def test_scales_follow_weights_that_change(demo: LLM) -> None:
    before = [attention.kv_scales.clone() for attention in attentions(demo)]
    name = "model.layers.1.self_attn.v_proj.weight"
    with safe_open(Path(DEMO) / "model.safetensors", "pt") as file:
        weight = file.get_tensor(name)
    demo.update_weights({name: 4 * weight})
    after = [attention.kv_scales for attention in attentions(demo)]
    assert torch.equal(after[0], before[0]) and torch.equal(after[1][0], before[1][0])
    assert torch.equal(after[1][1], 4 * before[1][1])


def test_blocks_are_half_as_large(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanovllm.engine.kv_cache.available_host_memory", lambda: 2**20)
    options = {"num_kvcache_blocks": None, "dtype": "bfloat16", "max_model_len": 512}
    with build(tiny, **options) as llm:
        number = llm.model_runner.num_kvcache_blocks
    with build(tiny, **options, kv_cache_dtype="fp8") as llm:
        assert llm.model_runner.num_kvcache_blocks == 2 * number


def test_backends_without_it_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, bf16 = torch.device("cuda"), torch.bfloat16
    module = "nanovllm.layers.attention_backends"
    monkeypatch.setattr(f"{module}.flash_attn_with_kvcache", object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    for name, reason in (("flash-attn", "reads no cache"), ("triton", "capability 8.9")):
        with pytest.raises(ValueError, match=reason):
            select_backend(name, gpu, bf16, 128, 256, fp8_cache=True)
    assert select_backend("auto", gpu, bf16, 128, 256, fp8_cache=True) == "torch"


def test_another_dtype_is_refused(tiny: Path) -> None:
    with pytest.raises(ValueError, match="kv_cache_dtype must be one of 'auto', 'fp8', got 'int8'"):
        build(tiny, kv_cache_dtype="int8")
