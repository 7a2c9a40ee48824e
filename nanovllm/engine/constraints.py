"""What restricts the tokens that may come next, known to the host alone."""

from typing import Protocol

import numpy as np


class TokenConstraint(Protocol):
    """Which tokens may come next in one sequence."""

    def accept(self, token_id: int) -> None:
        """The sequence's next token is known."""

    def restrict(self, mask: np.ndarray) -> None:
        """Clear the bits of tokens that may not come next.

        Args:
            mask: [words] int32; bit i % 32 of word i // 32 is token i.
        """


def fill_masks(constraints: list[TokenConstraint], out: np.ndarray) -> None:
    """The mask of each constraint, into `out` [constraints, words] int32."""
    out[:] = -1
    for constraint, mask in zip(constraints, out, strict=True):
        constraint.restrict(mask)
