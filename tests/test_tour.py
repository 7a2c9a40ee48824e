"""docs/tour.md: the files that it names are there, and the code that it shows is theirs."""

import re

from helpers.paths import ROOT

CORE = ROOT / "nanovllm"
TOUR = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")


def test_the_files_it_names_are_there() -> None:
    named = set(re.findall(r"`([\w/]+\.py)`", TOUR))
    known = [
        f"/{path.relative_to(ROOT)}" for path in (*CORE.rglob("*.py"), *ROOT.glob("tests/**/*.py"))
    ]
    assert len(named) > 30
    for name in named:
        assert any(path.endswith(f"/{name}") for path in known), name


def test_it_names_every_file_of_the_core() -> None:
    for folder in ("engine", "models", "layers", "utils"):
        for path in (CORE / folder).glob("[!_]*.py"):
            assert f"{path.name}`" in TOUR, path.name


def test_the_code_it_shows_is_there() -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in CORE.rglob("*.py"))
    source = re.sub(r"^ +", "", source, flags=re.MULTILINE)
    for code in re.findall(r"```python\n(.*?)```", TOUR, flags=re.DOTALL):
        assert re.sub(r"^ +", "", code, flags=re.MULTILINE) in source
