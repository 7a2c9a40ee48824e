"""nanovllm: fast offline LLM inference, small enough to read in an evening."""

from nanovllm.inputs import TextPrompt, TokensPrompt
from nanovllm.llm import LLM
from nanovllm.outputs import CompletionOutput, RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.structured_outputs import StructuredOutputsParams
from nanovllm.version import __version__

__all__ = [
    "LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "StructuredOutputsParams",
    "TextPrompt", "TokensPrompt", "__version__",
]  # fmt: skip

# Names that scripts import from vLLM, and what to do where they do not exist.
_ELSEWHERE = {
    "LLMEngine": "use LLM, whose add_request(), step() and is_finished() are the loop",
    "EngineArgs": "give the options to LLM(model, **options)",
    "AsyncLLMEngine": "this is for offline use; LLM.stream() yields tokens as they come",
    "AsyncEngineArgs": "this is for offline use; LLM.stream() yields tokens as they come",
    "GuidedDecodingParams": "use StructuredOutputsParams, which has the same fields",
    "PoolingParams": "embeddings and rewards are not served",
    "EmbeddingRequestOutput": "embeddings are not served",
    "LoRARequest": "LoRA adapters are not served: merge the adapter into the model's weights first",
    "ModelRegistry": "docs/add-a-model.md has the steps for another model",
}


def __getattr__(name: str) -> object:
    if name in _ELSEWHERE:
        raise ImportError(f"nanovllm has no {name}: {_ELSEWHERE[name]}")
    raise AttributeError(f"module 'nanovllm' has no attribute {name!r}")
