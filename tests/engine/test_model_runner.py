"""The model runner: which slots a step writes, its graphs, the memory that it takes and leaves."""

import gc
import warnings
import weakref
from pathlib import Path

import pytest
import torch

from bench import dummy_llm
from helpers.checkpoints import Reference, random_tokens
from helpers.engines import BOTH_ORDERS, GREEDY, PROMPTS, build, greedy
from nanovllm import LLM, SamplingParams
from nanovllm.engine import model_runner
from nanovllm.engine.model_runner import load_libraries


@torch.inference_mode()
def fill_cache(llm: LLM, value: float) -> None:
    llm.model_runner.kv_cache.fill_(value)


def changed_slots(llm: LLM, value: float) -> set[int]:
    """Slots whose keys or values, in any layer, are no longer `value`."""
    changed = (llm.model_runner.kv_cache != value).any(dim=-1).any(dim=-1)  # kinds, layers, slots
    changed = changed.flatten(2)
    assert (changed == changed[:1, :1]).all(), "keys, values and layers are written at other slots"
    return set(changed[0, 0].nonzero().flatten().tolist())


# Slots


@BOTH_ORDERS
def test_exactly_the_slots_of_all_tokens_but_the_last_are_written(
    tiny: Path, async_scheduling: bool
):
    """A sequence of n tokens writes n - 1 slots: nobody has to run its last token."""
    with build(tiny, async_scheduling=async_scheduling) as llm:
        fill_cache(llm, 7.0)
        lengths = [1, 5, 16, 40]
        greedy(llm, [random_tokens(length, seed=length) for length in lengths])
        assert len(changed_slots(llm, 7.0)) == sum(lengths) + 4 * (GREEDY.max_tokens - 1)


@torch.inference_mode()
def test_running_padding_rows_changes_no_other_slot_and_no_token(
    tiny: Path, tiny_reference: Reference
):
    with build(tiny) as llm:
        runner = llm.model_runner
        prompts = [random_tokens(length, seed=length) for length in (5, 6, 7)]
        fill_cache(llm, 7.0)
        for prompt in prompts:
            llm.add_request(prompt, GREEDY)
        llm.step()
        batch = llm.scheduler.schedule()
        before = runner.kv_cache.clone()
        shape = runner.inputs.send(batch, 8, {}, for_graph=False)
        inputs = runner.inputs.view(shape)
        runner._run(shape)
        slots = (runner.kv_cache != before).flatten(2, 3).flatten(3).any(dim=-1).any(dim=0)
        written = set(slots.any(dim=0).nonzero().flatten().tolist())
        assert written <= set(inputs.slot_mapping[:3].tolist())
        second = [tiny_reference.tokens(prompt, 2)[1] for prompt in prompts]
        assert runner.sampled[:3].tolist() == second


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [3, 5, 9])
def test_padding_rows_of_a_graph_write_nowhere(tiny: Path, rows: int):
    """Rows that a graph does not have a size for, so that it is padded; slots are counted."""
    with build(tiny, device="cuda", attention_backend="triton", num_kvcache_blocks=100) as llm:
        for turn in range(2):  # capture, then replay from the first step on
            fill_cache(llm, 7.0)
            prompts = [random_tokens(5 + i, seed=20 * turn + i) for i in range(rows)]
            greedy(llm, prompts)
            expected = sum(map(len, prompts)) + rows * (GREEDY.max_tokens - 1)
            assert len(changed_slots(llm, 7.0)) == expected
        assert llm.model_runner.graphs


def test_steps_in_a_row_use_different_host_memory(llm: LLM):
    """The device may still be reading the inputs of the step before."""
    turns = []
    launch = llm.model_runner.launch

    def spy(batch):
        result = launch(batch)
        turns.append(llm.model_runner.inputs.turn)
        return result

    llm.model_runner.launch = spy
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert turns == [turns[0] ^ (i & 1) for i in range(len(turns))]


