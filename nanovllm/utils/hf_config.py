"""config.json, as far as the engine reads it."""

import sys
from dataclasses import dataclass, field, fields
from typing import Any

SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
_NUMBERS = ("rms_norm_eps", "initializer_range")
_FLAGS = ("attention_bias", "tie_word_embeddings")


@dataclass(frozen=True)
class Qwen3Config:
    """The shape of a Qwen3. Names and defaults are those of transformers' class of this name.

    Attributes:
        rope_parameters: "rope_type", "rope_theta", and what a scaled type wants besides.
        original_max_position_embeddings: if given beside `rope_parameters`, not inside.
        dtype: of the weights, as config.json has it.
        eos_token_id: one, a list, or None, unchecked.
    """

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] = field(default_factory=lambda: _rope_parameters({}))
    original_max_position_embeddings: int | None = None
    dtype: Any = None
    eos_token_id: Any = None

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Qwen3Config":
        """Read the content of a config.json, written by whichever version of transformers.

        Raises:
            ValueError: for an architecture, an option or a value that the engine does not compute;
                the message names it.
        """
        _check_architecture(content)
        known = [f.name for f in fields(cls)]
        values = {name: content[name] for name in known if name in content}
        if values.get("num_key_value_heads", 0) is None:
            values["num_key_value_heads"] = content.get(
                "num_attention_heads", cls.num_attention_heads
            )
        # transformers 4 has other names for these two.
        values["dtype"] = content.get("dtype") or content.get("torch_dtype")
        values["rope_parameters"] = _rope_parameters(content)
        config = cls(**values)
        config._check_values()
        _check_options(content)
        return config

    def _check_values(self) -> None:
        for name in SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise _refusal(name, value)
        for name in _NUMBERS:
            if not _is_number(getattr(self, name)):
                raise _refusal(name, getattr(self, name))
        for name in _FLAGS:
            if getattr(self, name) not in (False, True, None):
                raise _refusal(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise _refusal("num_key_value_heads", self.num_key_value_heads)
        if self.head_dim % 2:
            raise _refusal("head_dim", self.head_dim)


def _check_architecture(content: dict[str, Any]) -> None:
    architectures = content.get("architectures") or []
    if content.get("model_type") != "qwen3" or architectures not in ([], ["Qwen3ForCausalLM"]):
        name = architectures or content.get("model_type")
        name = name[0] if isinstance(name, list) else name
        raise ValueError(f"architecture {name!r} is not supported; nanovllm runs Qwen3ForCausalLM")


def _check_options(content: dict[str, Any]) -> None:
    """Refuse what config.json may ask for and the engine does not compute."""
    computed = {
        "use_sliding_window": (False, None),
        "hidden_act": ("silu",),
        "quantization_config": (None,),
        "partial_rotary_factor": (1, None),
    }
    for name, values in computed.items():
        if name in content and content[name] not in values:
            raise _refusal(name, content[name])


def _rope_parameters(content: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 keeps type, theta and scaling in `rope_parameters`, 4 apart."""
    given = content.get("rope_scaling") or content.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise _refusal("rope_scaling", given)
    if any(isinstance(value, dict) for value in given.values()):
        raise ValueError(f"config.json has rope parameters for kinds of layers: {given}")
    theta = given.get("rope_theta") or content.get("rope_theta", 10000.0)
    if not _is_number(theta) or theta == 0:
        raise _refusal("rope_theta", theta)
    rope_type = given.get("rope_type", given.get("type", "default"))
    if not isinstance(rope_type, str):
        raise _refusal("rope_type", rope_type)
    return {**given, "rope_type": rope_type, "rope_theta": theta}


def _is_number(value: Any) -> bool:
    """Whether it is one that is not negative, and finite."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 <= value <= sys.float_info.max


def _refusal(name: str, value: Any) -> ValueError:
    return ValueError(f"config.json has {name}={value!r}, which is not supported")
