"""A mixture of experts in place of an MLP (Shazeer et al. 2017, arXiv:1701.06538)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.layers.activation import activate_and_mul
from nanovllm.layers.deferred import Input, PendingSum, Product, Stream, values_of
from nanovllm.layers.linear import Linear
from nanovllm.layers.mlp import GatedMLP
from nanovllm.utils.kernels import has_kernels, kernels
from nanovllm.utils.loader import Stack, View

_ALL = slice(None)


class Routing(NamedTuple):
    """Which experts each token goes to.

    Attributes:
        experts: [tokens, top_k] int64 or int32, the likeliest first.
        weights: [tokens, top_k] float32, by which their outputs are added up.
    """

    experts: torch.Tensor
    weights: torch.Tensor


class SparseMoE(nn.Module):
    """sum over the chosen experts e of weight[e] * down_e(activation(gate_e(x)) * up_e(x)), and for
    every token sigmoid(shared_expert_gate(x)) * shared_expert(x), if there is a shared expert.

    Args:
        hidden_size, inner_size: outside, and inside of one expert.
        num_experts: of which each token goes to the `top_k` that the router prefers.
        renormalize: whether the chosen ones' weights are made to sum up to 1.
        shared_size: inside of the shared expert; 0: there is none.
        activation: see `layers.activation.ACTIVATIONS`.
    """

    def __init__(
        self,
        hidden_size: int,
        inner_size: int,
        num_experts: int,
        top_k: int,
        *,
        renormalize: bool,
        shared_size: int = 0,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        self.top_k, self.renormalize = top_k, renormalize
        self.gate = Linear(hidden_size, num_experts)
        self.experts = Experts(hidden_size, inner_size, num_experts, activation)
        self.shared_expert: GatedMLP | None = None
        if shared_size:
            self.shared_expert = GatedMLP(hidden_size, shared_size, activation=activation)
            self.shared_expert_gate = Linear(hidden_size, 1)

    def forward(self, x: Input) -> Product:
        """What is to be added to the stream of `x`."""
        # Router and experts both need the values, before the stream is added to.
        return Product(self, values_of(x))

    def multiply(self, x: Input, out: torch.Tensor | None = None) -> torch.Tensor:
        """[tokens, hidden], in the dtype of x; in the memory of `out` if that is given."""
        x = values_of(x)
        y = self.experts(x, self.route(x))
        if (shared := self._shared(x)) is not None:
            y.add_(shared.values())
        return y if out is None else out.copy_(y)

    def multiply_gated(self, x: Input, activation: str) -> torch.Tensor:
        raise NotImplementedError("the output of experts has no halves")

    def multiply_add(self, x: Input, stream: torch.Tensor) -> torch.Tensor | PendingSum | None:
        """Add the output to `stream` [tokens, hidden], in place, or return what is still to be
        added."""
        x = values_of(x)
        return self.experts.add_to(stream, x, self.route(x), self._shared(x))

    def route(self, x: torch.Tensor) -> Routing:
        """The experts of `x` [tokens, hidden]."""
        return route(self.gate(x).values(), self.top_k, self.renormalize)

    def _shared(self, x: torch.Tensor) -> Product | None:
        """The output of the shared expert."""
        if (mlp := self.shared_expert) is None:
            return None
        inner = mlp.act_and_mul(mlp.gate_up_proj(x))
        # One number a token, which may as well be multiplied before the projection: so the product
        # is still to be made, and of several ranks each has a summand of it.
        return mlp.down_proj(inner.mul_(self.shared_expert_gate(x).values().sigmoid()))


class Experts(nn.Module):
    """The MLPs of all experts, their weights one after the other.

    Args: see `SparseMoE`.

    Attributes:
        can_run_ahead: whether its kernels may run on inputs that nobody has computed. These read
            weights at places that the router gives.
    """

    can_run_ahead = False

    def __init__(
        self, hidden_size: int, inner_size: int, num_experts: int, activation: str
    ) -> None:
        super().__init__()
        self.activation = activation
        # gate then up, as in the checkpoints of transformers 5
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * inner_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, inner_size))

    @property
    def inner_size(self) -> int:
        return self.down_proj.shape[2]

    def forward(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """[tokens, hidden] in the dtype of x.

        The experts' outputs are added up in float32, those of a token in the order of the experts,
        so that the sum depends on no other token.
        """
        if self._has_kernels(x):
            return kernels.apply_experts(x, *routing, self.gate_up_proj, self.down_proj)
        weights = routing.weights.flatten()
        pairs = routing.experts.flatten().argsort(stable=True)  # of token and expert, by expert
        counts = routing.experts.flatten().bincount(minlength=len(self.down_proj)).tolist()
        y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert, own in enumerate(pairs.split(counts)):
            if len(own):
                tokens = own // routing.experts.shape[1]
                gate_up = F.linear(x[tokens], self.gate_up_proj[expert])
                inner = activate_and_mul(gate_up, self.activation)
                outputs = F.linear(inner, self.down_proj[expert])
                y.index_add_(0, tokens, outputs * weights[own, None])
        return y.to(x.dtype)

    def add_to(
        self,
        stream: torch.Tensor,
        x: torch.Tensor,
        routing: Routing,
        shared: Product | None = None,
    ) -> torch.Tensor | PendingSum | None:
        """Add what `forward` returns, and the output of a shared expert, to `stream` [tokens,
        hidden], in place, or return what is still to be added."""
        partials = None if shared is None else (Stream(stream) + shared).partials
        if self._has_kernels(x):
            kernels.apply_experts(x, *routing, self.gate_up_proj, self.down_proj, stream)
        else:
            stream.add_(self(x, routing))
        return partials

    @property
    def can_capture(self) -> bool:
        """Whether a CUDA Graph can hold it: in plain torch the host waits for the counts."""
        return kernels is not None and self.activation == "silu"

    def _has_kernels(self, x: torch.Tensor) -> bool:
        return has_kernels(x) and self.can_capture

    def checkpoint_views(self, path: str) -> dict[str, View]:
        """The memory of each expert's weights, by their names in the checkpoint."""
        return self.views_of_part(path, self.inner_size, slice(0, self.inner_size))

    def views_of_part(self, path: str, inner_size: int, part: slice) -> dict[str, View]:
        """The same if these are experts' features `part`, of `inner_size`.

        transformers 4 writes three matrices for each expert, and so does 5 unless told otherwise;
        else it writes two stacks, as they are here.
        """
        views = {}
        num_experts, hidden_size, own_size = self.down_proj.shape
        gate_ups = self.gate_up_proj.data.split(own_size, dim=1)
        for name, memory, first in zip(("gate", "up"), gate_ups, (0, inner_size), strict=True):
            for expert in range(num_experts):
                index = (expert, slice(first, first + inner_size))
                shape = (num_experts, 2 * inner_size, hidden_size)
                views[f"{path}.{expert}.{name}_proj.weight"] = View(
                    memory[expert], (inner_size, hidden_size), (part, _ALL),
                    Stack(f"{path}.gate_up_proj", shape, index),
                )  # fmt: skip
        for expert in range(num_experts):
            shape = (num_experts, hidden_size, inner_size)
            views[f"{path}.{expert}.down_proj.weight"] = View(
                self.down_proj.data[expert], shape[1:], (_ALL, part),
                Stack(f"{path}.down_proj", shape, (expert,)),
            )  # fmt: skip
        return views


def route(logits: torch.Tensor, top_k: int, renormalize: bool) -> Routing:
    """The `top_k` experts with the largest probabilities; see `Routing`.

    Args:
        logits: [tokens, experts], of the router; the softmax is computed in float32.
        renormalize: divide the chosen ones' probabilities by their sum.
    """
    if has_kernels(logits):
        return Routing(*kernels.route(logits, top_k, renormalize))
    weights, experts = logits.softmax(dim=-1, dtype=torch.float32).topk(top_k, dim=-1)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return Routing(experts, weights)