# Graphs


@pytest.mark.parametrize("max_num_seqs", [1, 3, 8, 9, 40])
def test_every_batch_has_a_graph_size_that_holds_it(tiny: Path, max_num_seqs: int):
    with build(tiny, max_num_seqs=max_num_seqs) as llm:
        sizes = [llm.model_runner._graph_size(rows) for rows in range(1, max_num_seqs + 1)]
        for rows, size in enumerate(sizes, start=1):
            assert rows <= size <= max_num_seqs
        assert sizes == sorted(sizes)
        assert sizes[-1] == max_num_seqs


@pytest.mark.gpu
@pytest.mark.parametrize("max_num_seqs", [7, 21, 40])
def test_batch_sizes_between_graph_sizes_give_the_same_tokens(tiny: Path, max_num_seqs: int):
    """The batch shrinks by one at a time, through every size, as the requests end."""
    reference = Reference(tiny, "cuda")
    prompts = [random_tokens(3 + i % 5, seed=i) for i in range(max_num_seqs)]
    params = [SamplingParams(temperature=0, max_tokens=2 + i) for i in range(max_num_seqs)]
    expected = [
        reference.tokens(prompt, param.max_tokens) for prompt, param in zip(prompts, params)
    ]
    with build(
        tiny, device="cuda", attention_backend="triton", max_num_seqs=max_num_seqs,
        num_kvcache_blocks=200,
    ) as llm:  # fmt: skip
        assert greedy(llm, prompts, params) == expected  # captures
        assert greedy(llm, prompts[::-1], params[::-1]) == expected[::-1]  # replays


@pytest.mark.gpu
def test_graphs_of_all_sizes_share_their_memory():
    changes = {"num_hidden_layers": 2}
    with dummy_llm("qwen3-0.6b", changes, num_kvcache_blocks=8, max_num_seqs=256) as llm:
        runner = llm.model_runner
        before = torch.cuda.memory_reserved()
        with torch.inference_mode():
            for rows in (1, 2, 4, 8, *range(16, 256, 16)):
                shape = runner.inputs.decode_shape(rows)
                runner._run(shape)
                runner._capture(shape)
        assert torch.cuda.memory_reserved() - before < 2**27


# What it takes, and what it leaves


def test_size_of_the_cache_is_computed_where_it_is_not_given(tiny: Path):
    with LLM(tiny, device="cpu", max_num_seqs=4, max_model_len=300) as llm:
        assert llm.model_runner.num_kvcache_blocks == 4 * 2  # all that four sequences could use
        assert len(llm.generate([1, 2], GREEDY, use_tqdm=False)[0]["token_ids"]) == 12


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_and_repeats(tiny: Path, dtype: str):
    with build(tiny, dtype=dtype) as llm:
        first, second = (llm.generate(PROMPTS, GREEDY, use_tqdm=False) for _ in range(2))
        assert llm.model_runner.kv_cache.dtype == getattr(torch, dtype)
        assert [len(output["token_ids"]) for output in first] == [12] * 4
        assert [output["finish_reason"] for output in second] == ["length"] * 4


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16", "float32"])
def test_torch_is_left_as_it_was(tiny: Path, dtype: str):
    def settings() -> tuple:
        return (
            torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(),
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
            torch.backends.cuda.matmul.allow_tf32, torch.get_rng_state().tolist(),
        )  # fmt: skip

    before = settings()
    with build(tiny, dtype=dtype) as llm:
        assert settings() == before
        llm.generate([1, 2, 3], SamplingParams(max_tokens=4), use_tqdm=False)
        assert settings() == before


def test_another_default_device_does_no_harm(tiny: Path, tiny_reference: Reference):
    torch.set_default_device("meta")
    try:
        with build(tiny) as llm:
            (output,) = llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    finally:
        torch.set_default_device(None)
    assert output["token_ids"] == tiny_reference.tokens(PROMPTS[0], 12)


