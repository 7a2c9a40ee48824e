"""A sampled request's tokens depend on its prompt and its SamplingParams, and on nothing else."""

from pathlib import Path

import pytest

from helpers.checkpoints import random_tokens
from helpers.engines import BOTH_ORDERS
from nanovllm import LLM, SamplingParams

MAX_TOKENS = 24
# Some share a prefix, two are equal; seeds of every size are allowed.
PROMPTS = [
    random_tokens(1, seed=1), random_tokens(15, seed=2), random_tokens(16, seed=2),
    random_tokens(33, seed=2), random_tokens(33, seed=2), random_tokens(70, seed=3),
]  # fmt: skip
SEEDS = [0, 1, 7, 2**63, -2, 7]


def requests() -> list[tuple[list[int], SamplingParams]]:
    params = [SamplingParams(temperature=1.0, max_tokens=MAX_TOKENS, seed=seed) for seed in SEEDS]
    return list(zip(PROMPTS, params, strict=True))


def run(llm: LLM, batch: list[tuple[list[int], SamplingParams]]) -> list[list[int]]:
    prompts, params = map(list, zip(*batch, strict=True))
    return [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]


def build(path: Path, **options) -> LLM:
    settings = {"kvcache_block_size": 16, "num_kvcache_blocks": 200, "device": "cpu"}
    return LLM(path, **settings | options)


@pytest.fixture(scope="module")
def alone(tiny: Path) -> list[list[int]]:
    """Each request in an engine that has never seen another."""
    found = []
    for request in requests():
        with build(tiny) as llm:
            found += run(llm, [request])
    return found


def test_same_in_one_batch(tiny: Path, alone: list[list[int]]):
    with build(tiny) as llm:
        assert run(llm, requests()) == alone


def test_same_in_another_order(tiny: Path, alone: list[list[int]]):
    with build(tiny) as llm:
        assert run(llm, requests()[::-1])[::-1] == alone


def test_same_with_greedy_company(tiny: Path, alone: list[list[int]]):
    greedy = (random_tokens(20, seed=9), SamplingParams(temperature=0, max_tokens=5))
    with build(tiny) as llm:
        mixed = [request for sampled in requests() for request in (greedy, sampled)]
        assert run(llm, mixed)[1::2] == alone


def test_same_with_a_prefix_hit(tiny: Path, alone: list[list[int]]):
    with build(tiny) as llm:
        run(llm, requests())
        outputs = llm.generate(PROMPTS, [params for _, params in requests()], use_tqdm=False)
        assert [output["num_cached_tokens"] for output in outputs] == [0, 0, 0, 32, 32, 64]
        assert [output["token_ids"] for output in outputs] == alone


@BOTH_ORDERS
def test_same_when_preempted(tiny: Path, alone: list[list[int]], async_scheduling: bool):
    with build(
        tiny, num_kvcache_blocks=9, max_model_len=144, async_scheduling=async_scheduling
    ) as llm:
        assert run(llm, requests()) == alone
        assert llm.scheduler.num_preemptions > 0, "the test does not test what it says"


@BOTH_ORDERS
@pytest.mark.parametrize("budget", [1, 5, 17])
def test_same_when_chunked(tiny: Path, alone: list[list[int]], budget: int, async_scheduling: bool):
    options = {"max_num_batched_tokens": budget, "async_scheduling": async_scheduling}
    with build(tiny, **options) as llm:
        assert run(llm, requests()) == alone


@pytest.mark.parametrize("block_size", [32, 256])
def test_same_with_other_block_sizes(tiny: Path, alone: list[list[int]], block_size: int):
    with build(tiny, kvcache_block_size=block_size, num_kvcache_blocks=40) as llm:
        assert run(llm, requests()) == alone


@pytest.mark.parametrize("max_num_seqs", [1, 2])
def test_same_when_few_run_at_once(tiny: Path, alone: list[list[int]], max_num_seqs: int):
    with build(tiny, max_num_seqs=max_num_seqs, async_scheduling=True) as llm:
        assert run(llm, requests()) == alone


def test_same_whatever_the_engines_seed(tiny: Path, alone: list[list[int]]):
    with build(tiny, seed=12345) as llm:
        assert run(llm, requests()) == alone


def test_same_step_by_step_with_late_company(tiny: Path, alone: list[list[int]]):
    """Requests that join while others run."""
    with build(tiny, async_scheduling=True) as llm:
        found, queue, ids = {}, requests(), []
        while queue or not llm.is_finished():
            if queue:
                ids.append(llm.add_request(*queue.pop(0)))
            for _ in range(3):
                for output in llm.step():
                    found[output["request_id"]] = output["token_ids"]
        assert [found[request_id] for request_id in ids] == alone


def test_more_tokens_begin_with_the_same(tiny: Path, alone: list[list[int]]):
    with build(tiny) as llm:
        longer = SamplingParams(temperature=1.0, max_tokens=2 * MAX_TOKENS, seed=SEEDS[3])
        assert run(llm, [(PROMPTS[3], longer)])[0][:MAX_TOKENS] == alone[3]


def test_other_seeds_give_other_tokens(tiny: Path):
    with build(tiny) as llm:
        params = [SamplingParams(max_tokens=MAX_TOKENS, seed=seed) for seed in range(20)]
        found = llm.generate([PROMPTS[1]] * 20, params, use_tqdm=False)
        assert len({tuple(output["token_ids"]) for output in found}) == 20


def test_same_seed_and_bits_beyond_32_matter(tiny: Path):
    with build(tiny) as llm:
        params = [SamplingParams(max_tokens=MAX_TOKENS, seed=seed) for seed in (5, 5, 5 + 2**32)]
        first, second, third = run(llm, [(PROMPTS[1], param) for param in params])
        assert first == second != third


@BOTH_ORDERS
def test_unseeded_requests_repeat_with_the_engines_seed(tiny: Path, async_scheduling: bool):
    unseeded = [(prompt, SamplingParams(max_tokens=MAX_TOKENS)) for prompt in PROMPTS]
    found = []
    for seed in (3, 3, 4):
        with build(tiny, seed=seed, async_scheduling=async_scheduling) as llm:
            found.append((run(llm, unseeded), run(llm, unseeded)))
    assert found[0] == found[1]
    assert found[0] != found[2]
    assert found[0][0] != found[0][1], "an unseeded request draws a new seed each time"
    assert found[0][0][3] != found[0][0][4], "equal prompts in a batch draw different seeds"


@pytest.mark.gpu
@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graph"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_same_on_a_gpu(tiny: Path, alone: list[list[int]], backend: str, enforce_eager: bool):
    """Also the CPU's own tokens: the noise comes from the seed, not from a device's generator."""
    options = {"device": "cuda", "attention_backend": backend, "enforce_eager": enforce_eager}
    for num_blocks in (200, 9):
        with build(tiny, num_kvcache_blocks=num_blocks, max_model_len=144, **options) as llm:
            assert run(llm, requests()) == alone
            assert run(llm, requests()) == alone
