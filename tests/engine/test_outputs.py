"""The form of what a request gives back."""

from pathlib import Path

import pytest

from helpers.engines import GREEDY, build
from nanovllm import LLM


@pytest.fixture
def llm(tiny: Path):
    with build(tiny) as engine:
        yield engine


def test_output_has_these_keys_and_types(llm: LLM):
    (output,) = llm.generate("t1 t2 t3", GREEDY, use_tqdm=False)
    assert {key: type(value) for key, value in output.items()} == {
        "request_id": int, "prompt": str, "prompt_token_ids": list, "prompt_logprobs": type(None),
        "num_prompt_tokens": int, "num_cached_tokens": int, "outputs": list, "metrics": dict,
        "index": int, "text": str, "token_ids": list, "finish_reason": str,
        "stop_reason": type(None), "logprobs": type(None), "cumulative_logprob": type(None),
    }  # fmt: skip
    assert output["outputs"] == [{key: output[key] for key in output["outputs"][0]}]
    assert {type(token) for token in output["token_ids"]} == {int}
    assert output["num_prompt_tokens"] == 3
    assert output["finish_reason"] == "length"
