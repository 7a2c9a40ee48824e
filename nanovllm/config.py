"""Every option of the engine, checked here."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from nanovllm.models import CausalLM, find_model_class
from nanovllm.models.config import ModelConfig
from nanovllm.other_options import settle
from nanovllm.quantization.fp8_checkpoints import Fp8Blocks
from nanovllm.utils.checkpoint_files import OTHER_WEIGHTS, other_format, read_json_object
from nanovllm.utils.loader import checkpoint_dtype
from nanovllm.utils.validation import as_integer, as_number

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Other names of these that are in use.
_DTYPE_NAMES: dict[Any, str] = {
    "half": "float16", "float": "float32", **{dtype: name for name, dtype in DTYPES.items()},
}  # fmt: skip
KV_CACHE_DTYPES = ("auto", "fp8")
QUANTIZATIONS = (None, "fp8")
ATTENTION_BACKENDS = ("auto", "flash-attn", "triton", "numba", "torch")
CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]


@dataclass
class Config:
    """Options of the engine, as given, then resolved against the model and the machine.

    Attributes:
        model: a local directory with a Hugging Face checkpoint, or a hub id to fetch.
        max_num_batched_tokens: the most tokens of one prefill step; longer prompts run in chunks.
        max_num_seqs: the most sequences that a step runs.
        max_model_len: the most tokens of a sequence, prompt and output together; None: as many as
            the model can. Capped by the model here, and by the engine if its KV cache is smaller.
        gpu_memory_utilization: the share of the GPU's memory that this engine may take.
        enforce_eager: never use CUDA Graphs.
        kvcache_block_size: tokens per KV block, a multiple of 16 (of 256 with flash-attn); None is
            256 with flash-attn, else 64, once the attention backend is known.
        num_kvcache_blocks: size of the KV cache; None computes it from the memory that is free.
        device: "auto" (cuda if there is one, else cpu), or any torch device string of these two.
        dtype: "auto" (the checkpoint's), "bfloat16", "float16" ("half") or "float32" ("float"), or
            torch's own.
        kv_cache_dtype: of keys and values in the cache: "auto" (that of the model), or "fp8" (e4m3,
            with scales by kv head, see `quantization.kv_cache`).
        quantization: of the weights: "fp8" has those of the decoder layers' projections in e4m3,
            quantised as they are loaded (see `quantization.fp8_weights`). None: as the checkpoint
            has them, in fp8 too.
        attention_backend: "auto", "flash-attn", "triton", "numba" or "torch".
        load_format: "auto" or "safetensors"; "dummy" for random weights in the shape of
            config.json.
        seed: what the random choices of requests without a seed of their own are drawn from.
        enable_prefix_caching: let requests with the same prefix share its KV blocks.
        tokenizer: the directory of another tokenizer, or its hub id; None: the checkpoint's.
        skip_tokenizer_init: have no tokenizer: prompts are token ids, and outputs have no text.
        hf_overrides: entries of config.json in place of the checkpoint's, such as `rope_scaling`.
        revision: of the checkpoint, if `model` is a hub id.
        download_dir: where checkpoints from the hub are kept; None: the hub's own cache.
        tensor_parallel_size: how many GPUs, or processes on a CPU, share each step, with a part of
            each layer (see `parallel`). With `device` "cuda:N" they are the GPUs from N on.
        async_scheduling: plan and launch a step before the last one's tokens are read, so that the
            device need not wait. None: on a GPU only, since a CPU computes in the same thread.

    Raises:
        TypeError, ValueError: for an option that cannot work; the message names it and says what
            would.
    """

    model: str
    max_num_batched_tokens: int = 16384
    max_num_seqs: int = 512
    max_model_len: int = None  # type: ignore[assignment]  # a number once it is resolved
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False
    kvcache_block_size: int = None  # type: ignore[assignment]  # a number once it is resolved
    num_kvcache_blocks: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    quantization: str | None = None
    attention_backend: str = "auto"
    load_format: str = "auto"
    seed: int = 0
    async_scheduling: bool | None = None
    tensor_parallel_size: int = 1
    enable_prefix_caching: bool = True
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    hf_overrides: dict[str, Any] | None = None
    revision: str | None = None
    download_dir: str | None = None

    model_dir: Path = field(init=False)
    tokenizer_dir: Path = field(init=False)
    model_class: type[CausalLM] = field(init=False)
    model_config: ModelConfig = field(init=False)
    torch_device: torch.device = field(init=False)
    torch_dtype: torch.dtype = field(init=False)
    generation_config: dict[str, Any] = field(init=False)
    eos_token_ids: set[int] = field(init=False)

    @property
    def kv_torch_dtype(self) -> torch.dtype:
        """Of keys and values in the cache."""
        return self.torch_dtype if self.kv_cache_dtype == "auto" else torch.float8_e4m3fn

    @property
    def has_fp8_weights(self) -> bool:
        return self.quantization == "fp8" or self.fp8_blocks is not None

    @property
    def fp8_blocks(self) -> Fp8Blocks | None:
        """The format of a checkpoint in fp8; None if it is in another dtype."""
        return self.model_config.fp8_blocks

    @classmethod
    def from_options(cls, model: str | os.PathLike[str], options: dict[str, Any]) -> "Config":
        """Build a Config. Options of None have their default; those of vLLM that change nothing are
        taken, and all others that do not exist are refused: see `other_options`."""
        known = [f.name for f in fields(cls) if f.init and f.name != "model"]
        options = settle(options, known)
        if not isinstance(model, (str, os.PathLike)):
            raise TypeError(f"model must be a directory or a hub id, got {model!r}")
        return cls(model=str(model), **options)

    def __post_init__(self) -> None:
        self._check_options()
        self.torch_device = _resolve_device(self.device)
        self.model_dir = self._resolve_model(self.model)
        self.tokenizer_dir = self.model_dir
        if self.tokenizer is not None and not self.skip_tokenizer_init:
            self.tokenizer_dir = self._resolve_model(str(self.tokenizer))
        content = _load_config_json(self.model_dir) | (self.hf_overrides or {})
        self.model_class = find_model_class(content)
        self.model_config = self.model_class.config_class.from_json(content)
        if self.tensor_parallel_size > 1:
            from nanovllm.parallel.sharding import check_shardable

            check_shardable(self.model_config, self.tensor_parallel_size)
        if self.has_fp8_weights:
            from nanovllm.quantization.fp8_weights import check_fp8_device

            check_fp8_device(self.torch_device)
        self.torch_dtype = _resolve_dtype(self.dtype, self.model_config, self.model_dir)
        self._resolve_max_model_len()
        self.generation_config = _load_generation_config(self.model_dir)
        self.eos_token_ids = _eos_token_ids(self.generation_config, self.model_config)
        if self.async_scheduling is None:
            self.async_scheduling = self.torch_device.type == "cuda"

    def _resolve_model(self, model: str) -> Path:
        return _resolve_model(model, self.revision, self.download_dir)

    def _resolve_max_model_len(self) -> None:
        limit, window = self.model_config.max_length, self.model_config.sliding_window
        if limit < 2:
            raise ValueError(
                f"config.json has max_position_embeddings={limit}, and 2 is the least of use"
            )
        if self.max_model_len is None:
            self.max_model_len = limit if window is None else min(limit, window)
        self.max_model_len = min(self.max_model_len, limit)
        if window is not None and window < self.max_model_len:
            raise ValueError(
                f"config.json has a sliding window of {window} tokens, which is not supported in "
                f"sequences of {self.max_model_len}: give max_model_len={window} or less"
            )

    def _check_options(self) -> None:
        self._check_integer("max_num_batched_tokens", at_least=1)
        self._check_integer("max_num_seqs", at_least=1, below=2**15)  # a row's number has 15 bits
        if self.max_model_len is not None:
            self._check_integer("max_model_len", at_least=2)
        self._check_integer("seed", at_least=0)
        self._check_integer("tensor_parallel_size", at_least=1)
        if self.num_kvcache_blocks is not None:
            self._check_integer("num_kvcache_blocks", at_least=1)
        if self.kvcache_block_size is not None:
            self._check_integer("kvcache_block_size", at_least=1)
            if self.kvcache_block_size % 16:
                raise ValueError(
                    f"kvcache_block_size must be a multiple of 16, got {self.kvcache_block_size}"
                )
        share = as_number("gpu_memory_utilization", self.gpu_memory_utilization)
        if not 0 < share <= 1:
            raise ValueError(f"gpu_memory_utilization must be above 0 and at most 1, got {share}")
        _check_choice("enforce_eager", self.enforce_eager, (True, False))
        _check_choice("async_scheduling", self.async_scheduling, (None, True, False))
        if isinstance(self.dtype, (str, torch.dtype)):
            self.dtype = _DTYPE_NAMES.get(self.dtype, self.dtype)
        _check_choice("dtype", self.dtype, ("auto", *DTYPES))
        _check_choice("enable_prefix_caching", self.enable_prefix_caching, (True, False))
        _check_choice("skip_tokenizer_init", self.skip_tokenizer_init, (True, False))
        if not isinstance(self.hf_overrides, (dict, type(None))):
            raise TypeError(
                f"hf_overrides must be a dict of entries of config.json, got {self.hf_overrides!r}"
            )
        if self.kv_cache_dtype == "fp8_e4m3":  # vLLM's other name of it
            self.kv_cache_dtype = "fp8"
        _check_choice("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        if self.quantization not in QUANTIZATIONS:
            raise ValueError(
                f"quantization={self.quantization!r} is not served: give the bf16 checkpoint, with "
                "quantization='fp8' if it should be small, or one in fp8 with blocks of 128 x 128"
            )
        _check_choice("attention_backend", self.attention_backend, ATTENTION_BACKENDS)
        _check_choice("load_format", self.load_format, ("auto", "safetensors", "dummy"))

    def _check_integer(self, name: str, at_least: int, below: int = 2**31) -> None:
        value = as_integer(name, getattr(self, name))
        if not at_least <= value < below:
            raise ValueError(f"{name} must be at least {at_least} and below {below}, got {value}")
        setattr(self, name, value)


def _check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    if not any(value is choice or (value == choice and type(value) is str) for choice in choices):
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}")


def _resolve_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}"
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices; "
            "use device='cpu' or 'auto'"
        )
    if device.type == "cuda" and device.index is None:  # whichever is the current one later
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _resolve_model(model: str, revision: str | None, download_dir: str | None) -> Path:
    """The local directory of a checkpoint, fetched from the hub if `model` is a hub id."""
    if not model:
        raise ValueError("model is empty: give a checkpoint directory or a hub id")
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        known = other_format(path)
        raise ValueError(
            f"model must be a directory with a checkpoint, {model!r} is a file"
            + (f": {known}" if known else "")
        )
    looks_like_path = path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1
    if looks_like_path:
        raise FileNotFoundError(
            f"model directory {model!r} does not exist; give a local checkpoint directory, or a "
            "hub id such as 'Qwen/Qwen3-0.6B'"
        )
    from huggingface_hub import snapshot_download

    try:
        directory = snapshot_download(
            model, revision=revision, cache_dir=download_dir, allow_patterns=CHECKPOINT_FILES,
            ignore_patterns=OTHER_WEIGHTS,
        )  # fmt: skip
        return Path(directory)
    except Exception as error:
        raise FileNotFoundError(
            f"model {model!r} is neither a local directory nor could it be fetched from the hub "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]}). Check the name and the "
            "network, or download the checkpoint elsewhere and pass its directory"
        ) from error


def _load_config_json(model_dir: Path) -> dict[str, Any]:
    path = model_dir / "config.json"
    if not path.is_file():
        known = other_format(model_dir) or "it is not a checkpoint directory"
        raise FileNotFoundError(f"{model_dir} has no config.json: {known}")
    return read_json_object(path)


def _resolve_dtype(name: str, model_config: ModelConfig, model_dir: Path) -> torch.dtype:
    """The dtype asked for; for "auto" that of config.json, or of the weights if it has none."""
    if name != "auto":
        return DTYPES[name]
    dtype = model_config.dtype or checkpoint_dtype(model_dir) or torch.float32
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
    if dtype not in DTYPES.values():
        raise ValueError(
            f"the checkpoint's dtype {str(dtype)!r} is not supported: give dtype, one of "
            f"{[*DTYPES]}"
        )
    return dtype


def _load_generation_config(model_dir: Path) -> dict[str, Any]:
    """The contents of generation_config.json; empty without one."""
    path = model_dir / "generation_config.json"
    return read_json_object(path) if path.is_file() else {}


def _eos_token_ids(generation_config: dict[str, Any], model_config: ModelConfig) -> set[int]:
    """The end-of-sequence ids of generation_config.json, or of config.json if it has none.

    The tokenizer's own is added by the engine, which has the tokenizer.
    """
    eos = generation_config.get("eos_token_id")
    if eos is None:
        eos = model_config.eos_token_id
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    for token_id in ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            raise ValueError(f"eos_token_id must be a token id or a list of them, got {eos!r}")
    return set(ids)
