"""What the engine has done so far, in numbers."""

from dataclasses import astuple, dataclass

from nanovllm.engine.scheduler import Batch


@dataclass
class StepStats:
    """Tokens run and seconds spent since the engine began, by kind of step."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    def add(self, batch: Batch, seconds: float) -> None:
        if batch.is_prefill:
            self.prefill_tokens += batch.num_tokens
            self.prefill_seconds += seconds
        else:
            self.decode_tokens += batch.num_tokens
            self.decode_seconds += seconds

    def since(self, before: "StepStats") -> "StepStats":
        """What was added after the copy `before` was taken."""
        return StepStats(*(now - then for now, then in zip(astuple(self), astuple(before))))

    @property
    def prefill_rate(self) -> float:
        """Tokens per second of prefill steps, those run again after preemption included."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens per second of decode steps, discarded ones included."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0
