"""A mixture of experts in place of an MLP (Shazeer et al. 2017, arXiv:1701.06538)."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.layers.activation import activate_and_mul
from nanovllm.layers.deferred import Input, PendingSum, Product, Stream, values_of
from nanovllm.layers.linear import Linear
from nanovllm.layers.mlp import GatedMLP
from nanovllm.quantization.fp8 import GROUP, Fp8Weight, fp8_linear, num_groups, stored_weight
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

    def gates(self) -> list[Linear]:
        """What says which experts a token gets, and how much of them."""
        return [self.gate] if self.shared_expert is None else [self.gate, self.shared_expert_gate]

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

    def multiply_store(self, x: Input, *where: Any) -> torch.Tensor:
        raise NotImplementedError("the output of experts has no keys and values")

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
        inner = values_of(mlp.act_and_mul(mlp.gate_up_proj(x)))
        # One number a token, which may as well be multiplied before the projection: so the product
        # is still to be made, and of several ranks each has a summand of it.
        return mlp.down_proj(inner.mul_(self.shared_expert_gate(x).values().sigmoid()))


class Experts(nn.Module):
    """The MLPs of all experts, their weights one after the other.

    Args: see `SparseMoE`.

    Attributes:
        can_run_ahead: whether its kernels may run on inputs that nobody has computed. These read
            weights at places that the router gives.
        gate_up_scale, down_scale: of weights in fp8, see `quantization.fp8.Fp8Weight`; else None.
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
        self.gate_up_scale: nn.Parameter | None = None
        self.down_scale: nn.Parameter | None = None

    @property
    def inner_size(self) -> int:
        return self.down_proj.shape[2]

    @property
    def gate_up(self) -> torch.Tensor | Fp8Weight:
        """[experts, 2 * inner, hidden], as kernels take it."""
        return stored_weight(self.gate_up_proj, self.gate_up_scale)

    @property
    def down(self) -> torch.Tensor | Fp8Weight:
        """[experts, hidden, inner], as kernels take it."""
        return stored_weight(self.down_proj, self.down_scale)

    def store_in_fp8(self, group: int | None) -> None:
        """Hold the weights in fp8 from now on, with a scale for each output, or with `group` for
        each output and so many inputs. Call it before there is memory."""
        parameters_like = Fp8Weight.parameters_like
        self.gate_up_proj, self.gate_up_scale = parameters_like(self.gate_up_proj, group)
        self.down_proj, self.down_scale = parameters_like(self.down_proj, group)

    def forward(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """[tokens, hidden] in the dtype of x.

        The experts' outputs are added up in float32, those of a token in the order of the experts,
        so that the sum depends on no other token.
        """
        if self._has_kernels(x):
            return kernels.apply_experts(x, *routing, self.gate_up, self.down)
        weights = routing.weights.flatten()
        pairs = routing.experts.flatten().argsort(stable=True)  # of token and expert, by expert
        counts = routing.experts.flatten().bincount(minlength=len(self.down_proj)).tolist()
        y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert, own in enumerate(pairs.split(counts)):
            if len(own):
                tokens = own // routing.experts.shape[1]
                gate_up = _multiply(x[tokens], self.gate_up, expert)
                inner = activate_and_mul(gate_up, self.activation)
                outputs = _multiply(inner, self.down, expert)
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
            kernels.apply_experts(x, *routing, self.gate_up, self.down, stream)
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
        views = _views_of_stacks(
            path, "", (self.gate_up_proj.data, inner_size, part),
            (self.down_proj.data, inner_size, part),
        )  # fmt: skip
        if self.gate_up_scale is not None and self.down_scale is not None:
            down, first = self.down_scale.data, part.start // GROUP
            groups = slice(first, first + down.shape[2])
            views |= _views_of_stacks(
                path, "_scale", (self.gate_up_scale.data, inner_size, part),
                (down, num_groups(inner_size, GROUP), groups),
            )  # fmt: skip
        return views

    def projections(self) -> list[str]:
        """The paths of all matrices, from here, in a checkpoint that has them apart."""
        names = ("gate_proj", "up_proj", "down_proj")
        return [f"{expert}.{name}" for expert in range(len(self.down_proj)) for name in names]


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


def _multiply(x: torch.Tensor, weights: torch.Tensor | Fp8Weight, expert: int) -> torch.Tensor:
    if isinstance(weights, Fp8Weight):
        return fp8_linear(x, weights.at(expert))
    return F.linear(x, weights[expert])


# A stack's memory; how many features, or groups of them, are inside of an expert, and which of
# them it has: rows of gate and of up, and columns of down.
_Stacked = tuple[torch.Tensor, int, slice]


def _views_of_stacks(path: str, kind: str, gate_up: _Stacked, down: _Stacked) -> dict[str, View]:
    """Of the weights of all experts; with the `kind` "_scale" of their scales."""
    views: dict[str, View] = {}
    memory, size, part = gate_up
    num_experts, own_size, columns = len(memory), memory.shape[1] // 2, memory.shape[2]
    shape: tuple[int, ...] = (num_experts, 2 * size, columns)
    for name, half, first in zip(
        ("gate", "up"), memory.split(own_size, dim=1), (0, size), strict=True
    ):
        for expert in range(num_experts):
            index = (expert, slice(first, first + size))
            views[f"{path}.{expert}.{name}_proj.weight{kind}"] = View(
                half[expert], (size, columns), (part, _ALL),
                Stack(f"{path}.gate_up_proj{kind}", shape, index),
            )  # fmt: skip
    memory, size, part = down
    shape = (num_experts, memory.shape[1], size)
    for expert in range(num_experts):
        views[f"{path}.{expert}.down_proj.weight{kind}"] = View(
            memory[expert], shape[1:], (_ALL, part),
            Stack(f"{path}.down_proj{kind}", shape, (expert,)),
        )  # fmt: skip
    return views
