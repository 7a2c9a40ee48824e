"""What a single request may ask of the sampler."""

import math
from dataclasses import dataclass

from nanovllm.utils.validation import as_integer, as_number

# Dividing by a smaller temperature could overflow. Above the largest, all tokens are equally likely
# in float32 anyway.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-5, 1e30


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends.

    Attributes:
        temperature: logits are divided by it before sampling; 0 picks the most likely token
            (greedy), and so does anything below 1e-5.
        max_tokens: the most tokens to generate, at least 1.
        ignore_eos: go on to `max_tokens` even when the model says that it is done.
        seed: makes the request's random choices repeatable, whatever else runs beside it; any
            integer of 64 bits. None draws one from the engine's own seed.

    Raises:
        TypeError, ValueError: for a value that cannot work, naming the parameter.
    """

    temperature: float = 1.0
    max_tokens: int = 64
    ignore_eos: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        temperature = as_number("temperature", self.temperature)
        if not math.isfinite(temperature) or temperature < 0:
            raise ValueError(
                f"temperature must be a finite number, 0 (greedy) or above, got {temperature}"
            )
        object.__setattr__(self, "temperature", temperature)
        object.__setattr__(self, "max_tokens", as_integer("max_tokens", self.max_tokens))
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(f"ignore_eos must be True or False, got {self.ignore_eos!r}")
        if self.seed is not None:
            object.__setattr__(self, "seed", as_integer("seed", self.seed))
            if not -(2**63) <= self.seed < 2**64:
                raise ValueError(f"seed must fit in 64 bits, got {self.seed}")

    @property
    def usable_temperature(self) -> float:
        """The temperature, such that float32 logits can be divided by it; 0 for greedy."""
        too_small = self.temperature < MIN_TEMPERATURE
        return 0.0 if too_small else min(self.temperature, MAX_TEMPERATURE)
