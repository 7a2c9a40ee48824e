"""Faults that engines of this kind are known to have had, each by its name."""

import warnings
from pathlib import Path

import pytest
import torch

from bench import dummy_llm
from helpers.checkpoints import (
    VOCAB_SIZE,
    Reference,
    add_tokenizer,
    edit_json,
    make_checkpoint,
    random_tokens,
)
from helpers.scheduling import Driver
from nanovllm import LLM, SamplingParams
from nanovllm.engine.scheduler import Batch
from nanovllm.engine.sequence import SequenceStatus
from nanovllm.engine.step_inputs import StepInputs, StepShape

GREEDY = SamplingParams(temperature=0, max_tokens=20)
BLOCK = 16


def build(path: Path, **options) -> LLM:
    settings = {"kvcache_block_size": BLOCK, "num_kvcache_blocks": 60, "device": "cpu"}
    return LLM(path, **settings | options)


def greedy(llm: LLM, prompts: list, params=GREEDY) -> list[list[int]]:
    return [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]


def prefilled(llm: LLM, lengths: list[int]) -> None:
    """Requests of some lengths, each after its prefill: the next batch is a decode batch."""
    for length in lengths:
        llm.add_request(random_tokens(length, seed=length), GREEDY)
    llm.step()


@torch.inference_mode()
def fill_cache(llm: LLM, value: float) -> None:
    llm.model_runner.kv_cache.fill_(value)


def changed_slots(llm: LLM, value: float) -> set[int]:
    """Slots whose keys or values, in any layer, are no longer `value`."""
    changed = (llm.model_runner.kv_cache != value).any(dim=-1).any(dim=-1)  # kinds, layers, slots
    changed = changed.flatten(2)
    assert (changed == changed[:1, :1]).all(), "keys, values and layers are written at other slots"
    return set(changed[0, 0].nonzero().flatten().tolist())


def send(llm: LLM, batch: Batch, padded_rows: int) -> tuple[StepShape, StepInputs]:
    """The inputs of a step as the device gets them."""
    inputs = llm.model_runner.inputs
    shape = inputs.send(batch, padded_rows, {}, for_graph=False)
    return shape, inputs.view(shape)