def test_close_gives_the_kv_cache_back(tiny: Path):
    llm = build(tiny)
    llm.generate([1, 2], GREEDY, use_tqdm=False)
    cache = weakref.ref(llm.model_runner.kv_cache)
    model = weakref.ref(llm.model_runner.model)
    llm.close()
    gc.collect()
    assert cache() is None and model() is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_libraries_load(dtype: torch.dtype):
    """Of an error in the thread that does it an engine says nothing."""
    load_libraries(torch.device("cuda"), dtype)


# Of `tiny` in float32: kinds, layers, tokens of a block, KV heads, their size, bytes.
BLOCK_BYTES = 2 * 2 * 16 * 2 * 32 * 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_has_keys_and_values_of_every_layer(tiny: Path, dtype: str):
    with build(
        tiny, kvcache_block_size=32, num_kvcache_blocks=7, max_model_len=64, dtype=dtype
    ) as llm:
        runner = llm.model_runner
        # Of two kinds, two layers, seven blocks of 32 tokens, two KV heads of 32.
        assert runner.kv_cache.shape == (2, 2, 7, 32, 2, 32)
        assert runner.kv_cache.dtype == getattr(torch, dtype)
        assert runner.num_kvcache_blocks == 7


@pytest.mark.parametrize(("blocks_that_fit", "expected"), [(3, 3), (3.9, 3), (1e6, 4 * 40)])
def test_the_cache_takes_a_quarter_of_the_hosts_memory_at_most(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, blocks_that_fit: float, expected: int
):
    available = int(4 * blocks_that_fit * BLOCK_BYTES)
    monkeypatch.setattr(model_runner, "available_host_memory", lambda: available)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that max_model_len is lowered to such a cache
        llm = build(tiny, num_kvcache_blocks=None, max_num_seqs=4)
    with llm:
        assert llm.model_runner.num_kvcache_blocks == expected


def test_without_memory_for_a_block_there_is_no_engine(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model_runner, "available_host_memory", lambda: 4 * BLOCK_BYTES - 1)
    with pytest.raises(RuntimeError, match=r"no memory left for the KV cache: .*num_kvcache_block"):
        build(tiny, num_kvcache_blocks=None)


def test_a_cache_that_does_not_fit_names_the_options_that_made_it_large(tiny: Path):
    with pytest.raises(RuntimeError, match=r"no memory for a KV cache of 2147483647 blocks of 256"):
        build(tiny, kvcache_block_size=256, num_kvcache_blocks=2**31 - 1)


def test_inputs_that_do_not_fit_name_the_options_that_made_them_large(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model_runner, "InputBuffers", fail)
    message = r"max_num_batched_tokens \(4321\) or max_num_seqs \(21\)"
    with pytest.raises(RuntimeError, match=message):
        build(tiny, max_num_batched_tokens=4321, max_num_seqs=21)


# Steps by hand


def test_a_token_that_the_host_has_not_read_is_taken_from_the_step_before(
    llm: LLM, tiny_reference: Reference
):
    """Rows change their places: one prompt ends with its first token."""
    runner, scheduler = llm.model_runner, llm.scheduler
    lengths = (1, 12, 12, 12)
    for prompt, max_tokens in zip(PROMPTS, lengths, strict=True):
        llm.add_request(prompt, SamplingParams(temperature=0, max_tokens=max_tokens))
    first = runner.launch(scheduler.schedule())
    second = runner.launch(batch := scheduler.schedule())
    assert len(batch.seqs) == 3 and not batch.is_prefill
    assert all(seq.num_pending_tokens == 2 for seq in batch.seqs)
    expected = [tiny_reference.tokens(prompt, 2) for prompt in PROMPTS]
    assert runner.collect(first) == [tokens[0] for tokens in expected]
    assert runner.collect(second) == [tokens[1] for tokens in expected[1:]]
