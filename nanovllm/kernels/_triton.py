"""Triton where it is installed, and a stand-in that lets kernel files import without it."""

from types import SimpleNamespace
from typing import Any

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False
    tl: Any = SimpleNamespace(constexpr=object)
    triton: Any = SimpleNamespace(jit=lambda function: function)

__all__ = ["HAS_TRITON", "tl", "triton"]
