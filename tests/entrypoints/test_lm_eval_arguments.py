"""Arguments of the lm_eval model and of its requests; the engine that it is given."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.checkpoints import link_checkpoint
from helpers.command_line import DEMO
from helpers.lm_eval_requests import (
    ASSISTANT,
    COUNTING,
    END,
    RIGHT,
    SUM,
    USER,
    generate,
    score,
)
from nanovllm import LLM, SamplingParams
from nanovllm.lm_eval import NanoVLLM


def test_bad_arguments_are_refused(llm: LLM, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="unknown engine option 'max_batch'"):
        NanoVLLM(DEMO, max_batch=4)
    with pytest.raises(ValueError, match=r"data_parallel_size=2: .*replicas"):
        NanoVLLM(DEMO, data_parallel_size=2)
    with pytest.raises(ValueError, match="parallelize=True is not supported: leave it out, or"):
        NanoVLLM(DEMO, parallelize=True)
    with pytest.raises(ValueError, match="not both"):
        NanoVLLM(DEMO, max_length=20, max_model_len=20)
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        NanoVLLM(DEMO, max_length=0, device="cpu", num_kvcache_blocks=4)
    with pytest.raises(ValueError, match="come too late"):
        NanoVLLM(llm, dtype="float32")
    with pytest.raises(ValueError, match="give prefix_token_id"):
        NanoVLLM(str(tiny), device="cpu", num_kvcache_blocks=4)
    for path in tiny.iterdir():
        if "token" not in path.name:
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(ValueError, match="has no tokenizer"):
        NanoVLLM(str(tmp_path), device="cpu", num_kvcache_blocks=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"think_end_token": 5}, "think_end_token must be text"),
        ({"max_gen_toks": 0}, "max_gen_toks must be at least 1"),
        ({"max_gen_toks": "abc"}, "max_gen_toks must be an integer"),
        ({"max_length": "abc"}, "max_length must be an integer"),
        ({"prefix_token_id": 99999}, "prefix_token_id is 99999, outside"),
    ],
    ids=str,
)  # fmt: skip
def test_invalid_values_are_refused(llm: LLM, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        NanoVLLM(llm, **arguments)


def test_arguments_of_other_backends(llm: LLM) -> None:
    adapter = NanoVLLM(llm, trust_remote_code=True, batch_size="auto")
    empty, prefix = generate(
        adapter, *((text, {"max_gen_toks": 9, "use_cache": True}) for text in ("", END))
    )
    assert empty == prefix
    with pytest.raises(ValueError, match="num_beams must be 1, got 10"):
        generate(adapter, ("Hello", {"max_gen_toks": 3, "num_beams": 10}))


def test_arguments_of_the_vllm_backend() -> None:
    model = NanoVLLM(
        DEMO, device="cpu", dtype="float32", num_kvcache_blocks=4, tensor_parallel_size=1,
        data_parallel_size=1, max_model_len=32, gpu_memory_utilization=0.5, max_num_seqs=8,
        enforce_eager=True, trust_remote_code=False, quantization=None, revision="main",
        tokenizer=None, tokenizer_mode="auto", enable_prefix_caching=True, seed=1234,
    )  # fmt: skip
    assert (model.max_length, model.llm.config.max_num_seqs) == (30, 8)
    model.llm.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    """The harness asks for cuda:0 unless it is told another device."""
    model = NanoVLLM(DEMO, device="cuda:0", num_kvcache_blocks=4)
    assert model.llm.config.torch_device.type == "cpu"
    assert "device=cuda:0, and there is no GPU" in caplog.text
    model.llm.close()


def test_stop_stands_beside_until(ours: NanoVLLM) -> None:
    count = f"{USER}Count from 3 to 12.{ASSISTANT}"
    for stops in ({"stop": [" 7"], "until": ["9"]}, {"stop": "9", "until": " 7"}, {"stop": " 7"}):
        assert generate(ours, (count, stops)) == ["3, 4, 5, 6,"]
    with pytest.raises(TypeError, match="stop must be a string or a list of strings, got 7"):
        generate(ours, (count, {"stop": 7}))


def test_bad_requests_are_refused(ours: NanoVLLM, llm: LLM) -> None:
    short = NanoVLLM(llm, max_length=6)
    with pytest.raises(ValueError, match="may have 1 to 6"):
        score(short, ("I", COUNTING))
    with pytest.raises(ValueError, match="may have 1 to"):
        score(ours, ("I am", ""))
    with pytest.raises(ValueError, match="leaves no room for a prompt"):
        generate(short, ("I am", {"max_gen_toks": 6}))
    with pytest.raises(TypeError, match="penalty_alpha"):
        generate(ours, ("I am", {"penalty_alpha": 0.5}))
    assert ours.llm.is_finished()


def test_texts_may_be_as_long_as_the_model_allows(tmp_path: Path) -> None:
    path = link_checkpoint(Path(DEMO), tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    config["max_position_embeddings"] = 8192  # more than the engine's default
    (path / "config.json").write_text(json.dumps(config))
    model = NanoVLLM(str(path), device="cpu", num_kvcache_blocks=128)
    assert model.max_length == 8192 - 2
    model.llm.close()


def test_max_length_limits_the_engine() -> None:
    model = NanoVLLM(DEMO, max_length=30, device="cpu", num_kvcache_blocks=4)
    assert (model.max_length, model.llm.config.max_model_len) == (30, 32)
    model.llm.close()


def test_engine_is_usable_after_a_failure(
    ours: NanoVLLM, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm, "step", fail)
        with pytest.raises(KeyboardInterrupt):
            score(ours, (SUM, RIGHT))
    assert llm.is_finished()
    request = llm.add_request("Hello!", SamplingParams(max_tokens=2))
    with pytest.raises(RuntimeError, match="unfinished requests"):
        score(ours, (SUM, RIGHT))
    llm.abort(request)
    assert len(score(ours, (SUM, RIGHT))) == 1
