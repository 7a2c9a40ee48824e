"""Small engines, requests for them, and what must hold of an engine that has nothing to do."""

from pathlib import Path

import pytest

from helpers.blocks import assert_blocks_consistent
from helpers.checkpoints import random_tokens
from nanovllm import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12)
PROMPTS = [random_tokens(length, seed=length) for length in (5, 40, 16, 33)]
ORDERS = {"sync": False, "async": True}  # values of async_scheduling
BOTH_ORDERS = pytest.mark.parametrize("async_scheduling", ORDERS.values(), ids=ORDERS)


def build(path: Path | str, **options) -> LLM:
    settings = {"kvcache_block_size": 16, "num_kvcache_blocks": 40, "device": "cpu"}
    return LLM(path, **settings | options)


def greedy(llm: LLM, prompts: list, params: object = GREEDY) -> list[list[int]]:
    return [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]


def assert_empty(llm: LLM) -> None:
    manager = llm.scheduler.block_manager
    assert llm.is_finished()
    assert not llm.scheduler.waiting and not llm.scheduler.running
    assert manager.num_free_blocks == len(manager.blocks)
    assert not llm.output_processor._detokenizers
    assert_blocks_consistent(manager, [])


class Fault:
    """Makes a method fail at its n-th call, before or after it has done its work."""

    def __init__(self, owner: object, name: str, at_call: int, error: BaseException, after: bool):
        self.method, self.calls = getattr(owner, name), 0
        self.owner, self.name = owner, name
        self.at_call, self.error, self.after = at_call, error, after
        setattr(owner, name, self)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.at_call and not self.after:
            raise self.error
        result = self.method(*args, **kwargs)
        if self.calls == self.at_call:
            raise self.error
        return result

    def remove(self) -> None:
        delattr(self.owner, self.name)
