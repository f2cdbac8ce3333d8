"""Every example runs in its short version, and the site's short pages of code run as they stand."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

ROOT = Path(__file__).parent.parent
gallery = runpy.run_path(str(ROOT / "docs" / "gallery.py"))
EXAMPLES = gallery["scripts"]()
PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.stem != "from_torch2pc"]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch):
    """How many figures are open when an example shows them."""
    shown: list[int] = []
    plt.switch_backend("agg")
    monkeypatch.setattr(plt, "show", lambda: shown.append(len(plt.get_fignums())))
    yield shown
    plt.close("all")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, drawn: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    source = path.read_text("utf-8")
    if "pytorch_lightning" in source:
        pytest.importorskip("pytorch_lightning")
    short = gallery["shortened"](source)
    assert short != source, "give its long loops a '# short:' version"
    exec(compile(short, str(path), "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.count("\n") >= 2
    assert drawn and min(drawn) >= 1


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_teaches(path: Path) -> None:
    """It asks, says the equation, and concludes."""
    source = path.read_text("utf-8")
    assert "**Question.**" in source and "**Conclusion.**" in source
    assert ".. math::" in source or ".. code-block:: diff" in source


def test_the_gallery_has_all_examples() -> None:
    assert [path.stem for path in EXAMPLES[: len(gallery["ORDER"])]] == gallery["ORDER"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_pages_code_runs(page: Path) -> None:
    text = page.read_text("utf-8")
    for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        exec(compile(block, str(page), "exec"), {})
