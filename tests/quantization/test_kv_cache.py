"""With a cache in fp8: the tokens of transformers with keys and values rounded in the same way."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from helpers.checkpoints import (
    Reference,
    edit_json,
    link_checkpoint,
    make_checkpoint,
    random_tokens,
)
from helpers.engines import GREEDY, assert_empty, build, greedy
from helpers.paths import DEMO
from nanovllm import LLM, SamplingParams
from nanovllm.layers.attention import Attention
from nanovllm.layers.attention_backends import select_backend
from nanovllm.layers.paged_attention import in_fp8
from nanovllm.models import CausalLM, find_model_class
from nanovllm.parallel.sharding import shard
from nanovllm.quantization.kv_cache import (
    allocate_kv_scales,
    give_kv_scales,
    read_kv_scales,
    set_kv_scales,
    take_kv_scales,
)
from nanovllm.utils.checkpoint_files import read_headers

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
    return expected_with(path, scales)


def expected_with(path: Path, scales: list[torch.Tensor]) -> list[list[int]]:
    """transformers' tokens with scales [2, num_kv_heads] of each layer."""
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


# Scales from the checkpoint


LAYER = "model.layers.1.self_attn"
SCALES = torch.tensor([[0.037, 0.5, 0.01, 3.0], [0.25, 0.11, 1.0, 0.02]])
KEYS, VALUES = SCALES


def network(rank: int = 0, size: int = 1) -> CausalLM:
    """With 4 key-value heads, and a cache in fp8."""
    content = {
        "model_type": "qwen2", "vocab_size": 128, "hidden_size": 32, "intermediate_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
    }  # fmt: skip
    model_class = find_model_class(content)
    model = model_class(model_class.config_class.from_json(content)).requires_grad_(False)
    if size > 1:
        shard(model, SimpleNamespace(rank=rank, size=size))
    for parameter in model.requires_grad_(False).parameters():
        parameter.normal_(generator=torch.Generator().manual_seed(0))
    allocate_kv_scales(model, torch.device("cpu"))
    set_kv_scales(model)
    return model


def scales_of(model: CausalLM) -> list[torch.Tensor]:
    return [layer.self_attn.kv_scales.clone() for layer in model.model.layers]


def loaded(folder: Path, tensors: dict[str, torch.Tensor], *part: int) -> list[torch.Tensor]:
    """The scales of a model, or of a rank's part of it, by a file with these tensors."""
    model = network(*part)
    save_file(tensors, folder / "model.safetensors")
    give_kv_scales(read_kv_scales(model, read_headers(folder)))
    set_kv_scales(model)
    return scales_of(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "form", ["{}_scale", "attn.{}_scale", "{0}_proj.{0}_scale", "{}_proj.output_scale"]
)
def test_every_name_and_shape_of_a_scale_is_read(tmp_path: Path, form: str, dtype: torch.dtype):
    k, v = (f"{LAYER}.{form.format(name)}" for name in "kv")
    derived = scales_of(network())
    keys, values = KEYS.to(dtype).float(), VALUES.to(dtype).float()
    for shape in ((4,), (4, 1, 1), (1, 4)):
        tensors = {k: KEYS.view(shape).to(dtype), v: VALUES.view(shape).to(dtype)}
        first, second = loaded(tmp_path, tensors)
        assert torch.equal(second, torch.stack((keys, values)))
        assert torch.equal(first, derived[0]), "this layer has none"
    for shape in ((), (1,), (1, 1, 1)):
        _, second = loaded(tmp_path, {v: VALUES[1].view(shape).to(dtype)})
        assert torch.equal(second[1], values[1].expand(4))
        assert torch.equal(second[0], derived[1][0]), "the keys have none"
    if form == "{}_scale":
        found = loaded(tmp_path, {"layers.1.self_attn.kv_scale": VALUES[1].to(dtype)})
        assert torch.equal(found[1], values[1].expand(2, 4)), "without model., and of both"


