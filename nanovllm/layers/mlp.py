"""The gated MLP of a decoder layer."""

from torch import nn

from nanovllm.layers.activation import ActivationAndMul
from nanovllm.layers.deferred import Input, Product
from nanovllm.layers.linear import Linear, MergedLinear


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)).

    Args:
        hidden_size, intermediate_size: outside and inside.
        bias: whether the three projections have one.
        activation: see `layers.activation.ACTIVATIONS`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool = False,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        parts = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up_proj = MergedLinear(hidden_size, parts, bias)
        self.act_and_mul = ActivationAndMul(activation)
        self.down_proj = Linear(intermediate_size, hidden_size, bias)

    def forward(self, x: Input) -> Product:
        """What is to be added to the stream of `x`."""
        return self.down_proj(self.act_and_mul(self.gate_up_proj(x)))
