"""Constraints whose answer is easy to work out."""

import numpy as np


class Allowed:
    """After a token only some may come, by a rule: `allowed_after` of it.

    `start` stands for the token before the first."""

    def __init__(self, vocab_size: int = 128, step: int | None = None, start: int = 0) -> None:
        self.vocab_size, self.step, self.last = vocab_size, step, start
        self.accepted: list[int] = []

    allows_all = False

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)
        self.last = token_id

    def restrict(self, mask: np.ndarray) -> None:
        if self.step is None:
            return
        bits = np.zeros(32 * len(mask), dtype=np.uint32)
        bits[allowed_after(self.last, self.step, self.vocab_size)] = 1
        words = bits.reshape(-1, 32) << np.arange(32, dtype=np.uint32)
        mask &= words.sum(axis=1, dtype=np.uint32).view(np.int32)


def allowed_after(token_id: int, step: int, vocab_size: int) -> list[int]:
    """Three tokens; none if `step` is 0."""
    return [(token_id * 5 + i * step + 1) % vocab_size for i in range(3)] if step else []
