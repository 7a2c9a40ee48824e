"""Work still to be done: a norm not yet applied, a product not yet made. Who uses it decides how.

A decoder layer reads as its equation,

    x = x + self_attn(input_layernorm(x))
    x = x + mlp(post_attention_layernorm(x))

and with one row still runs as six kernels on a GPU. For that a norm returns a `Normed`, a
projection returns a `Product`, and nothing is computed until a product is added to the residual
stream, gated, or asked for its values. Then one kernel makes it together with the norm before or
the addition after, where there is such a kernel (`kernels.choice` names it), and plain torch does
elsewhere.
"""

from collections.abc import Iterator
from typing import Any, Protocol, Union

import torch

from nanovllm.utils.kernels import kernels

Input = Union[torch.Tensor, "Normed"]  # of a projection: [tokens, in]


class Norm(Protocol):
    """What normalises a stream: see `layers.layernorm.RMSNorm`."""

    eps: float

    @property
    def weight(self) -> torch.Tensor: ...

    def normalize(
        self,
        x: torch.Tensor,
        partials: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor: ...

    def normalize_in_fp8(
        self, x: torch.Tensor, partials: torch.Tensor | None, group: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class Multiplier(Protocol):
    """What makes the products of one weight: see `layers.linear.Linear`."""

    def multiply(self, x: Input, out: torch.Tensor | None = None) -> torch.Tensor: ...

    def multiply_gated(self, x: Input, activation: str) -> torch.Tensor: ...

    def multiply_store(self, x: Input, *where: Any) -> torch.Tensor: ...

    def multiply_add(
        self, x: Input, stream: torch.Tensor
    ) -> Union[torch.Tensor, "PendingSum", None]: ...


class PendingSum(Protocol):
    """What is still to be added to a stream, and comes from elsewhere: see `parallel`."""

    @property
    def num_pieces(self) -> int: ...

    def add_to(self, x: torch.Tensor) -> None:
        """Add it to `x` [tokens, hidden], in place."""

    def add_and_normalize(self, x: torch.Tensor, norm: Norm, out: torch.Tensor) -> Iterator[slice]:
        """The same, and the sum through the norm into `out` [tokens, hidden]; yields which tokens
        are there, piece by piece."""


class Stream:
    """The residual stream of some tokens, to which each sub-layer adds its output.

    An addition is made in place: `x + product` uses up `x`, which must not be used afterwards. A
    product of some of the tokens leaves a stream of these alone.

    Args:
        x: [tokens, hidden].
        partials: [splits, tokens, hidden], or what is not even here yet, still to be added to `x`;
            the norm that comes next does it on its way.

    Raises:
        RuntimeError: if it is used after something was added to it.
    """

    def __init__(
        self, x: torch.Tensor, partials: Union[torch.Tensor, "PendingSum", None] = None
    ) -> None:
        self._x: torch.Tensor | None = x
        self._partials = partials

    @property
    def x(self) -> torch.Tensor:
        if self._x is None:
            raise RuntimeError("this stream was added to: use the sum in its place")
        return self._x

    @property
    def partials(self) -> torch.Tensor | None:
        """[splits, tokens, hidden]. What was not here is added to `x` at the latest now."""
        if (pending := self.pending) is not None:
            self._partials = None
            pending.add_to(self.x)
            return None
        assert self._partials is None or isinstance(self._partials, torch.Tensor)
        return self._partials

    @property
    def pending(self) -> PendingSum | None:
        """What is still to be added and is not here yet."""
        return None if isinstance(self._partials, torch.Tensor) else self._partials

    def take_partials(self) -> torch.Tensor | None:
        """`partials`, for who adds them to `x` now."""
        partials = self.partials
        self._partials = None
        return partials

    def take_pending(self) -> PendingSum | None:
        """`pending`, for who adds it to `x` now."""
        pending = self.pending
        if pending is not None:
            self._partials = None
        return pending

    def values(self) -> torch.Tensor:
        """[tokens, hidden], nothing left to be added."""
        if (partials := self.partials) is not None:
            self.x.copy_(self.x.float() + partials.sum(dim=0, dtype=torch.float32))
            self._partials = None
        return self.x

    def __add__(self, update: Union["Product", torch.Tensor]) -> "Stream":
        if isinstance(update, torch.Tensor):
            return Stream(self._use_up().add_(update))
        x = self._use_up()
        if update.tokens is not None:
            x = x[update.tokens]
        return Stream(x, update.multiplier.multiply_add(update.x, x))

    def __getitem__(self, tokens: torch.Tensor | slice) -> "Stream":
        """Some of the tokens: a copy, or with a slice a view."""
        return Stream(self.values()[tokens])

    def _use_up(self) -> torch.Tensor:
        x, self._x = self.values(), None
        return x


class Normed:
    """A stream through a norm, computed when its values are asked for, once."""

    def __init__(self, norm: Norm, stream: Stream) -> None:
        self.norm = norm
        self.stream = stream
        self._values: torch.Tensor | None = None

    @property
    def weight(self) -> torch.Tensor:
        return self.norm.weight

    @property
    def eps(self) -> float:
        return self.norm.eps

    @property
    def x(self) -> torch.Tensor:
        return self.stream.x

    @property
    def partials(self) -> torch.Tensor | None:
        return self.stream.partials

    def values(self) -> torch.Tensor:
        """[tokens, hidden]. The stream's partial sums are added to it on the way."""
        for _ in self.pieces():
            pass
        assert self._values is not None
        return self._values

    def in_fp8(self, group: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The values, for a kernel that multiplies in fp8; see `kernels.fp8_rows`."""
        if self._values is None and self.stream.pending is None:
            return self.norm.normalize_in_fp8(self.x, self.stream.take_partials(), group)
        return kernels.quantize_rows(self.values(), group)

    def pieces(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """(which tokens, their values), as what is still to be added to the stream arrives. They
        are parts of `values`. Go through all of them."""
        x, pending = self.stream.x, self.stream.take_pending()
        if pending is not None:
            self._values = torch.empty_like(x)
            for tokens in pending.add_and_normalize(x, self.norm, self._values):
                yield tokens, self._values[tokens]
            return
        if self._values is None:
            self._values = self.norm.normalize(x, self.stream.take_partials())
        yield slice(x.shape[0]), self._values


class Product:
    """x W^T + b, of a projection that has not been computed yet.

    Args:
        multiplier: the projection.
        x: [tokens, in], or what has still to be normalised to that.
        tokens: which of the stream's tokens these are, [any number] int64; None: all.
    """

    def __init__(
        self, multiplier: Multiplier, x: Input, tokens: torch.Tensor | None = None
    ) -> None:
        self.multiplier = multiplier
        self.x = x
        self.tokens = tokens

    def values(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """[tokens, out]; in the memory of `out` if that is given."""
        return self.multiplier.multiply(self.x, out)

    def gated(self, activation: str) -> torch.Tensor:
        """activation(gate) * up, [tokens, out / 2], gate and up being its halves."""
        return self.multiplier.multiply_gated(self.x, activation)

    def stored(self, *where: Any) -> torch.Tensor:
        """Queries ready for attention, [tokens, num_heads, head_dim]; it being queries, keys and
        values, of which the last two are stored. `where`: what `kernels.qk_norm_rope_store` takes
        besides."""
        return self.multiplier.multiply_store(self.x, *where)


def values_of(x: Input) -> torch.Tensor:
    """[tokens, in], normalised if that was still to be done."""
    return x if isinstance(x, torch.Tensor) else x.values()
