"""The form of what a request gives back."""

from typing import get_type_hints

from helpers.engines import GREEDY
from nanovllm import LLM, SamplingParams
from nanovllm.outputs import (
    CompletionOutput,
    RequestMetrics,
    RequestOutput,
    StreamOutput,
)


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


def test_outputs_are_what_their_types_say(llm: LLM):
    for params in (GREEDY, SamplingParams(n=2, logprobs=1, prompt_logprobs=1)):
        (output,) = llm.generate([1, 2, 3], params, use_tqdm=False)
        assert output.keys() == get_type_hints(RequestOutput).keys()
        assert output["metrics"].keys() == get_type_hints(RequestMetrics).keys()
        for completion in output["outputs"]:
            assert completion.keys() == get_type_hints(CompletionOutput).keys()
    for piece in llm.stream([1, 2, 3], GREEDY):
        assert piece.keys() == get_type_hints(StreamOutput).keys()
