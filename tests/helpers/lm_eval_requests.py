"""Shared by the tests of the lm_eval model: requests, and what the harness returns for them.

A test file that imports this module is skipped if the harness is not installed.
"""

from typing import Any

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("lm_eval.models.huggingface", exc_type=ImportError)

from lm_eval.api.instance import Instance

TOLERANCE = 1e-4  # of a log probability

USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"
SUM = f"{USER}What is 47 + 38?{ASSISTANT}47"
RIGHT, WRONG = f" + 38 = 85{END}", f" + 38 = 86{END}"
COUNTING = ", ".join(map(str, range(1, 100)))


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


def score(model: Any, *pairs: tuple[str, str]) -> list[tuple[float, bool]]:
    return model.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)


def roll(model: Any, *texts: str) -> list[float]:
    found = requests("loglikelihood_rolling", *((text,) for text in texts))
    return model.loglikelihood_rolling(found, disable_tqdm=True)


def generate(model: Any, *pairs: tuple[str, dict[str, Any]]) -> list[str]:
    return model.generate_until(requests("generate_until", *pairs), disable_tqdm=True)


def assert_same_scores(
    scores: list[tuple[float, bool]], expected: list[tuple[float, bool]]
) -> None:
    assert [is_greedy for _, is_greedy in scores] == [is_greedy for _, is_greedy in expected]
    logprobs = [logprob for logprob, _ in scores]
    assert logprobs == pytest.approx([logprob for logprob, _ in expected], abs=TOLERANCE)
