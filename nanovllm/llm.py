"""The public face of the engine."""

from nanovllm.engine.llm_engine import LLMEngine


class LLM(LLMEngine):
    """Offline inference with one model: ``LLM("path/or/hub-id").generate(["Hello"])``.

    Every engine option (see :class:`nanovllm.config.Config`) is a keyword argument. Use it as a
    context manager, or call :meth:`close`, to give the memory back.
    """
