"""Another name of `nanovllm.entrypoints.lm_eval`, for `python -m nanovllm.lm_eval` and imports."""

from nanovllm.entrypoints.lm_eval import NanoVLLM, main

__all__ = ["NanoVLLM"]

if __name__ == "__main__":
    main()
