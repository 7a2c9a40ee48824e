"""The form of what a request gives back."""

import copy
import json
import pickle
from pathlib import Path
from typing import get_type_hints

import pytest

from helpers.checkpoints import make_checkpoint
from helpers.engines import GREEDY, build
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
        "num_prompt_tokens": int, "num_cached_tokens": int, "outputs": list, "finished": bool,
        "metrics": RequestMetrics,
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


def test_entries_are_attributes_and_json_and_pickle(llm: LLM):
    params = SamplingParams(n=2, logprobs=1, prompt_logprobs=1, max_tokens=40)
    (output,) = llm.generate("t1 t2 t3", params, use_tqdm=False)
    completion = output.outputs[1]
    for record in (
        output,
        completion,
        output.metrics,
        completion.logprobs[0][completion.token_ids[0]],
    ):
        for name, value in record.items():
            assert getattr(record, name) is value
        for copied in (pickle.loads(pickle.dumps(record)), copy.deepcopy(record)):
            assert copied == record and type(copied) is type(record)
        assert hasattr(record, "outputs") == (record is output)
    assert output.finished and output.outputs[0].text == output.text == output["text"]
    as_json = json.loads(json.dumps(output))
    token_id = completion.token_ids[0]
    entry = as_json["outputs"][1]["logprobs"][0][str(token_id)]
    assert entry == completion.logprobs[0][token_id]
    assert len(repr(output)) < 3000 and repr(output).startswith("RequestOutput(index=0, text='t")
    completion.text = "another"
    assert completion["text"] == "another"


def test_an_entry_that_is_not_there_is_named(llm: LLM):
    (output,) = llm.generate([1, 2, 3], GREEDY, use_tqdm=False)
    with pytest.raises(AttributeError, match="CompletionOutput has no 'txt'; it has index, text"):
        print(output.outputs[0].txt)


def test_the_tokenizer_is_transformers_own(llm: LLM, tmp_path: Path):
    assert llm.get_tokenizer().encode("t1 t2") == [1, 2]
    with (
        build(make_checkpoint(tmp_path / "model")) as bare,
        pytest.raises(ValueError, match="no tok"),
    ):
        bare.get_tokenizer()
