"""A local Ray for tests, and predictors that fail on purpose."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from helpers.paths import DEMO, ROOT
from nanovllm.entrypoints.ray_data import LLMPredictor

ENGINE = {
    "device": "cpu", "dtype": "float32", "kvcache_block_size": 16, "num_kvcache_blocks": 2048,
    "max_model_len": 64,
}  # fmt: skip
POISON = 250  # the id of a row


@contextmanager
def local_ray() -> Iterator[None]:
    """Two CPUs of this machine, whatever other Ray there may be."""
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT / "tests")}},  # for this module
    )  # fmt: skip
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    try:
        yield
    finally:
        ray.shutdown()


def number_prompts(count: int) -> list[dict[str, Any]]:
    """Rows whose answers end after different numbers of tokens."""
    return [
        {"id": i, "prompt": f"{i}, {i + 1},", "sampling_params": {"max_tokens": 1 + i % 2}}
        for i in range(count)
    ]


def predictor(**options: Any) -> LLMPredictor:
    """A predictor in this process."""
    return LLMPredictor(str(DEMO), **ENGINE | {"sampling_params": {"temperature": 1.0}} | options)


class FaultyPredictor(LLMPredictor):
    """Fails in the middle of its second batch, or whenever it gets the row POISON.

    Args:
        faults: "killed": its process is; "engine": a step raises. Each happens once, whatever the
            number of actors. None: every step of a batch with the row POISON raises.
        journal: an empty directory, which gets a file for each process and for each fault.
    """

    def __init__(
        self, *arguments: Any, faults: list[str] | None, journal: Path, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.faults, self.journal = faults, journal
        self.batches = self.steps = 0
        self.is_poisoned = False
        self.step, self.llm.step = self.llm.step, self.faulty_step
        (journal / f"process-{os.getpid()}").touch()

    def __call__(self, batch: pa.Table) -> pa.Table:
        self.batches, self.steps = self.batches + 1, 0
        self.is_poisoned = self.faults is None and POISON in batch["id"].to_pylist()
        return super().__call__(batch)

    def faulty_step(self) -> list[Any]:
        self.steps += 1
        if self.is_poisoned:
            raise RuntimeError("this block fails in every engine")
        if self.faults and self.batches == 2 and self.steps == 2:
            fault = next(filter(self.is_first, self.faults), None)
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "engine":
                raise RuntimeError("the engine has failed")
        return self.step()

    def is_first(self, fault: str) -> bool:
        try:
            (self.journal / fault).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True
