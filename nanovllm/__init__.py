"""nanovllm: fast offline LLM inference, small enough to read in an evening."""

from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams
from nanovllm.version import __version__

__all__ = ["LLM", "SamplingParams", "__version__"]
