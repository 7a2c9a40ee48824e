"""What a checkpoint's config.json says of weights that are already quantised."""

from typing import Any, NamedTuple

from nanovllm.quantization.fp8 import GROUP

_WAY_OUT = (
    "give the bf16 checkpoint, with quantization='fp8' if it should be small, or one in fp8 with "
    f"blocks of {GROUP} x {GROUP}"
)


class Fp8Blocks(NamedTuple):
    """Weights in e4m3 with a scale for each block of 128 x 128 (`weight_scale_inv`, by which they
    are multiplied), whose inputs get a scale for each token and 128 features as they come.

    Attributes:
        unconverted: names of modules, or the beginnings or ends of names, whose weights are in
            bf16.
    """

    unconverted: tuple[str, ...] = ()

    def converts(self, path: str) -> bool:
        """Whether the weight of a module is in fp8."""
        return not any(f".{name}." in f".{path}." for name in self.unconverted)


def checkpoint_format(content: dict[str, Any]) -> Fp8Blocks | None:
    """How the weights of a config.json are quantised; None if they are not.

    Raises:
        ValueError: for a format that is not served; the message names it and says what would work.
    """
    given = content.get("quantization_config") or content.get("compression_config")
    if not given:
        return None
    if not isinstance(given, dict):
        raise ValueError(f"config.json has quantization_config={given!r}: {_WAY_OUT}")
    method = given.get("quant_method")
    if given.get("kv_cache_scheme") and given.get("config_groups") in ({}, []):
        return None  # of the cache alone: see `quantization.kv_cache`
    if method != "fp8":
        name = method or next((key for key in given if key.startswith("load_in")), None) or given
        raise ValueError(
            f"config.json has a quantization_config with quant_method={name!r}, which is not "
            f"served: {_WAY_OUT}"
        )
    served = {
        "fmt": (None, "e4m3", "float8_e4m3fn"),
        "weight_block_size": ([GROUP, GROUP],),
        "activation_scheme": (None, "dynamic"),
    }
    for key, values in served.items():
        if given.get(key) not in values:
            raise ValueError(
                f"config.json has quant_method='fp8' with {key}={given.get(key)!r}, which is not "
                f"served: {_WAY_OUT}"
            )
    names = given.get("modules_to_not_convert") or given.get("ignored_layers") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"config.json has modules_to_not_convert={names!r}: it must list names")
    return Fp8Blocks(tuple(names))
