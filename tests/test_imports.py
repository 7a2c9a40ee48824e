"""The names that scripts import."""

import subprocess
import sys

import pytest

from helpers.engines import GREEDY
from nanovllm import LLM, CompletionOutput, RequestOutput, TextPrompt, TokensPrompt


def test_prompts_and_outputs_by_their_classes(llm: LLM):
    prompts = [TextPrompt(prompt="t1 t2"), TokensPrompt(prompt_token_ids=[1, 2])]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert all(isinstance(output, RequestOutput) for output in outputs)
    assert all(type(output.outputs[0]) is CompletionOutput for output in outputs)
    assert outputs[0].token_ids == outputs[1].token_ids


def test_what_is_elsewhere_says_where():
    with pytest.raises(ImportError, match=r"nanovllm has no EngineArgs: give the options to LLM"):
        from nanovllm import EngineArgs  # noqa: F401
    with pytest.raises(ImportError, match="LoRARequest"):
        from nanovllm import LoRARequest  # noqa: F401
    assert not hasattr(sys.modules["nanovllm"], "no_such_thing")


def test_the_import_is_quick_and_has_no_side_effects():
    """No transformers, no Ray, no engine of several ranks before they are asked for."""
    code = (
        "import sys, nanovllm; "
        "print([m for m in ('transformers', 'ray', 'nanovllm.parallel') if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"