# The decode position and slot off by one


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1])
@torch.inference_mode()
def test_decode_runs_the_newest_token_at_its_own_position_and_slot(tiny: Path, length: int):
    with build(tiny) as llm:
        prefilled(llm, [length])
        batch = llm.scheduler.schedule()
        (seq,) = batch.seqs
        shape, inputs = send(llm, batch, padded_rows=1)
        assert seq.token_ids[length:] == [inputs.input_ids.item()]
        assert inputs.positions.tolist() == [length]
        block_id = seq.block_table[length // BLOCK]
        assert inputs.slot_mapping.tolist() == [block_id * BLOCK + length % BLOCK]
        assert inputs.context_lens.tolist() == [length + 1]
        assert (shape.max_seqlen_q, shape.max_context_len) == (1, length + 1)


@torch.inference_mode()
def test_prefill_rows_have_their_own_positions_slots_and_bounds(tiny: Path):
    with build(tiny, max_num_batched_tokens=40) as llm:
        llm.add_request(random_tokens(20, seed=1), GREEDY)
        llm.add_request(random_tokens(50, seed=2), GREEDY)
        for expected in ([(0, 20), (0, 20)], [(20, 50)]):
            batch = llm.scheduler.schedule()
            shape, inputs = send(llm, batch, len(batch.seqs))
            positions = [p for start, end in expected for p in range(start, end)]
            slots = [
                seq.block_table[p // BLOCK] * BLOCK + p % BLOCK
                for seq, (start, end) in zip(batch.seqs, expected, strict=True)
                for p in range(start, end)
            ]
            assert inputs.positions.tolist() == positions
            assert inputs.slot_mapping.tolist() == slots
            assert inputs.context_lens.tolist() == [end for _, end in expected]
            lengths = [end - start for start, end in expected]
            assert inputs.cu_seqlens_q.diff().tolist() == lengths
            assert shape.max_seqlen_q == max(lengths)
            assert shape.max_context_len == max(end for _, end in expected)


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_exactly_the_slots_of_all_tokens_but_the_last_are_written(
    tiny: Path, async_scheduling: bool
):
    """A sequence of n tokens writes n - 1 slots: nobody has to run its last token."""
    with build(tiny, async_scheduling=async_scheduling) as llm:
        fill_cache(llm, 7.0)
        lengths = [1, 5, BLOCK, 40]
        greedy(llm, [random_tokens(length, seed=length) for length in lengths])
        assert len(changed_slots(llm, 7.0)) == sum(lengths) + 4 * (GREEDY.max_tokens - 1)


# The graph's padding rows writing into block 0


@torch.inference_mode()
def test_padding_rows_point_at_no_slot_and_no_context(tiny: Path):
    with build(tiny) as llm:
        prefilled(llm, [5, 6, 7, 8, 9, 10, 11, 12])
        runner = llm.model_runner
        batch = llm.scheduler.schedule()
        for host in runner.inputs.hosts:  # what a larger batch may have left
            host.fill_(3)
        _, inputs = send(llm, batch, padded_rows=16)
        assert (inputs.slot_mapping[:8] >= 0).all()
        assert (inputs.slot_mapping[8:] == -1).all()
        assert (inputs.context_lens[8:] == 0).all()
        assert (inputs.positions[8:] == 0).all()
        assert (inputs.temperatures[8:] == 0).all()
        assert ((inputs.input_ids[8:] >= 0) & (inputs.input_ids[8:] < VOCAB_SIZE)).all()


@torch.inference_mode()
def test_running_padding_rows_changes_no_other_slot_and_no_token(
    tiny: Path, tiny_reference: Reference
):
    with build(tiny) as llm:
        runner = llm.model_runner
        prompts = [random_tokens(length, seed=length) for length in (5, 6, 7)]
        fill_cache(llm, 7.0)
        prefilled(llm, [5, 6, 7])
        batch = llm.scheduler.schedule()
        before = runner.kv_cache.clone()
        shape, inputs = send(llm, batch, padded_rows=8)
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


# Graphs of growing batches, each with memory of its own


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


# A prompt that is wholly in the cache leaving no token to run


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("length", [BLOCK, 2 * BLOCK, 2 * BLOCK + 1])
def test_prompt_wholly_in_the_cache_still_runs_a_token(
    tiny: Path, tiny_reference: Reference, length: int, async_scheduling: bool
):
    prompt = random_tokens(length, seed=5)
    with build(tiny, async_scheduling=async_scheduling) as llm:
        greedy(llm, [random_tokens(3 * BLOCK, seed=5)])  # the prompt and more
        (output,) = llm.generate(prompt, GREEDY, use_tqdm=False)
        assert output["token_ids"] == tiny_reference.tokens(prompt, 20)
        assert output["num_cached_tokens"] == (length - 1) // BLOCK * BLOCK


# A stale hash pointing at a reused block


def test_reused_block_is_not_found_under_its_old_hash(tiny: Path, tiny_reference: Reference):
    """The cache is overwritten whole; then the first prompt comes again."""
    first, second = random_tokens(3 * BLOCK, seed=1), random_tokens(3 * BLOCK, seed=2)
    with build(tiny, num_kvcache_blocks=5, max_model_len=5 * BLOCK) as llm:
        for prompt in (first, second, first, second):
            (output,) = llm.generate(prompt, GREEDY, use_tqdm=False)
            assert output["token_ids"] == tiny_reference.tokens(prompt, 20)
            assert output["num_cached_tokens"] == 0


def test_half_reused_prefix_is_found_up_to_the_first_lost_block(
    tiny: Path, tiny_reference: Reference
):
    first, second = random_tokens(3 * BLOCK + 1, seed=1), random_tokens(4, seed=2)
    with build(tiny, num_kvcache_blocks=6, max_model_len=6 * BLOCK) as llm:
        # Of 6 blocks the first prompt fills 3 and its answer 1; the second needs 2 + 1.
        for prompt in (first, second, random_tokens(BLOCK, seed=3), first):
            (output,) = llm.generate(prompt, GREEDY, use_tqdm=False)
            assert output["token_ids"] == tiny_reference.tokens(prompt, 20)
        assert 0 < output["num_cached_tokens"] < 3 * BLOCK


# A preempted sequence that finds its own blocks again


@pytest.mark.parametrize("depth", [0, 1], ids=["sync", "async"])
def test_preempted_sequence_finds_its_own_blocks_again(depth: int):
    """It is not computed from the start, and not from blocks that others have taken since."""
    driver = Driver(num_blocks=6, block_size=2, max_num_seqs=2, budget=64)
    old = driver.add([0, 0, 1], 4, True, 0)
    new = driver.add([1, 1, 0, 1, 0], 6, True, 1)
    resumed_at = None
    while driver.scheduler.num_unfinished or driver.in_flight:
        was_waiting = new.status is SequenceStatus.WAITING and driver.scheduler.num_preemptions
        if driver.waits or len(driver.in_flight) > depth or not driver.scheduler.num_unfinished:
            driver.collect()
        else:
            batch = driver.schedule()
            if was_waiting and batch is not None and new in batch.seqs:
                resumed_at = batch.starts[batch.seqs.index(new)]
        driver.check_invariants()
    driver.check_end()
    assert old.is_finished and driver.scheduler.num_preemptions == 1
    assert resumed_at >= 4, "its full blocks were still there"


# Two equal prompts admitted in one step


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_two_equal_prompts_in_one_step_share_their_full_blocks(
    tiny: Path, tiny_reference: Reference, async_scheduling: bool
):
    prompt = random_tokens(2 * BLOCK + 3, seed=4)
    with build(tiny, async_scheduling=async_scheduling) as llm:
        for _ in range(2):
            llm.add_request(prompt, GREEDY)
        first, second = llm.scheduler.waiting
        outputs = llm.step()
        assert first.block_table[:2] == second.block_table[:2]
        assert first.block_table[2] != second.block_table[2]
        blocks = llm.scheduler.block_manager.blocks
        assert [blocks[i].ref_count for i in first.block_table] == [2, 2, 1]
        while not llm.is_finished():
            outputs += llm.step()
        assert [output["num_cached_tokens"] for output in outputs] == [0, 2 * BLOCK]
        for output in outputs:
            assert output["token_ids"] == tiny_reference.tokens(prompt, 20)


def test_equal_prompts_of_exactly_full_blocks_do_not_share_the_last(
    tiny: Path, tiny_reference: Reference
):
    prompt = random_tokens(2 * BLOCK, seed=4)
    with build(tiny) as llm:
        outputs = llm.generate([prompt] * 3, GREEDY, use_tqdm=False)
        assert [output["num_cached_tokens"] for output in outputs] == [0, BLOCK, BLOCK]
        for output in outputs:
            assert output["token_ids"] == tiny_reference.tokens(prompt, 20)


# Batch sizes between graph sizes


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


# A prompt as long as max_model_len


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_prompt_one_short_of_max_model_len_gets_one_token(
    tiny: Path, tiny_reference: Reference, async_scheduling: bool
):
    prompt = random_tokens(63, seed=6)
    with build(tiny, max_model_len=64, async_scheduling=async_scheduling) as llm:
        (output,) = llm.generate(prompt, GREEDY, use_tqdm=False)
        assert output["token_ids"] == tiny_reference.tokens(prompt, 1)
        assert output["finish_reason"] == "length"


def test_prompt_as_long_as_max_model_len_is_refused(tiny: Path):
    with build(tiny, max_model_len=64) as llm:
        with pytest.raises(ValueError, match="has 64 tokens, and at most 63 fit"):
            llm.generate(random_tokens(64), GREEDY, use_tqdm=False)
        assert len(greedy(llm, [random_tokens(63)])[0]) == 1


def test_output_stops_at_max_model_len(tiny: Path, tiny_reference: Reference):
    prompt = random_tokens(50, seed=6)
    with build(tiny, max_model_len=64) as llm:
        (output,) = llm.generate(prompt, GREEDY, use_tqdm=False)
        assert output["token_ids"] == tiny_reference.tokens(prompt, 20)[:14]
        assert output["finish_reason"] == "length"


# One request larger than the whole cache


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_request_that_outgrows_the_whole_cache_ends_by_length(
    tiny: Path, tiny_reference: Reference, async_scheduling: bool
):
    with pytest.warns(UserWarning, match="max_model_len lowered from 640 to 32"):
        llm = build(tiny, num_kvcache_blocks=2, async_scheduling=async_scheduling)
    with llm:
        prompts = [random_tokens(length, seed=length) for length in (20, 31, 3)]
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert [len(output["token_ids"]) for output in outputs] == [12, 1, 20]
        for prompt, output in zip(prompts, outputs):
            expected = tiny_reference.tokens(prompt, len(output["token_ids"]))
            assert output["token_ids"] == expected
            assert output["finish_reason"] == "length"


def test_prompt_larger_than_the_whole_cache_is_refused(tiny: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        llm = build(tiny, num_kvcache_blocks=2)
    with llm:
        with pytest.raises(ValueError, match=r"has 32 tokens.*num_kvcache_blocks"):
            llm.generate(random_tokens(32), GREEDY, use_tqdm=False)
        assert len(greedy(llm, [random_tokens(31)])[0]) == 1


# Several EOS ids


def stop_prompt(reference: Reference) -> tuple[list[int], list[int]]:
    """A prompt whose first eight greedy tokens all differ, and these."""
    for seed in range(100):
        prompt = random_tokens(12, seed=seed)
        tokens = reference.tokens(prompt, 20)
        if len(set(tokens[:8])) == 8:
            return prompt, tokens
    raise AssertionError("no prompt serves")


def unused(tokens: list[int], count: int) -> list[int]:
    return [i for i in range(VOCAB_SIZE) if i not in tokens][:count]


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("source", ["config", "generation_config", "tokenizer", "all"])
def test_any_of_several_eos_ids_ends_a_sequence(
    tiny_copy: Path, tiny_reference: Reference, source: str, async_scheduling: bool
):
    prompt, tokens = stop_prompt(tiny_reference)
    a, b, c = unused(tokens, 3)
    generation_config = tiny_copy / "generation_config.json"
    generation_config.unlink(missing_ok=True)
    if source == "config":
        edit_json(tiny_copy / "config.json", eos_token_id=tokens[3])
        ends = [3]
    elif source == "generation_config":
        edit_json(tiny_copy / "config.json", eos_token_id=a)
        edit_json(generation_config, eos_token_id=[b, tokens[5], tokens[4]])
        ends = [4]
    elif source == "tokenizer":
        edit_json(generation_config, eos_token_id=[a, b])
        add_tokenizer(tiny_copy, eos_token=f"t{tokens[6]}")
        ends = [6]
    else:
        edit_json(generation_config, eos_token_id=[c, tokens[5]])
        add_tokenizer(tiny_copy, eos_token=f"t{tokens[6]}")
        ends = [5, 6]
    with build(tiny_copy, async_scheduling=async_scheduling) as llm:
        outputs = llm.generate(
            [prompt, prompt + tokens[: ends[0] + 1], prompt],
            [GREEDY, GREEDY, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)],
            use_tqdm=False,
        )
    assert outputs[0]["token_ids"] == tokens[: ends[0] + 1], "the EOS is the last of its tokens"
    assert outputs[0]["finish_reason"] == "stop"
    if len(ends) > 1:
        assert outputs[1]["token_ids"] == tokens[ends[0] + 1 : ends[1] + 1]
        assert outputs[1]["finish_reason"] == "stop"
    assert outputs[2]["token_ids"] == tokens
    assert outputs[2]["finish_reason"] == "length"


def test_generation_config_without_eos_leaves_that_of_config_json(
    tiny_copy: Path, tiny_reference: Reference
):
    prompt, tokens = stop_prompt(tiny_reference)
    edit_json(tiny_copy / "config.json", eos_token_id=[tokens[3]])
    edit_json(tiny_copy / "generation_config.json", remove=("eos_token_id",), top_k=20)
    with build(tiny_copy) as llm:
        assert greedy(llm, [prompt]) == [tokens[:4]]


def test_eos_in_the_prompt_ends_nothing(tiny_copy: Path, tiny_reference: Reference):
    prompt, tokens = stop_prompt(tiny_reference)
    eos = next(token for token in prompt if token not in tokens)
    edit_json(tiny_copy / "generation_config.json", eos_token_id=eos)
    with build(tiny_copy) as llm:
        assert greedy(llm, [prompt]) == [tokens]


# A list of SamplingParams


def test_list_of_sampling_params_goes_one_to_a_prompt(tiny: Path, tiny_reference: Reference):
    prompts = [random_tokens(10, seed=seed) for seed in range(4)]
    params = [
        SamplingParams(temperature=0, max_tokens=3),
        SamplingParams(temperature=1.0, max_tokens=9, seed=1),
        SamplingParams(temperature=0, max_tokens=1),
        SamplingParams(temperature=1e-7, max_tokens=6),  # as good as greedy
    ]
    with build(tiny) as llm:
        found = greedy(llm, prompts, params)
        assert [len(tokens) for tokens in found] == [3, 9, 1, 6]
        for i in (0, 2, 3):
            expected = tiny_reference.tokens(prompts[i], params[i].max_tokens)
            assert found[i] == expected
        assert greedy(llm, prompts[1:2], params[1]) == found[1:2]


# rope_theta moving between transformers 4 and 5


def test_rope_theta_is_found_in_both_forms_of_the_config(tmp_path: Path):
    tables = {}
    for name, theta in (("old", 1e6), ("new", 1e6), ("other", 1e4)):
        path = make_checkpoint(tmp_path / name)
        old = {"rope_theta": theta, "rope_scaling": None}
        new = {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
        rope_keys = ("rope_theta", "rope_scaling", "rope_parameters")
        edit_json(path / "config.json", remove=rope_keys, **(new if name == "new" else old))
        with build(path) as llm:
            tables[name] = llm.model_runner.cos_sin.clone()
    assert torch.equal(tables["old"], tables["new"])
    assert not torch.equal(tables["old"], tables["other"])
    exponents = torch.arange(16, dtype=torch.float64) / 16
    angles = torch.arange(640, dtype=torch.float64)[:, None] / 1e6**exponents
    torch.testing.assert_close(
        tables["old"].double(), torch.cat((angles.cos(), angles.sin()), dim=-1), atol=1e-4, rtol=0
    )
