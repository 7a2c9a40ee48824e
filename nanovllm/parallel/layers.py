"""Linear layers, experts and the embedding, of which a rank has a part; see `parallel.sharding`."""

from collections.abc import Iterator
from typing import Any, TypeGuard

import torch

from nanovllm.layers.activation import activate_and_mul
from nanovllm.layers.deferred import Input, Norm, Normed, PendingSum, Product, values_of
from nanovllm.layers.embed_head import Embedding, LMHead
from nanovllm.layers.linear import Linear, MergedLinear
from nanovllm.layers.moe import Experts, Routing
from nanovllm.parallel.group import Group
from nanovllm.parallel.peer_memory import Peers
from nanovllm.quantization.fp8 import GROUP, num_groups
from nanovllm.utils.kernels import has_kernels, kernels
from nanovllm.utils.loader import View

_ALL = slice(None)


class ColumnParallelLinear(MergedLinear):
    """Some of the output features of each part of a merged projection.

    Args:
        whole: the projection.
        slices: of each part the features that are here, by its name.
    """

    def __init__(self, whole: MergedLinear, slices: dict[str, slice]) -> None:
        parts = {name: part.stop - part.start for name, part in slices.items()}
        super().__init__(whole.in_features, parts, whole.bias is not None)
        self.whole_parts, self.slices = whole.parts, slices

    def multiply(self, x: Input, out: torch.Tensor | None = None) -> torch.Tensor:
        if not _comes_in_pieces(x):
            return super().multiply(x, out)
        if out is None:
            out = x.x.new_empty(len(x.x), self.out_features)
        for tokens, values in x.pieces():  # the next piece arrives meanwhile
            super().multiply(values, out[tokens])
        return out

    def multiply_gated(self, x: Input, activation: str) -> torch.Tensor:
        if not _comes_in_pieces(x):
            return super().multiply_gated(x, activation)
        y = self.multiply(x)
        return kernels.silu_and_mul(y) if activation == "silu" else activate_and_mul(y, activation)

    def multiply_store(self, x: Input, *where: Any) -> torch.Tensor:
        if not _comes_in_pieces(x):
            return super().multiply_store(x, *where)
        return kernels.qk_norm_rope_store(self.multiply(x), *where)

    def checkpoint_views(self, path: str) -> dict[str, View]:
        views = super().checkpoint_views(path)
        parts = zip(self.whole_parts.values(), self.slices.values(), strict=True)
        cuts = [*parts] * len([*self.parameters()])  # of the weights, then of the biases, if any
        for (name, view), (size, cut) in zip(views.items(), cuts, strict=True):
            views[name] = View(view.memory, (size, *view.shape[1:]), (cut, *view.part[1:]))
        return views


def _comes_in_pieces(x: Input) -> TypeGuard[Normed]:
    """Whether the norm is to be applied piece by piece."""
    if isinstance(x, torch.Tensor) or (pending := x.stream.pending) is None:
        return False
    return pending.num_pieces > 1


class RowParallelLinear(Linear):
    """Some of the input features of a projection: a product is a summand of the whole one.

    Args:
        whole: the projection.
        part: the input features that are here.
    """

    def __init__(self, whole: Linear, part: slice, group: Group) -> None:
        # The bias is added once, by rank 0.
        has_bias = whole.bias is not None
        super().__init__(part.stop - part.start, whole.out_features, has_bias and group.rank == 0)
        self.whole_in_features, self.part, self.group = whole.in_features, part, group
        self.drops_bias = has_bias and group.rank != 0

    def checkpoint_views(self, path: str) -> dict[str, View]:
        whole_shape = (self.out_features, self.whole_in_features)
        views = {f"{path}.weight": View(self.weight.data, whole_shape, (_ALL, self.part))}
        if self.bias is not None:
            views[f"{path}.bias"] = View.whole(self.bias.data)
        elif self.drops_bias:
            views[f"{path}.bias"] = View.whole(torch.empty(self.out_features, device="meta"))
        if self.weight_scale is not None:
            scale, first = self.weight_scale.data, self.part.start // GROUP
            shape = (self.out_features, num_groups(self.whole_in_features, GROUP))
            groups = slice(first, first + scale.shape[1])
            views[f"{path}.weight_scale"] = View(scale, shape, (_ALL, groups))
        return views

    def summand(self, x: Input) -> torch.Tensor:
        """[tokens, out_features], this rank's."""
        return super().multiply(x)

    def multiply(self, x: Input, out: torch.Tensor | None = None) -> torch.Tensor:
        return self.group.all_reduce(super().multiply(x, out))

    def multiply_gated(self, x: Input, activation: str) -> torch.Tensor:
        raise NotImplementedError("gate and up are columns: see ColumnParallelLinear")

    def multiply_store(self, x: Input, *where: Any) -> torch.Tensor:
        raise NotImplementedError("keys and values are columns: see ColumnParallelLinear")

    def multiply_add(self, x: Input, stream: torch.Tensor) -> PendingSum | None:
        """Add the sum over the ranks to `stream`, in place, or return what is still to be added."""
        x = values_of(x)
        if has_kernels(self.weight):
            if (peers := self.group.peers_for(stream)) is not None:
                return SumOverRanks(kernels.summands(x, self.factor, self.bias), peers)
            if (copies := self.group.copies_for(stream)) is not None:
                make, n = super().multiply, self.out_features
                pieces = 2 if self.in_features >= n else 4
                return copies.send(len(x), n, lambda rows, out: make(x[rows], out), pieces)
        if self.group.rank:
            stream.zero_()  # what it had before the sum gets from rank 0
        partials = super().multiply_add(x, stream)
        if isinstance(partials, torch.Tensor):
            stream.copy_(stream + partials.sum(dim=0))
        self.group.all_reduce(stream)
        return None


