"""Layers of which a rank has a part. What comes from the others is played by the test."""

from collections.abc import Iterator
from copy import deepcopy
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from nanovllm.layers.activation import activate_and_mul
from nanovllm.layers.deferred import Norm, Normed, Stream
from nanovllm.layers.embed_head import Embedding
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import Linear, MergedLinear
from nanovllm.layers.moe import SparseMoE
from nanovllm.layers.paged_attention import norm_rope_store
from nanovllm.parallel import layers as parallel_layers
from nanovllm.parallel.layers import (
    ColumnParallelLinear,
    ParallelExperts,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from nanovllm.utils.loader import View


class Pending:
    """Summands that come in pieces; notes what has been asked of it."""

    def __init__(self, parts: torch.Tensor, pieces: list[slice]) -> None:
        self.parts, self.pieces, self.num_pieces = parts, pieces, len(pieces)
        self.asked: list[str] = []

    def add_to(self, x: torch.Tensor) -> None:
        self.asked.append("sum")
        x.add_(self.parts.sum(dim=0))

    def add_and_normalize(self, x: torch.Tensor, norm: Norm, out: torch.Tensor) -> Iterator[slice]:
        for tokens in self.pieces:
            self.asked.append("norm")
            norm.normalize(x[tokens], self.parts[:, tokens], out[tokens])
            yield tokens


class Case:
    """A stream of 7 tokens with summands of two ranks under way, and its norm."""

    def __init__(self, *cuts: int) -> None:
        generator = torch.Generator().manual_seed(len(cuts))
        self.x, self.parts = (
            torch.randn(shape, generator=generator) for shape in ((7, 8), (2, 7, 8))
        )
        bounds = [0, *cuts, 7]
        self.pending = Pending(self.parts, [slice(a, b) for a, b in pairwise(bounds)])
        self.stream = Stream(self.x.clone(), self.pending)
        self.norm = RMSNorm(8, 1e-6)
        self.norm.weight.data.uniform_(0.5, 1.5, generator=generator)
        self.total = self.x + self.parts.sum(dim=0)
        self.normed = F.rms_norm(self.total, (8,), self.norm.weight, 1e-6)
        self.linear = ColumnParallelLinear(
            MergedLinear(8, {"gate": 10, "up": 10}), {"gate": slice(0, 4), "up": slice(0, 4)}
        )
        self.linear.weight.data.normal_(generator=generator)
        self.expected = F.linear(self.normed, self.linear.weight)


@pytest.mark.parametrize("cuts", [(), (3,), (2, 4)])
@pytest.mark.parametrize("gives_out", [False, True])
@torch.inference_mode()
def test_a_product_is_made_as_its_input_arrives(cuts: tuple[int, ...], gives_out: bool):
    case = Case(*cuts)
    out = torch.full((7, 8), float("nan")) if gives_out else None
    x = case.norm(case.stream)
    torch.testing.assert_close(case.linear.multiply(x, out), case.expected)
    assert case.pending.asked == ["norm"] * (len(cuts) + 1)
    torch.testing.assert_close(case.stream.values(), case.total)
    torch.testing.assert_close(x.values(), case.normed)
    assert len(case.pending.asked) == len(cuts) + 1, "added twice"


@pytest.mark.parametrize("cuts", [(), (2, 4)])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
@torch.inference_mode()
def test_gate_and_up_likewise(cuts: tuple[int, ...], activation: str):
    case = Case(*cuts)
    found = case.linear.multiply_gated(case.norm(case.stream), activation)
    torch.testing.assert_close(found, activate_and_mul(case.expected, activation))


@pytest.mark.parametrize("cuts", [(), (2, 4)])
@torch.inference_mode()
def test_keys_and_values_are_stored_when_all_of_the_input_is_there(
    monkeypatch: pytest.MonkeyPatch, cuts: tuple[int, ...]
):
    case = Case(*cuts)
    caches = torch.zeros(2, 1, 8, 1, 2), torch.zeros(2, 1, 8, 1, 2)
    order, cos_sin = torch.arange(7).int(), torch.randn(8, 2)
    args = [(None, None, 0.0, cos_sin, order, *both, order) for both in caches]
    if cuts:  # the kernel is a stand-in's
        kernels = SimpleNamespace(qk_norm_rope_store=norm_rope_store)
        monkeypatch.setattr(parallel_layers, "kernels", kernels)
    found = case.linear.multiply_store(case.norm(case.stream), *args[0])
    torch.testing.assert_close(found, norm_rope_store(case.expected, *args[1]))
    torch.testing.assert_close(*caches)
    assert caches[0].count_nonzero() == 28
    assert case.pending.asked == ["norm"] * (len(cuts) + 1)


@torch.inference_mode()
def test_who_knows_nothing_of_ranks_gets_the_sum():
    case = Case(3)
    whole = Linear(8, 5)
    whole.weight.data.normal_()
    torch.testing.assert_close(
        whole(case.norm(case.stream)).values(), F.linear(case.normed, whole.weight)
    )
    case = Case(3)
    assert case.stream.partials is None and case.pending.asked == ["sum"]
    torch.testing.assert_close(case.stream.x, case.total)
    case = Case(3)
    torch.testing.assert_close(case.stream[2:5].x, case.total[2:5])
    case = Case(3)
    torch.testing.assert_close((case.stream + torch.ones(7, 8)).x, case.total + 1)


def one_of_two(rank: int, sums: list[torch.Tensor]) -> SimpleNamespace:
    """A group whose sums are noted, and left as they are."""

    def all_reduce(x: torch.Tensor) -> torch.Tensor:
        sums.append(x.clone())
        return x

    return SimpleNamespace(rank=rank, size=2, all_reduce=all_reduce)


@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_the_stream_and_the_bias_are_summed_up_once(bias: bool):
    whole = Linear(6, 4, bias)
    for parameter in whole.parameters():
        parameter.data.normal_()
    x, stream = torch.randn(3, 6), torch.randn(3, 4)
    sums: list[torch.Tensor] = []
    for rank, part in enumerate((slice(0, 2), slice(2, 6))):
        linear = RowParallelLinear(whole, part, one_of_two(rank, sums))
        for name, view in linear.checkpoint_views("o_proj").items():
            view.memory.copy_(getattr(whole, name.rpartition(".")[2])[view.part])
        assert linear.multiply_add(x[:, part].contiguous(), stream.clone()) is None
    torch.testing.assert_close(sums[0] + sums[1], stream + whole.multiply(x))


@torch.inference_mode()
def test_experts_and_a_shared_one_are_summed_up_at_once():
    whole = SparseMoE(8, 6, 3, 2, renormalize=True, shared_size=10).requires_grad_(False)
    for parameter in whole.parameters():
        parameter.normal_()
    sources = views_of(whole)
    x, stream = torch.randn(5, 8), torch.randn(5, 8)
    sums: list[torch.Tensor] = []
    parts = ((slice(0, 2), slice(0, 7)), (slice(2, 6), slice(7, 10)))
    for rank, (part, shared) in enumerate(parts):
        network, group = deepcopy(whole), one_of_two(rank, sums)
        network.experts = ParallelExperts(network.experts, part, group)
        mlp = network.shared_expert
        cuts = {"gate_proj": shared, "up_proj": shared}
        mlp.gate_up_proj = ColumnParallelLinear(mlp.gate_up_proj, cuts)
        mlp.down_proj = RowParallelLinear(mlp.down_proj, shared, group)
        for name, view in views_of(network).items():
            view.memory.copy_(sources[name].memory[view.part])
        assert network.requires_grad_(False).multiply_add(x, stream.clone()) is None
    assert len(sums) == 2
    torch.testing.assert_close(sums[0] + sums[1], whole.multiply(x))


def views_of(network: SparseMoE) -> dict[str, View]:
    mlp = network.shared_expert
    modules = {"experts": network.experts, "up": mlp.gate_up_proj}
    views = {}
    for path, module in modules.items():
        views |= module.checkpoint_views(path)
    if isinstance(mlp.down_proj, RowParallelLinear):
        return views | mlp.down_proj.checkpoint_views("down")
    return views | {"down.weight": View.whole(mlp.down_proj.weight)}


@torch.inference_mode()
def test_each_token_is_embedded_by_one_rank():
    whole = Embedding(40, 8)
    whole.weight.data.normal_()
    whole.weight.data[32] = float("nan")  # the first of the second rank: no token of this text
    token_ids = torch.tensor([0, 31, -1, 39, -3], dtype=torch.int32)
    sampled = torch.tensor([33, 7, 5])
    sums: list[torch.Tensor] = []
    for rank, tokens in enumerate((slice(0, 32), slice(32, 40))):
        embedding = VocabParallelEmbedding(whole, tokens, one_of_two(rank, sums))
        embedding.weight.data.copy_(whole.weight[tokens])
        embedding(token_ids, sampled)
    assert torch.equal(sums[0] + sums[1], whole(token_ids, sampled))
    assert isinstance(Case().norm(Case().stream), Normed)
