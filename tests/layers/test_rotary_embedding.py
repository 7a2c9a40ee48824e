"""Every rope type, in every form of config.json, gives transformers' tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.checkpoints import (
    TRANSFORMERS_5,
    Reference,
    edit_json,
    link_checkpoint,
    make_checkpoint,
    native_rope,
    old_rope,
    random_tokens,
)
from helpers.engines import build
from nanovllm import LLM, SamplingParams
from nanovllm.layers.rotary_embedding import rope_cos_sin
from nanovllm.models.qwen3 import Qwen3Config

MAX_TOKENS = 20
MAX_MODEL_LEN = 640
WINDOW = MAX_MODEL_LEN // 2  # positions that the rope types with scaling were "trained" on
HALF_DIM = 16
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "default-theta": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn", "rope_theta": 1_000_000.0, "factor": 2.0,
        "original_max_position_embeddings": WINDOW,
    },
    "yarn-attention-factor": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "attention_factor": 1.3,
        "beta_fast": 16.0, "beta_slow": 2.0, "original_max_position_embeddings": WINDOW,
    },
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": WINDOW,
    },
    "longrope": {
        "rope_type": "longrope", "rope_theta": 10000.0, "factor": 2.0,
        "short_factor": [1.0 + 0.1 * i for i in range(HALF_DIM)],
        "long_factor": [2.0 + 0.3 * i for i in range(HALF_DIM)],
        "original_max_position_embeddings": WINDOW,
    },
}  # fmt: skip
CPU = torch.device("cpu")


def read(**content: Any) -> Qwen3Config:
    return Qwen3Config.from_json({"model_type": "qwen3", **content})


@pytest.mark.parametrize("form", ["rope_theta", "rope_parameters"])
@pytest.mark.parametrize("name", ROPES)
def test_every_rope_type_gives_transformers_tokens(tmp_path: Path, name: str, form: str):
    """config.json as transformers 4 writes it (`rope_theta`, `rope_scaling`), and as 5 does."""
    rope = ROPES[name]
    source = make_checkpoint(tmp_path / "source", rope=rope, seed=3)
    path = link_checkpoint(source, tmp_path / "model")
    written = old_rope(rope) if form == "rope_theta" else {"rope_parameters": rope}
    rope_keys = ("rope_theta", "rope_scaling", "rope_parameters")
    edit_json(path / "config.json", remove=rope_keys, **written)
    # The frequencies of longrope depend on the length; the engine's are those of its max_model_len.
    cases = [((1, 100, 280, 500), MAX_MODEL_LEN)]
    if name == "longrope":
        cases = [((1, 100, 280), WINDOW), ((330, 500), MAX_MODEL_LEN)]
    reference = Reference(source)
    for lengths, max_model_len in cases:
        prompts = [random_tokens(length, seed=length) for length in lengths]
        with LLM(path, num_kvcache_blocks=20, max_model_len=max_model_len, device="cpu") as llm:
            outputs = llm.generate(
                prompts, SamplingParams(temperature=0, max_tokens=MAX_TOKENS), use_tqdm=False
            )
        for prompt, output in zip(prompts, outputs, strict=True):
            assert output["token_ids"] == reference.tokens(prompt, MAX_TOKENS)


def test_rope_type_is_written_as_type_in_old_checkpoints(tmp_path: Path):
    source = make_checkpoint(tmp_path / "source", rope=ROPES["linear"])
    path = link_checkpoint(source, tmp_path / "model")
    edit_json(
        path / "config.json",
        remove=tuple(native_rope(ROPES["linear"])),
        rope_theta=10000.0,
        rope_scaling={"type": "linear", "factor": 4.0},
    )
    prompt = random_tokens(100)
    with LLM(path, num_kvcache_blocks=20, device="cpu") as llm:
        params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
        (output,) = llm.generate(prompt, params, use_tqdm=False)
    assert output["token_ids"] == Reference(source).tokens(prompt, MAX_TOKENS)


def test_rope_theta_is_found_in_both_forms_of_the_config(tmp_path: Path):
    tables = {}
    for name, theta in (("old", 1e6), ("new", 1e6), ("other", 1e4)):
        path = make_checkpoint(tmp_path / name)
        old = {"rope_theta": theta, "rope_scaling": None}
        new = {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
        rope_keys = ("rope_theta", "rope_scaling", "rope_parameters")
        edit_json(path / "config.json", remove=rope_keys, **(new if name == "new" else old))
        with build(path) as llm:
            tables[name] = llm.model_runner.cos_sin.clone()
    assert torch.equal(tables["old"], tables["new"])
    assert not torch.equal(tables["old"], tables["other"])
    exponents = torch.arange(16, dtype=torch.float64) / 16
    angles = torch.arange(640, dtype=torch.float64)[:, None] / 1e6**exponents
    torch.testing.assert_close(
        tables["old"].double(), torch.cat((angles.cos(), angles.sin()), dim=-1), atol=1e-4, rtol=0
    )


def test_the_window_before_scaling_may_be_given_beside_the_parameters():
    """As Phi writes it: longrope takes its long factors past that many positions."""
    parameters = {"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [4.0] * 64}
    shape = {"rope_scaling": parameters, "max_position_embeddings": 4096}
    tables = [
        rope_cos_sin(read(**shape, original_max_position_embeddings=window), 512, CPU)
        for window in (256, 1024)
    ]
    plain = rope_cos_sin(read(), 512, CPU)
    turned = [torch.atan2(table[1, 64], table[1, 0]) for table in (*tables, plain)]
    assert turned[0] == pytest.approx(turned[2] / 4)
    assert turned[1] == pytest.approx(turned[2])


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear"},  # without its factor
        {"rope_type": "linear", "factor": 0}, {"rope_type": "yarn", "factor": float("nan")},
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {
            "rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 64,
            "short_factor": [1.0] * 3, "long_factor": [1.0] * 2,
        },
    ],
)  # fmt: skip
def test_scaled_rope_with_parameters_of_no_use_is_refused(parameters: dict):
    with pytest.raises(ValueError, match=f"rope parameters of no use.*{parameters['rope_type']}"):
        rope_cos_sin(read(rope_scaling=parameters), 128, CPU)


def test_unknown_rope_type_is_refused_by_name(tiny_copy: Path):
    rope = {"rope_type": "spiral", "rope_theta": 10000.0}
    changes = {"rope_parameters": rope} if TRANSFORMERS_5 else old_rope(rope)
    edit_json(tiny_copy / "config.json", **changes)
    with pytest.raises(ValueError, match="spiral"):
        LLM(tiny_copy, device="cpu", num_kvcache_blocks=4)
