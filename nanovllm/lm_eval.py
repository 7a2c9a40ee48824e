"""Short name of `nanovllm.entrypoints.lm_eval`, both to import and for `python -m`."""

from nanovllm.entrypoints.lm_eval import NanoVLLM, main

__all__ = ["NanoVLLM"]

if __name__ == "__main__":
    main()