def test_scales_are_in_float32_whatever_the_callers_default(tmp_path: Path):
    torch.set_default_dtype(torch.bfloat16)
    try:
        after = loaded(tmp_path, {f"{LAYER}.k_scale": KEYS.clone()})
        assert after[1].dtype == torch.float32 and torch.equal(after[1][0], KEYS)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_rank_has_the_scales_of_its_heads(tmp_path: Path, size: int):
    names = (f"{LAYER}.k_scale", f"{LAYER}.v_proj.v_scale")
    for rank in range(size):
        first, second = loaded(tmp_path, dict(zip(names, SCALES, strict=True)), rank, size)
        heads = SCALES.repeat_interleave(max(1, size // 4), dim=1).chunk(size, dim=1)
        assert torch.equal(second, heads[rank])
        assert first.shape == second.shape


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.tensor([0.5, 0.5, 0.0, 0.5]), "has 0.0: .* must be positive"),
        (torch.tensor(-1.0), "has -1.0"), (torch.tensor([float("inf")]), "has inf"),
        (torch.tensor([float("nan")]), "has nan"), (torch.tensor(1e-60).double(), "has 0.0"),
        (torch.ones(8), r"has shape \[8\] .* one for each of 4 key-value heads"),
        (torch.ones(0), r"has shape \[0\]"), (torch.ones(4).int(), "has .* torch.int32"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_scale_is_refused_by_name(tmp_path: Path, tensor: torch.Tensor, message: str):
    name = f"{LAYER}.v_scale"
    with pytest.raises(ValueError, match=f"'{name}' {message}"):
        loaded(tmp_path, {name: tensor})
    model = network()
    before = scales_of(model)
    with pytest.raises(ValueError, match=f"'{name}' {message}"):
        list(take_kv_scales(model, {name: tensor}))
    set_kv_scales(model)
    assert all(map(torch.equal, scales_of(model), before))


def test_a_scale_that_is_there_twice_is_refused(tmp_path: Path):
    tensors = {f"{LAYER}.k_scale": KEYS.clone(), f"{LAYER}.kv_scale": torch.ones(1)}
    with pytest.raises(ValueError, match=r"_scale' in .* is also there as .*_scale' in"):
        loaded(tmp_path, tensors)


def with_scales(tiny: Path, target: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A copy with scales of its first layer's keys and its second layer's values; both of them."""
    scales = {
        "model.layers.0.self_attn.k_proj.k_scale": torch.tensor([0.037, 0.011]),
        "model.layers.1.self_attn.v_scale": torch.tensor(0.029),
    }
    of_queries = {"model.layers.0.self_attn.q_scale": torch.ones(4)}  # which are not in the cache
    copy, weights = link_checkpoint(tiny, target), load_file(tiny / "model.safetensors")
    (copy / "model.safetensors").unlink()
    save_file(weights | scales | of_queries, copy / "model.safetensors", metadata={"format": "pt"})
    return copy, scales


def test_a_checkpoints_scales_give_transformers_tokens(tiny: Path, tmp_path: Path):
    path, tensors = with_scales(tiny, tmp_path / "model")
    with build(tiny, kv_cache_dtype="fp8") as llm:
        derived = [attention.kv_scales.clone() for attention in attentions(llm)]
        by_weights = greedy(llm, PROMPTS)
        scales = [own.clone() for own in derived]
        scales[0][0], scales[1][1] = tensors.values()
        expected = expected_with(tiny, scales)
        assert expected != by_weights, "the test does not test what it says"

        llm.update_weights(tensors)
        assert greedy(llm, PROMPTS) == expected
        llm.update_weights(load_file(tiny / "model.safetensors"))
        assert greedy(llm, PROMPTS) == expected, "scales that do not come stay"
        llm.load_weights(tiny)
        assert greedy(llm, PROMPTS) == by_weights, "of another checkpoint none is left"
        llm.load_weights(path)
        assert greedy(llm, PROMPTS) == expected
        llm.update_weights([("model.layers.1.self_attn.attn.v_scale", torch.tensor(0.5))])
        assert (attentions(llm)[1].kv_scales[1] == 0.5).all()
        assert torch.equal(attentions(llm)[0].kv_scales, scales[0])
    # As tools write it that quantise the cache alone.
    of_cache = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}}
    of_cache["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    edit_json(path / "config.json", quantization_config=of_cache)
    with build(path, kv_cache_dtype="fp8", max_num_batched_tokens=16) as llm:
        assert greedy(llm, PROMPTS) == expected


def test_a_cache_in_the_models_dtype_has_no_use_for_them(
    tiny: Path, tiny_reference: Reference, tmp_path: Path
):
    path, tensors = with_scales(tiny, tmp_path / "model")
    with build(path) as llm:
        llm.update_weights(tensors)
        llm.load_weights(path)
        tokens = tiny_reference.tokens(PROMPTS[0], GREEDY.max_tokens)
        assert greedy(llm, PROMPTS[:1]) == [tokens]


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
