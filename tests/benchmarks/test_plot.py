"""benchmarks/plot.py: a report becomes a picture."""

import json
from pathlib import Path

import pytest

from benchmarks import plot


def test_plot_draws_the_report(report: Path, tmp_path: Path) -> None:
    picture = tmp_path / "docs" / "scaling.png"
    plot.main([str(report), str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plot_wants_scaling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"rows": [], "device": "none"}))
    with pytest.raises(SystemExit):
        plot.main([str(path), str(tmp_path / "scaling.png")])
    assert "no scaling figures" in capsys.readouterr().err
