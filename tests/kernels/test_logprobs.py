"""Log probabilities by the kernels, against float64 and a stable sort."""

import pytest
import torch

from helpers.kernel_inputs import FP32, interpreted, normal, on_cpu, on_gpu
from nanovllm.kernels.logprobs import token_logprobs

pytestmark = pytest.mark.usefixtures("poison")


def check(logits: torch.Tensor, token_ids: list[int], k: int) -> None:
    own_tokens = torch.tensor(token_ids, device=logits.device)
    found = [piece.cpu() for piece in token_logprobs(logits, own_tokens, k)]
    logprobs, ranks, top_token_ids, top_logprobs = found
    assert [piece.dtype for piece in found] == [FP32, torch.int64, torch.int64, FP32]
    expected = logits.double().log_softmax(dim=1).cpu()
    order = logits.cpu().float().sort(dim=1, descending=True, stable=True).indices
    rows = range(len(logits))
    assert ranks.tolist() == [order[row].tolist().index(token_ids[row]) + 1 for row in rows]
    assert torch.equal(top_token_ids, order[:, :k])
    own = torch.stack([expected[row, token_ids[row]] for row in rows])
    torch.testing.assert_close(logprobs.double(), own, rtol=1e-6, atol=2e-6)
    tops = expected.gather(1, order[:, :k])
    torch.testing.assert_close(top_logprobs.double(), tops, rtol=1e-6, atol=2e-6)


def with_ties(rows: int, vocab: int, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    logits = normal(rows, vocab, dtype=FP32, seed=vocab)
    logits[1::2] = (logits[1::2] * 2).round()
    logits[2] = 0  # all alike
    logits[3, ::3] = float("-inf")
    logits[4] = float("-inf")
    logits[4, vocab // 2] = 5.0
    return logits.to(dtype).to(device)


@interpreted
@on_cpu
@pytest.mark.parametrize(("vocab", "k"), [(7, 7), (300, 0), (4096, 3), (9000, 5), (9000, 1)])
def test_tokens_ranks_and_the_most_likely(vocab: int, k: int, dtype: torch.dtype) -> None:
    token_ids = [0, vocab - 1, vocab // 3, vocab // 3, vocab // 2, 5]
    check(with_ties(6, vocab, dtype), token_ids, k)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("k", [0, 1, 5, 64])
def test_tokens_ranks_and_the_most_likely_gpu(k: int, dtype: torch.dtype) -> None:
    vocab = 151936
    check(with_ties(6, vocab, dtype, "cuda"), [0, vocab - 1, 77, vocab // 3, vocab // 2, 5], k)
