"""The model runner: which slots a step writes, its graphs, the memory that it takes and leaves."""

import gc
import weakref
from pathlib import Path

import pytest
import torch

from helpers.checkpoints import Reference, edit_json, random_tokens
from helpers.engines import BOTH_ORDERS, GREEDY, PROMPTS, build, greedy
from nanovllm import LLM, SamplingParams
from nanovllm.engine import model_runner
from nanovllm.engine.warm_up import load_libraries
from nanovllm.models import CausalLM


def whole_cache(llm: LLM) -> torch.Tensor:
    """A copy: [layers, 2, blocks, block_size, num_kv_heads, head_dim]."""
    return torch.stack([torch.stack(pair) for pair in llm.model_runner.kv_cache])


@torch.inference_mode()
def fill_cache(llm: LLM, value: float) -> None:
    for keys, values in llm.model_runner.kv_cache:
        keys.fill_(value)
        values.fill_(value)


def changed_slots(llm: LLM, value: float) -> set[int]:
    """Slots whose keys or values, in any layer, are no longer `value`."""
    changed = (whole_cache(llm) != value).any(dim=-1).any(dim=-1)  # layers, kinds, slots
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
        before = whole_cache(llm)
        shape, words = runner.inputs.fill(batch, 8, False, {})
        runner.inputs.send(runner.inputs.buffer_index, words)
        inputs = runner.inputs.view(shape)
        runner.run_shape(shape)
        slots = (whole_cache(llm) != before).flatten(2, 3).flatten(3).any(dim=-1).any(dim=0)
        written = set(slots.any(dim=0).nonzero().flatten().tolist())
        assert written <= set(inputs.slot_mapping[:3].tolist())
        second = [tiny_reference.tokens(prompt, 2)[1] for prompt in prompts]
        assert runner.sampler.tokens[:3].tolist() == second


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
        assert llm.model_runner.graphs.graphs


def test_steps_in_a_row_use_different_host_memory(llm: LLM):
    """The device may still be reading the inputs of the step before."""
    indices = []
    launch = llm.model_runner.launch

    def spy(*args):
        result = launch(*args)
        indices.append(llm.model_runner.inputs.buffer_index)
        return result

    llm.model_runner.launch = spy
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert indices == [indices[0] ^ (i & 1) for i in range(len(indices))]


# What it takes, and what it leaves


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_and_repeats(tiny: Path, dtype: str):
    with build(tiny, dtype=dtype) as llm:
        first, second = (llm.generate(PROMPTS, GREEDY, use_tqdm=False) for _ in range(2))
        assert llm.model_runner.kv_cache[0][0].dtype == getattr(torch, dtype)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_callers_autocast_does_not_reach_the_engine(
    tiny: Path, tiny_reference: Reference, dtype: torch.dtype
):
    with torch.autocast("cpu", dtype), build(tiny) as llm:
        (output,) = llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
        assert torch.is_autocast_enabled("cpu")
    assert output["token_ids"] == tiny_reference.tokens(PROMPTS[0], 12)


def test_close_gives_the_kv_cache_back(tiny: Path):
    llm = build(tiny)
    llm.generate([1, 2], GREEDY, use_tqdm=False)
    cache = weakref.ref(llm.model_runner.kv_cache[0][0])
    model = weakref.ref(llm.model_runner.model)
    llm.close()
    gc.collect()
    assert cache() is None and model() is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_libraries_load(dtype: torch.dtype):
    """Of an error in the thread that does it an engine says nothing."""
    load_libraries(torch.device("cuda"), dtype)


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
    first = runner.launch(scheduler.schedule(), lambda: None)
    second = runner.launch(batch := scheduler.schedule(), lambda: None)
    assert len(batch.seqs) == 3 and not batch.is_prefill
    assert all(seq.num_pending_tokens == 2 for seq in batch.seqs)
    expected = [tiny_reference.tokens(prompt, 2) for prompt in PROMPTS]
    assert runner.collect(first) == [tokens[0] for tokens in expected]
    assert runner.collect(second) == [tokens[1] for tokens in expected[1:]]


# Memory for the weights


def test_shapes_are_compared_before_a_byte_is_taken(
    tiny_copy: Path, monkeypatch: pytest.MonkeyPatch
):
    edit_json(tiny_copy / "config.json", intermediate_size=10**8)
    taken = []
    monkeypatch.setattr(CausalLM, "state_dict", lambda model: taken.append(model) or {})
    message = r"shape \[64, 96\], config\.json asks for \[64, 100000000\]"
    with pytest.raises(ValueError, match=message):
        build(tiny_copy)
    assert not taken


def test_weights_without_memory_are_named_with_their_size(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
):
    huge = torch.empty(2**28, 2**28, device="meta")
    monkeypatch.setattr(CausalLM, "state_dict", lambda model: {"huge": huge})
    with pytest.raises(RuntimeError, match=r"no memory for weights of 268435456\.0 GiB on cpu"):
        build(tiny)
