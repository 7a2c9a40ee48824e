"""What a person gets of a finished request: its text, and its times."""

import time
from pathlib import Path

import pytest

from helpers.checkpoints import VOCAB_SIZE, Reference, add_tokenizer, random_tokens
from helpers.engines import BOTH_ORDERS, GREEDY, PROMPTS, build
from nanovllm import LLM, SamplingParams

# Text


def test_text_is_the_decoded_tokens(llm: LLM):
    (output,) = llm.generate("t1 t2 t3", GREEDY, use_tqdm=False)
    assert output["text"] == " ".join(f"t{token}" for token in output["token_ids"])


def test_text_leaves_out_the_end_of_sequence_token(tiny_copy: Path, tiny_reference: Reference):
    tokens = tiny_reference.tokens([1, 2, 3], 12)
    add_tokenizer(tiny_copy, eos_token=f"t{tokens[2]}")
    end = tokens.index(tokens[2]) + 1
    with build(tiny_copy) as llm:
        (output,) = llm.generate("t1 t2 t3", GREEDY, use_tqdm=False)
    assert (output["token_ids"], output["finish_reason"]) == (tokens[:end], "stop")
    assert output["text"] == " ".join(f"t{token}" for token in tokens[: end - 1])


def test_tokens_are_decoded_special_ones_too_or_not_at_all_without_a_tokenizer(tiny_copy: Path):
    prompt = random_tokens(5, seed=1)
    params = SamplingParams(max_tokens=20, logprobs=VOCAB_SIZE, prompt_logprobs=3)
    add_tokenizer(tiny_copy, eos_token="t7")
    with build(tiny_copy) as llm:
        (output,) = llm.generate(prompt, params, use_tqdm=False)
    for entry in output["logprobs"]:
        assert {found.decoded_token for found in entry.values()} == {
            f"t{token}" for token in range(VOCAB_SIZE)
        }
    for path in tiny_copy.glob("*token*.json"):
        path.unlink()
    with build(tiny_copy) as llm:
        (output,) = llm.generate(prompt, params, use_tqdm=False)
    for entry in output["logprobs"] + output["prompt_logprobs"][1:]:
        assert {found.decoded_token for found in entry.values()} == {None}


# Times


@BOTH_ORDERS
def test_times_of_a_request_are_in_order(tiny: Path, async_scheduling: bool):
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (1, 2, 12, 5)]
    with build(tiny, max_num_seqs=2, async_scheduling=async_scheduling) as llm:
        before = time.time()
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        after = time.time()
    for param, output in zip(params, outputs, strict=True):
        times = output["metrics"]
        assert set(times) == {
            "arrival_time", "first_token_time", "finished_time", "time_to_first_token",
            "time_per_output_token",
        }  # fmt: skip
        arrival, first, last = (
            times[name] for name in ("arrival_time", "first_token_time", "finished_time")
        )
        assert before <= arrival < first <= last <= after
        assert times["time_to_first_token"] == first - arrival > 0
        if param.max_tokens == 1:
            assert times["time_per_output_token"] is None
        else:
            mean = (last - first) / (param.max_tokens - 1)
            assert times["time_per_output_token"] == pytest.approx(mean)
            assert mean > 0
    assert len({output["metrics"]["arrival_time"] for output in outputs}) == 1
    waited = outputs[3]["metrics"]["first_token_time"]
    assert waited > outputs[0]["metrics"]["finished_time"], "only two run at once"


def test_times_of_a_request_include_its_time_in_the_queue(llm: LLM):
    llm.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=3))
    time.sleep(0.2)
    outputs = llm.step()
    time.sleep(0.2)
    while not llm.is_finished():
        outputs += llm.step()
    (output,) = outputs
    assert output["metrics"]["time_to_first_token"] >= 0.19
    assert output["metrics"]["time_per_output_token"] >= 0.09


def test_times_of_several_completions_are_of_the_first_and_the_last(tiny: Path):
    with build(tiny, max_num_seqs=1) as llm:  # one after another
        params = SamplingParams(n=3, seed=1, max_tokens=4)
        (output,) = llm.generate([1, 2, 3], params, use_tqdm=False)
        times = output["metrics"]
        assert times["arrival_time"] < times["first_token_time"] < times["finished_time"]
        assert times["time_per_output_token"] > 0


@BOTH_ORDERS
def test_a_preempted_request_keeps_the_time_of_its_first_token(tiny: Path, async_scheduling: bool):
    with build(
        tiny, num_kvcache_blocks=8, max_model_len=128, async_scheduling=async_scheduling
    ) as llm:
        prompts = [random_tokens(30, seed=seed) for seed in range(3)]
        params = SamplingParams(temperature=0, max_tokens=40)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert llm.metrics()["preemptions"] > 0
    first = [output["metrics"]["first_token_time"] for output in outputs]
    assert max(first[:2]) < min(output["metrics"]["finished_time"] for output in outputs)
    for output in outputs:
        times = output["metrics"]
        assert times["arrival_time"] < times["first_token_time"] < times["finished_time"]


@BOTH_ORDERS
def test_a_chunk_that_leaves_one_token_of_the_prompt(tiny: Path, async_scheduling: bool):
    """It runs in a decode step."""
    with build(tiny, max_num_batched_tokens=16, async_scheduling=async_scheduling) as llm:
        (output,) = llm.generate([random_tokens(33)], GREEDY, use_tqdm=False)
    times = output["metrics"]
    assert times["arrival_time"] < times["first_token_time"] < times["finished_time"]
