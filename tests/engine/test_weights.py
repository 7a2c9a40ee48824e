"""A network's weights on a CPU: which forms of them are held."""

from pathlib import Path

import pytest
import torch

from helpers.engines import GREEDY, build
from nanovllm.engine import weights
from nanovllm.layers.packed_weight import OneDnnWeight


@pytest.mark.parametrize(("free", "expected"), [(2**40, "kept"), (1000, "dropped")])
def test_plain_weights_stay_beside_packed_ones_where_there_is_memory(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, free: int, expected: str
):
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("the packed form is wider than the plain one, which always stays")
    monkeypatch.setattr(weights, "available_host_memory", lambda: free)
    with build(tiny, dtype="bfloat16") as llm:
        model = llm.model_runner.model
        assert OneDnnWeight.serves(model.model.embed_tokens.weight)
        projection = model.model.layers[0].mlp.down_proj
        assert len(projection.weight) == (projection.out_features if expected == "kept" else 0)
        assert len(llm.generate([[1, 2]], GREEDY, use_tqdm=False)[0]["token_ids"]) == 12