class SumOverRanks:
    """A sum by `kernels.all_reduce`; see `layers.deferred.PendingSum`."""

    num_pieces = 1

    def __init__(self, summands: torch.Tensor, peers: Peers) -> None:
        self._summands, self._peers = summands, peers

    def add_to(self, x: torch.Tensor) -> None:
        kernels.all_reduce_add(x, self._summands, self._peers)

    def add_and_normalize(self, x: torch.Tensor, norm: Norm, out: torch.Tensor) -> Iterator[slice]:
        self.add_to(x)
        norm.normalize(x, None, out)
        yield slice(len(x))


class ParallelExperts(Experts):
    """Some of the inner features of every expert: the output is a summand of the whole one.

    Args:
        whole: the experts.
        part: the inner features that are here.
    """

    def __init__(self, whole: Experts, part: slice, group: Group) -> None:
        num_experts, hidden_size, self.whole_inner_size = whole.down_proj.shape
        super().__init__(hidden_size, part.stop - part.start, num_experts, whole.activation)
        self.part, self.group = part, group

    def checkpoint_views(self, path: str) -> dict[str, View]:
        return self.views_of_part(path, self.whole_inner_size, self.part)

    def forward(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        return self.group.all_reduce(super().forward(x, routing))

    def add_to(
        self,
        stream: torch.Tensor,
        x: torch.Tensor,
        routing: Routing,
        shared: Product | None = None,
    ) -> PendingSum | None:
        """Add the sum over the ranks to `stream`, in place, or return what is still to be added."""
        y = super().forward(x, routing)
        if shared is not None:  # one sum for both
            assert isinstance(shared.multiplier, RowParallelLinear)
            y.add_(shared.multiplier.summand(shared.x))
        if has_kernels(x) and (peers := self.group.peers_for(stream)) is not None:
            return SumOverRanks(y, peers)
        stream.add_(self.group.all_reduce(y))
        return None


class VocabParallelEmbedding(Embedding):
    """The vectors of some tokens, zeros for the others: the sum over the ranks has all.

    Args:
        whole: the embedding.
        tokens: those that are here.
    """

    def __init__(self, whole: Embedding, tokens: slice, group: Group) -> None:
        self.whole_shape = tuple(whole.weight.shape)
        super().__init__(tokens.stop - tokens.start, self.whole_shape[1])
        self.tokens, self.group = tokens, group

    def checkpoint_views(self, path: str) -> dict[str, View]:
        return {f"{path}.weight": View(self.weight.data, self.whole_shape, (self.tokens, _ALL))}

    def forward(self, token_ids: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
        if has_kernels(self.weight):
            return self.group.all_reduce(
                kernels.embed(token_ids, sampled, self.weight, self.tokens)
            )
        newest = sampled[(-1 - token_ids).clamp_(min=0)]
        places = torch.where(token_ids < 0, newest, token_ids) - self.tokens.start
        is_here = (places >= 0) & (places < len(self.weight))
        vectors = self.weight[places.where(is_here, 0)].where(is_here[:, None], 0)
        return self.group.all_reduce(vectors)


class VocabParallelHead(LMHead):
    """The logits of some tokens.

    Args:
        whole: the output head.
        tokens: those whose logits are here.
    """

    def __init__(self, whole: LMHead, tokens: slice) -> None:
        super().__init__(whole.in_features, tokens.stop - tokens.start)
        self.whole_shape, self.tokens = tuple(whole.weight.shape), tokens

    def checkpoint_views(self, path: str) -> dict[str, View]:
        return {f"{path}.weight": View(self.weight.data, self.whole_shape, (self.tokens, _ALL))}
