"""What a stream brings, put together, and how an engine looks after it."""

from collections.abc import Iterator
from typing import Any

import pytest

from helpers.blocks import assert_blocks_consistent
from helpers.checkpoints import Reference, random_tokens
from helpers.engines import GREEDY, PROMPTS, assert_empty
from nanovllm import LLM
from nanovllm.outputs import Logprob

END_OF_TEXT, IM_START, IM_END = 0, 1, 2  # the demo's special tokens; the first and last end a text
DISTINCT = random_tokens(5, seed=15)  # no two of the 12 greedy tokens after it are the same
QUESTIONS = ["Who are you?", "47+38=", "从3数到9。", "List the primes under 30.", "你是谁？"]
PARTS = ("text", "token_ids", "logprobs")  # that come in pieces


def question(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def gather(pieces: Iterator[dict[str, Any]], count: int = 1) -> list[dict[str, Any]]:
    """Put the pieces of `count` prompts together, and check what holds of every piece."""
    found = [
        {"text": "", "token_ids": [], "logprobs": None, "finish_reason": None, "stop_reason": None}
        for _ in range(count)
    ]
    for piece in pieces:
        assert set(piece) == {"index", "finish_reason", "stop_reason", *PARTS}
        assert piece["finish_reason"] or piece["stop_reason"] is None
        own = found[piece["index"]]
        assert own["finish_reason"] is None, "a piece came after the last"
        assert len(piece["token_ids"]) == 1, "tokens are shown one by one, as they come"
        assert not piece["text"].endswith("\ufffd") or piece["finish_reason"]
        own["text"] += piece["text"]
        own["token_ids"] += piece["token_ids"]
        if piece["logprobs"] is not None:
            own["logprobs"] = (own["logprobs"] or []) + piece["logprobs"]
        own["finish_reason"], own["stop_reason"] = piece["finish_reason"], piece["stop_reason"]
    assert all(own["finish_reason"] for own in found)
    return found


def parts(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `generate` returns, of it what a stream has too."""
    keys = ("finish_reason", "stop_reason", *PARTS)
    found = [{key: out[key] for key in keys} for out in outputs]
    for own in found:
        own["logprobs"] = own["logprobs"] and about(own["logprobs"])
    return found


def about(logprobs: list[dict[int, Logprob]]) -> list[dict[int, Any]]:
    """Equal within what the batch size changes in a sum of floats."""
    return [
        {
            token: Logprob(pytest.approx(found.logprob, abs=1e-4), found.rank, found.decoded_token)
            for token, found in entry.items()
        }
        for entry in logprobs
    ]


def assert_idle(llm: LLM) -> None:
    """Nothing is queued or under way, and every block is free."""
    assert not llm._in_flight
    manager = llm.scheduler.block_manager
    assert not llm.scheduler.waiting and not llm.scheduler.running and not llm._request_of_seq
    assert manager.num_free_blocks == len(manager.blocks)
    assert_blocks_consistent(manager, [])


def assert_works(llm: LLM, reference: Reference) -> None:
    """Nothing is left over, and requests give what they should."""
    assert_idle(llm)
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output["token_ids"] == reference.tokens(prompt, GREEDY.max_tokens)
    assert_empty(llm)
