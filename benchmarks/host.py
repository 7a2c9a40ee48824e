"""What the host does for a decode step, without waiting for the device."""

import statistics
import time
from typing import Any

from nanovllm import LLM, SamplingParams


def host_seconds(llm: LLM, prompts: list[list[int]], steps: int) -> dict[str, float]:
    """Median seconds of `schedule`, `launch` and `postprocess` over decode steps of all prompts.

    The calls are timed around the engine's bound methods; `collect`, which waits, is left out. On a
    CPU, `launch` computes.
    """
    params = SamplingParams(temperature=0.6, max_tokens=4 * steps + 16, ignore_eos=True)
    for prompt in prompts:
        llm.add_request(prompt, params)
    past_capture = llm.stats.decode_tokens + 4 * len(prompts)
    while llm.stats.decode_tokens < past_capture:
        llm.step()
    watched = (
        (llm.scheduler, "schedule"), (llm.model_runner, "launch"), (llm.scheduler, "postprocess")
    )  # fmt: skip
    seconds = {name: _timed_calls(owner, name) for owner, name in watched}
    for _ in range(steps):
        llm.step()
    for owner, name in watched:
        delattr(owner, name)
    llm.abort_all()
    return {name: statistics.median(times) for name, times in seconds.items()}


def _timed_calls(owner: object, name: str) -> list[float]:
    """Shadow a bound method by one that notes the seconds of each call, in the list returned."""
    method = getattr(owner, name)
    seconds: list[float] = []

    def timed(*args: Any) -> Any:
        start = time.perf_counter()
        result = method(*args)
        seconds.append(time.perf_counter() - start)
        return result

    setattr(owner, name, timed)
    return seconds
