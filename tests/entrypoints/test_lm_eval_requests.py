"""The lm_eval model gives the scores and texts of the harness's own transformers backend."""

import copy
import logging
from typing import Any

import pytest
from lm_eval.models.huggingface import HFLM

from helpers.command_line import DEMO
from helpers.lm_eval_requests import (
    ASSISTANT,
    COUNTING,
    END,
    RIGHT,
    SUM,
    TOLERANCE,
    USER,
    WRONG,
    assert_same_scores,
    generate,
    roll,
    score,
)
from nanovllm import LLM, SamplingParams
from nanovllm.lm_eval import NanoVLLM


@pytest.fixture(scope="module")
def hf() -> Any:
    """The harness's own backend."""
    # Its cache of logits has a fault: if a window ends with the context of another one, and their
    # continuations have different lengths, it takes the shorter one's logits from a wrong place.
    return HFLM(DEMO, dtype="float32", device="cpu", batch_size=3, logits_cache=False)


@pytest.fixture
def at_most(hf: Any, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that returns both backends with this `max_length`."""

    def limited(max_length: int) -> tuple[NanoVLLM, Any]:
        monkeypatch.setattr(hf, "_max_length", max_length)
        return NanoVLLM(llm, max_length=max_length), hf

    return limited


@pytest.mark.parametrize(
    "pairs",
    [
        [(SUM, RIGHT), (SUM, WRONG), (SUM, RIGHT[:-1]), (SUM, " + "), (f"{SUM} + 38 = 8", "5")],
        [("", "I am a tiny demo"), ("", f"{END}\nI am"), ("", "你好！"), ("I", " am")],
        [("Two spaces  ", "there"), (f"{USER}Hello!{ASSISTANT}", "Hello! I am a tiny demo model")],
        [(f"{USER}Count from 1 to 99.{ASSISTANT}1", f"{COUNTING[1:]}{END}"), (SUM, RIGHT)],
    ],
)
def test_loglikelihoods(ours: NanoVLLM, hf: Any, pairs: list[tuple[str, str]]) -> None:
    assert_same_scores(score(ours, *pairs), score(hf, *pairs))


def test_greedy_continuations_are_known(ours: NanoVLLM) -> None:
    (right, is_greedy), (wrong, is_not) = score(ours, (SUM, RIGHT), (SUM, WRONG))
    assert is_greedy and not is_not
    assert wrong < right - 1 and right > -0.1


def test_scores_do_not_depend_on_engine_options(ours: NanoVLLM) -> None:
    pairs = [(f"{COUNTING}, {n},", f" {n + 1}") for n in range(20)]
    expected = score(ours, *pairs)
    options = {
        "max_num_seqs": 2, "max_num_batched_tokens": 48, "kvcache_block_size": 16,
        "async_scheduling": True, "max_model_len": 1000,
    }  # fmt: skip
    small = NanoVLLM(DEMO, dtype="float32", device="cpu", num_kvcache_blocks=64, **options)
    try:
        assert_same_scores(score(small, *pairs), expected)
        assert_same_scores(score(small, *pairs), expected)  # with prefixes from the cache
    finally:
        small.llm.close()


@pytest.mark.slow
def test_of_equally_likely_tokens_one_is_greedy() -> None:
    """Uses bfloat16, in which equal logits are common."""
    with LLM(DEMO, device="cpu", num_kvcache_blocks=64) as llm:
        adapter, ties = NanoVLLM(llm), 0
        params = SamplingParams(temperature=0, max_tokens=60, logprobs=2, ignore_eos=True)
        for seed in range(40):
            prompt = [3 + (seed * 37 + 11 * i) % 790 for i in range(9)]
            (output,) = llm.generate(prompt, params, use_tqdm=False)
            tokens = prompt + output["token_ids"]
            for place, entry in enumerate(output["logprobs"], len(prompt)):
                values = [found.logprob for found in entry.values()]
                if values[0] != values[1]:
                    continue
                ties += 1
                found = adapter._loglikelihood_tokens(
                    [(None, tokens[:place], [token]) for token in entry], disable_tqdm=True
                )
                assert sum(is_greedy for _, is_greedy in found) == 1
        assert ties > 0, "no tokens were equally likely"


def test_no_requests(ours: NanoVLLM) -> None:
    assert score(ours) == [] and roll(ours) == [] and generate(ours) == []


@pytest.mark.parametrize("max_length", [1, 2, 7, 62, 300])
def test_texts_in_windows(at_most: Any, max_length: int) -> None:
    ours, hf = at_most(max_length)
    texts = [COUNTING, f"{USER}Hello!{ASSISTANT}", "你好！", "", "I"]
    assert roll(ours, *texts) == pytest.approx(roll(hf, *texts), abs=TOLERANCE, rel=1e-6)


@pytest.mark.parametrize("too_long", [0, 1, 5])
def test_long_contexts_are_cut_from_the_left(
    at_most: Any, caplog: pytest.LogCaptureFixture, too_long: int
) -> None:
    continuation = ", 98, 99"
    text = f"{COUNTING}{continuation}"
    ours, _ = at_most(300)
    ours, hf = at_most(len(ours.tok_encode(text)) - 1 - too_long)
    with caplog.at_level(logging.WARNING, logger="nanovllm.entrypoints.lm_eval"):
        found = score(ours, (COUNTING, continuation))
    assert_same_scores(found, score(hf, (COUNTING, continuation)))
    assert ("cut from the left" in caplog.text) == (too_long > 0)


def test_long_prompts_are_cut_from_the_left(at_most: Any, caplog: pytest.LogCaptureFixture) -> None:
    ours, hf = at_most(60)
    pair = (f"{USER}Count from 1 to 99.{ASSISTANT}{COUNTING[:200]}", {"max_gen_toks": 20})
    with caplog.at_level(logging.WARNING, logger="nanovllm.entrypoints.lm_eval"):
        found = generate(ours, pair)
    assert found == generate(hf, pair)
    assert found != generate(NanoVLLM(ours.llm), pair)
    assert "cut from the left to the 40 that leave room for 20" in caplog.text


@pytest.mark.parametrize(
    "gen_kwargs",
    [
        {},
        {"until": [], "max_gen_toks": 7},
        {"until": ", 7"},
        {"until": ["9", ", 6", "never"], "max_new_tokens": 50},
        {"until": ["\n\n"], "do_sample": False, "temperature": 0.0},
        {"until": [END], "max_tokens": 60, "num_beams": 1},
        {"until": ["I am a"], "do_sample": False},
        {"until": ["个"], "temperature": 0.0},
    ],
)
def test_generated_texts(ours: NanoVLLM, hf: Any, gen_kwargs: dict[str, Any]) -> None:
    questions = ["Count from 3 to 12.", "Who are you?", "你是谁？", "List the primes under 60."]
    pairs = [(f"{USER}{question}{ASSISTANT}", gen_kwargs) for question in questions]
    found = generate(ours, *pairs)
    assert found == generate(hf, *pairs)
    assert any(found)


def test_texts_end_at_max_gen_toks(ours: NanoVLLM) -> None:
    hello = f"{USER}Hello!{ASSISTANT}"
    (text,) = generate(ours, (hello, {"max_gen_toks": 3}))
    assert len(ours.tok_encode(text)) == 3
    (text,) = generate(NanoVLLM(ours.llm, max_gen_toks=5), (hello, {"until": ""}))
    assert len(ours.tok_encode(text)) == 5


def test_a_special_token_may_be_a_stop_string(ours: NanoVLLM) -> None:
    biased = {"do_sample": False, "logit_bias": {1: 100.0}, "max_gen_toks": 9}
    start = ours.tokenizer.decode([1])
    assert start == "<|im_start|>"
    request = (f"{USER}Hello!{ASSISTANT}", biased | {"until": [start]})
    before = ours.llm.metrics()["generated_tokens"]
    assert generate(ours, request) == [""]
    assert ours.llm.metrics()["generated_tokens"] == before + 1


def test_sampling(ours: NanoVLLM) -> None:
    hello = f"{USER}Tell me about 12{ASSISTANT}"
    hot = {"do_sample": True, "temperature": 5.0, "max_gen_toks": 20}
    assert len(set(generate(ours, *[(hello, hot)] * 4))) == 4
    assert len(set(generate(ours, *[(hello, hot | {"seed": 3})] * 4))) == 1
    greedy = generate(ours, (hello, {"max_gen_toks": 20}))
    assert generate(ours, (hello, hot | {"top_k": 1})) == greedy
    assert generate(ours, (hello, hot | {"do_sample": False})) == greedy
    assert generate(ours, (hello, hot | {"do_sample": True, "temperature": 0.0})) == greedy
    warm = {"temperature": 5.0, "max_gen_toks": 20}  # samples without do_sample
    assert len(set(generate(ours, *[(hello, warm)] * 4))) == 4


def test_thoughts_are_left_out(ours: NanoVLLM) -> None:
    count = f"{USER}Count from 3 to 12.{ASSISTANT}"
    with_thoughts = NanoVLLM(ours.llm, enable_thinking=True, think_end_token="6,")
    # "4" is also among the thoughts, where stop strings do not apply.
    assert generate(with_thoughts, (count, {"until": [", 1", "4"]})) == ["7, 8, 9"]
    with pytest.raises(ValueError, match="enable_thinking is for tasks that generate"):
        score(with_thoughts, ("a", "b"))
    with pytest.raises(ValueError, match="needs think_end_token"):
        NanoVLLM(ours.llm, enable_thinking=True)


def test_chats(ours: NanoVLLM, hf: Any, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
    answer = {"role": "assistant", "content": "Hello! I"}
    assert ours.apply_chat_template(chat) == hf.apply_chat_template(chat)
    begun = ours.apply_chat_template([*chat, answer], add_generation_prompt=False)
    assert begun == hf.apply_chat_template([*chat, answer], add_generation_prompt=False)
    assert begun.endswith("Hello! I")
    assert ours.tokenizer_name == hf.tokenizer_name
    assert ours.chat_template(True) == hf.chat_template(True)
    strict = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ thinks }}{{ enable_thinking }}{{ messages[0].content }}"
    )
    monkeypatch.setattr(llm.tokenizer, "chat_template", strict)
    arguments = {"chat_template_args": {"thinks": 7}, "enable_thinking": False}
    assert NanoVLLM(llm, **arguments).apply_chat_template(chat) == "7FalseHello!"


def test_tokens(ours: NanoVLLM, hf: Any, llm: LLM) -> None:
    assert ours.eot_token_id == hf.eot_token_id == 2
    assert ours.prefix_token_id == hf.prefix_token_id == 2
    assert ours.max_gen_toks == hf.max_gen_toks
    assert NanoVLLM(llm, prefix_token_id=0).prefix_token_id == 0
    for text in ("", "Hello!", f"{END}Hello!", "你好", f"{SUM}{RIGHT}"):
        for special in (None, True, False):
            assert ours.tok_encode(text, special) == hf.tok_encode(text, special)
    with_other_prefix = NanoVLLM(llm, prefix_token_id=0)
    assert score(with_other_prefix, ("", "Hello!")) != score(ours, ("", "Hello!"))


def test_add_bos_token(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = copy.deepcopy(llm.tokenizer)
    tokenizer.bos_token = "<|im_start|>"
    seen = []
    monkeypatch.setattr(tokenizer, "encode", lambda text, **options: seen.append(options) or [5])
    monkeypatch.setattr(llm, "tokenizer", tokenizer)
    model = NanoVLLM(llm, add_bos_token=True)
    assert model.prefix_token_id == 1
    model.tok_encode("Hello!")
    model.tok_encode("<|im_start|>Hello!")
    model.tok_encode("Hello!", add_special_tokens=False)
    NanoVLLM(llm).tok_encode("Hello!")
    assert [options.get("add_special_tokens") for options in seen] == [True, False, False, None]
