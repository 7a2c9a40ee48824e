"""Mixtures of experts for the kernel tests: inputs, routings of every kind, float64 answers."""

from typing import NamedTuple

import torch

from helpers.fp8 import fp8_weight, rounded
from helpers.kernel_inputs import FP32, normal
from nanovllm.quantization.fp8 import Fp8Weight


class Case(NamedTuple):
    """Inputs of `kernels.experts.apply_experts`."""

    x: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor

    def inner(self) -> torch.Tensor:
        """silu(gate) * up of each pair, [tokens * top_k, inner] float64."""
        top_k = self.experts.shape[1]
        gate, up = self._product(self.gate_up, self.x.repeat_interleave(top_k, dim=0)).chunk(2, 1)
        return gate * gate.sigmoid() * up

    def outputs(self, inner: torch.Tensor) -> torch.Tensor:
        """Of each pair, [tokens * top_k, hidden] float64."""
        return self._product(self.down, inner)

    def expected(self) -> torch.Tensor:
        """The weighted sums, [tokens, hidden] float64."""
        outputs = self.outputs(self.inner()).view(*self.experts.shape, -1)
        return (self.weights.double()[:, :, None] * outputs).sum(dim=1)

    def _product(self, weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Of each pair with its expert's weights, float64."""
        expert_of = self.experts.long().flatten()
        out = torch.empty(len(x), weights.shape[1], dtype=torch.float64, device=x.device)
        for expert in expert_of.unique():
            pairs = expert_of == expert
            out[pairs] = x[pairs].double() @ weights[expert].double().T
        return out


def make_case(
    experts: torch.Tensor,
    num_experts: int,
    hidden: int,
    inner: int,
    dtype: torch.dtype,
    device: str = "cpu",
) -> Case:
    """Random tokens and weights; the weights of experts that are not hit are NaN."""
    gate_up = normal(num_experts, 2 * inner, hidden, dtype=dtype, seed=1) / hidden**0.5
    down = normal(num_experts, hidden, inner, dtype=dtype, seed=2) / inner**0.5
    not_hit = [expert for expert in range(num_experts) if not (experts == expert).any()]
    gate_up[not_hit] = down[not_hit] = float("nan")
    x = normal(len(experts), hidden, dtype=dtype)
    weights = normal(*experts.shape, dtype=FP32, seed=3).softmax(dim=1)
    return Case(*(each.to(device) for each in (x, experts.int(), weights, gate_up, down)))


class Fp8Case(NamedTuple):
    """The same with weights in fp8. `exact` has what they stand for, and x rounded to fp8."""

    x: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor
    gate_up: Fp8Weight
    down: Fp8Weight
    exact: Case

    def sums(self, inner: torch.Tensor) -> torch.Tensor:
        """The weighted sums if this is `inner`, before it is rounded: [tokens, hidden] float64."""
        outputs = self.exact.outputs(rounded(inner, self.down.group))
        return (self.weights.double()[:, :, None] * outputs.view(*self.experts.shape, -1)).sum(1)


def make_fp8_case(
    experts: torch.Tensor,
    num_experts: int,
    hidden: int,
    inner: int,
    dtype: torch.dtype,
    group: int | None,
    device: str = "cpu",
) -> Fp8Case:
    """Random tokens, one of them zero, and weights; those of experts that are not hit are NaN."""
    gate_up, exact_gate_up = _fp8_stack(num_experts, 2 * inner, hidden, group, seed=1)
    down, exact_down = _fp8_stack(num_experts, hidden, inner, group, seed=2)
    not_hit = [expert for expert in range(num_experts) if not (experts == expert).any()]
    for weight in (gate_up, down):
        weight.values.view(torch.uint8)[not_hit] = 0x7F
        weight.scale[not_hit] = float("nan")
    x = normal(len(experts), hidden, dtype=dtype)
    x[0], x[-1, hidden // 2] = 0, 100
    weights = normal(*experts.shape, dtype=FP32, seed=3).softmax(dim=1)
    given = x, experts.int(), weights
    exact = Case(rounded(x, gate_up.group), *given[1:], exact_gate_up, exact_down)
    factors = [Fp8Weight(*(each.to(device) for each in weight)) for weight in (gate_up, down)]
    exact = Case(*(each.to(device) for each in exact))
    return Fp8Case(*(each.to(device) for each in given), *factors, exact)


def _fp8_stack(
    num_experts: int, out: int, k: int, group: int | None, seed: int
) -> tuple[Fp8Weight, torch.Tensor]:
    weights, exact = zip(
        *(fp8_weight(out, k, group, seed=10 * seed + each) for each in range(num_experts)),
        strict=True,
    )
    values = torch.stack([weight.values for weight in weights])
    scale = torch.stack([weight.scale.t() for weight in weights]).mT
    return Fp8Weight(values, scale), torch.stack(exact)


def random_experts(tokens: int, top_k: int, num_experts: int, seed: int = 0) -> torch.Tensor:
    """[tokens, top_k], no expert twice for a token."""
    return normal(tokens, num_experts, dtype=FP32, seed=seed).topk(top_k, dim=1).indices


# Of 5 experts.
ROUTINGS = {
    "one token": random_experts(1, 3, 5),
    "all to one expert": torch.full((40, 1), 3),
    "to the last alone, and to the first": torch.tensor([[4, 0]] * 17),
    "one expert has one token": torch.tensor([[0, 1]] * 20 + [[2, 1]] + [[1, 0]] * 13),
    "a whole tile and one more": torch.tensor([[1, 2]] * 16 + [[2, 3]]),
    "all to all": random_experts(9, 5, 5),
    "random": random_experts(70, 2, 5),
}
