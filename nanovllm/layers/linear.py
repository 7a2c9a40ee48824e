"""Linear layers: projections, made when they are used (see `layers.deferred`)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.layers.activation import activate_and_mul
from nanovllm.layers.deferred import Input, Normed, PendingSum, Product, values_of
from nanovllm.layers.packed_weight import OneDnnWeight, one_row_product
from nanovllm.layers.paged_attention import norm_rope_store
from nanovllm.quantization.fp8 import Fp8Weight, fp8_linear, stored_weight
from nanovllm.utils.kernels import has_kernels, kernels
from nanovllm.utils.loader import View


class Linear(nn.Module):
    """y = x W^T + b.

    Args:
        in_features, out_features: W is [out_features, in_features].
        bias: whether there is a b, [out_features].

    Attributes:
        weight_scale: of a weight in fp8, see `quantization.fp8.Fp8Weight`; else None.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.weight_scale: nn.Parameter | None = None
        self._packed: OneDnnWeight | None = None

    def forward(self, x: Input, tokens: torch.Tensor | None = None) -> Product:
        """The product, still to be made. `tokens`: see `Product`."""
        return Product(self, x, tokens)

    def multiply(self, x: Input, out: torch.Tensor | None = None) -> torch.Tensor:
        """[tokens, out_features], in the dtype of x; in the memory of `out` if that is given."""
        if has_kernels(self.weight):
            return kernels.matmul(x, self.factor, self.bias, out)
        y = self._plain(values_of(x))
        return y if out is None else out.copy_(y)

    def multiply_gated(self, x: Input, activation: str) -> torch.Tensor:
        """activation(gate) * up, [tokens, out_features / 2], gate and up being the halves of y.

        With a weight in fp8 a kernel may return a `kernels.fp8_linear.Gated` in place of a tensor:
        the product that comes next computes it, in fp8.
        """
        if has_kernels(self.weight) and activation == "silu":
            return kernels.gated_matmul(x, self.factor, self.bias)
        return activate_and_mul(self.multiply(x), activation)

    def multiply_store(self, x: Input, *where: Any) -> torch.Tensor:
        """Queries ready for attention, with keys and values stored: see `Product.stored`."""
        if has_kernels(self.weight):
            return kernels.store_matmul(x, self.factor, self.bias, *where)
        return norm_rope_store(self.multiply(x), *where)

    def multiply_add(self, x: Input, stream: torch.Tensor) -> torch.Tensor | PendingSum | None:
        """Add y to `stream` [tokens, out_features], in place.

        Returns:
            None, or partial sums [splits, tokens, out_features] float32 that are still to be added.
        """
        if has_kernels(self.weight):
            x = x.values() if isinstance(x, Normed) else x
            return kernels.add_matmul(stream, x, self.factor, self.bias)
        stream.add_(self._plain(values_of(x)))
        return None

    @property
    def factor(self) -> torch.Tensor | Fp8Weight:
        """W, as kernels take it."""
        return stored_weight(self.weight, self.weight_scale)

    def dequantized_weight(self) -> torch.Tensor:
        """[out_features, in_features], not in fp8."""
        factor = self.factor
        return factor.dequantized() if isinstance(factor, Fp8Weight) else factor

    def store_in_fp8(self, group: int | None) -> None:
        """Hold the weight in fp8 from now on, with a scale for each output, or with `group` for
        each output and so many inputs. Call it before there is memory."""
        self.weight, self.weight_scale = Fp8Weight.parameters_like(self.weight, group)

    def pack(self, keep_plain: bool = False) -> None:
        """On a CPU, let oneDNN have the weight in its own layout, if it can. Call after loading.

        Args:
            keep_plain: keep the plain one, too, with which a single row is faster.
        """
        if not OneDnnWeight.serves(self.weight):
            return
        self._packed = OneDnnWeight(self.weight)
        if self._packed.can_replace_weight and not keep_plain:
            # The old one may be the embedding's, too: it is dropped here, not emptied.
            self.weight = nn.Parameter(self.weight[:0].clone(), requires_grad=False)

    def unpack(self) -> None:
        """Undo `pack`, so that `weight` is there to be written to. One that was also the
        embedding's may be a copy then, until it is tied again."""
        if self._packed is not None and not self._has_plain:
            self.weight = nn.Parameter(self._packed.unpack(), requires_grad=False)
        self._packed = None

    @property
    def _has_plain(self) -> bool:
        return self.weight.shape[0] > 0

    def _plain(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed is not None:
            if x.shape[0] == 1 and self._has_plain:
                return one_row_product(x, self.weight, self.bias)
            return self._packed.multiply(x, self.bias)
        if isinstance(factor := self.factor, Fp8Weight):
            return fp8_linear(x, factor, self.bias)
        return F.linear(x, self.weight, self.bias)


class MergedLinear(Linear):
    """Several projections of the same input, in one matrix: q/k/v, or gate/up.

    Args:
        parts: each projection's name in the checkpoint, and its number of output features.
    """

    def __init__(self, in_features: int, parts: dict[str, int], bias: bool = False) -> None:
        super().__init__(in_features, sum(parts.values()), bias)
        self.parts = parts

    def checkpoint_views(self, path: str) -> dict[str, View]:
        """The memory of each part, by its name in the checkpoint: beside `path`, this module's."""
        parent, views = path.rpartition(".")[0], {}
        for kind, parameter in self.named_parameters():
            pieces = parameter.data.split(list(self.parts.values()))
            for name, piece in zip(self.parts, pieces, strict=True):
                views[f"{parent}.{name}.{kind}"] = View.whole(piece)
        return views
