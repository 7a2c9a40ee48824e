"""Where things are in this repository."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "demo" / "tiny-qwen3"
