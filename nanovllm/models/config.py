"""config.json, as far as the models read it."""

import sys
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from nanovllm.layers.activation import ACTIVATIONS
from nanovllm.quantization.fp8_checkpoints import Fp8Blocks, checkpoint_format

if TYPE_CHECKING:
    from typing_extensions import Self

DERIVED = 0  # as the default of a size: it follows from the others
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip


MAX_SIZE = 2**28  # no model comes near, and bytes of the largest matrix are below 2**63


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a network. A family adds what it alone has, and the defaults of its own class in
    transformers, which a config.json may leave out.

    Attributes:
        model_type: the family's name in config.json.
        own_sizes: names of fields that are checked as `SIZES` are.
        default_rope_theta: of transformers' class.
        rope_parameters: "rope_type", "rope_theta", and what a scaled type wants besides.
        original_max_position_embeddings: if given beside `rope_parameters`, not inside.
        sliding_window: how many tokens attention looks back, the newest included; None: all. The
            engine runs a model with a window as far as the window reaches.
        dtype: of the weights, as config.json has it.
        fp8_blocks: the format of weights that are in fp8; None: they are not quantised.
        eos_token_id: one, a list, or None, unchecked.
    """

    model_type: ClassVar[str]
    own_sizes: ClassVar[tuple[str, ...]] = ()
    default_rope_theta: ClassVar[float] = 10000.0

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    rope_parameters: dict[str, Any] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0}
    )
    original_max_position_embeddings: int | None = None
    sliding_window: int | None = None
    dtype: Any = None
    fp8_blocks: Fp8Blocks | None = None
    eos_token_id: Any = None

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Self":
        """Read the content of a config.json, written by whichever version of transformers.

        Raises:
            ValueError: for an option or a value that the engine does not compute; the message names
                it.
        """
        defaults = {f.name: f.default for f in fields(cls) if f.name != "rope_parameters"}
        values = {name: content.get(name, default) for name, default in defaults.items()}
        values["dtype"] = content.get("dtype") or content.get("torch_dtype")  # transformers 5, 4
        values["rope_parameters"] = _rope_parameters(content, cls.default_rope_theta)
        values["sliding_window"] = cls.window_of(content)
        values["fp8_blocks"] = checkpoint_format(content)
        _check_and_derive_sizes(values, content, (*SIZES, *cls.own_sizes))
        config = cls(**values)
        config._check_values()
        _check_options(content)
        return config

    @classmethod
    def window_of(cls, content: dict[str, Any]) -> int | None:
        """The sliding window that a config.json asks for; None if it has none."""
        return None

    @property
    def inner_sizes(self) -> tuple[str, ...]:
        """Names of the sizes by which MLPs are shared among GPUs."""
        return ("intermediate_size",)

    def layer_kinds(self) -> dict[int, int]:
        """Of each kind of layer, the index of one, and how many there are."""
        return {0: self.num_hidden_layers}

    @property
    def max_length(self) -> int:
        """The most tokens of a sequence. With YaRN they are the positions of the training times a
        factor: max_position_embeddings is often left as it was before."""
        if self.rope_parameters["rope_type"] != "yarn":
            return self.max_position_embeddings
        factor: Any = self.rope_parameters.get("factor")
        original: Any = (
            self.original_max_position_embeddings
            or self.rope_parameters.get("original_max_position_embeddings")
            or self.max_position_embeddings
        )
        if not (_is_number(factor) and _is_size(original) and original <= MAX_SIZE):
            return self.max_position_embeddings  # the rotary table says what is wrong
        return int(min(factor * original, MAX_SIZE))

    def _check_values(self) -> None:
        for name in ("rms_norm_eps", "initializer_range"):
            if not _is_number(getattr(self, name)):
                raise refusal(name, getattr(self, name))
        for flag in (f.name for f in fields(self) if f.type is bool):
            if getattr(self, flag) not in (False, True, None):
                raise refusal(flag, getattr(self, flag))
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACTIVATIONS:
            raise refusal("hidden_act", self.hidden_act)
        window = self.sliding_window
        if window is not None and not _is_size(window):
            raise refusal("sliding_window", window)


def switched_window(content: dict[str, Any]) -> int | None:
    """The window of families that have a switch for it, `use_sliding_window`."""
    switch = content.get("use_sliding_window")
    if switch not in (False, True, None):
        raise refusal("use_sliding_window", switch)
    return content.get("sliding_window", 4096) if switch else None


def refusal(name: str, value: Any) -> ValueError:
    return ValueError(f"config.json has {name}={value!r}, which is not supported")


def _check_and_derive_sizes(
    values: dict[str, Any], content: dict[str, Any], sizes: tuple[str, ...]
) -> None:
    """Check the sizes in `values`, and fill in the two that may follow from the others."""
    derived = [
        name
        for name in ("num_key_value_heads", "head_dim")
        if values[name] is None or (name not in content and values[name] == DERIVED)
    ]
    for name in sizes:
        if name not in derived and not (_is_size(values[name]) and values[name] <= MAX_SIZE):
            raise refusal(name, values[name])
    heads = values["num_attention_heads"]
    if "num_key_value_heads" in derived:
        values["num_key_value_heads"] = heads
    if "head_dim" in derived:
        values["head_dim"] = values["hidden_size"] // heads
    if heads % values["num_key_value_heads"]:
        raise refusal("num_key_value_heads", values["num_key_value_heads"])
    if values["head_dim"] % 2 or not 0 < values["head_dim"] <= MAX_SIZE // heads:
        raise refusal("head_dim", values["head_dim"])


def _check_options(content: dict[str, Any]) -> None:
    """Refuse what config.json may ask for and the engine does not compute."""
    computed = {"partial_rotary_factor": (1, None)}
    for name, values in computed.items():
        if name in content and content[name] not in values:
            raise refusal(name, content[name])


def _rope_parameters(content: dict[str, Any], default_theta: float) -> dict[str, Any]:
    """transformers 5 keeps type, theta and scaling in `rope_parameters`, 4 apart."""
    given = content.get("rope_scaling") or content.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise refusal("rope_scaling", given)
    if any(isinstance(value, dict) for value in given.values()):
        raise ValueError(f"config.json has rope parameters for kinds of layers: {given}")
    # A scaling that was added by hand may have no theta of its own.
    beside = (
        content.get("rope_parameters") if isinstance(content.get("rope_parameters"), dict) else {}
    )
    default_theta = (beside or {}).get("rope_theta", default_theta)
    theta = given.get("rope_theta") or content.get("rope_theta", default_theta)
    if not _is_number(theta) or theta == 0:
        raise refusal("rope_theta", theta)
    rope_type = given.get("rope_type", given.get("type", "default"))
    if not isinstance(rope_type, str):
        raise refusal("rope_type", rope_type)
    return {**given, "rope_type": rope_type, "rope_theta": theta}


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    """Whether it is one that is not negative, and finite."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 <= value <= sys.float_info.max
