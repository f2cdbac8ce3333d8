"""The check of the built site's links finds what leads nowhere, and what a page needs from elsewhere."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
broken_links = runpy.run_path(str(ROOT / "docs" / "check_links.py"))["broken_links"]


@pytest.mark.parametrize(
    ("tag", "problem"),
    [
        ('<a href="https://pytorch.org">', None),
        ('<a href="#here" id="here">', None),
        ('<link rel="canonical" href="https://here.org/index.html">', None),
        ('<a href="other.html">', "other.html: no such file"),
        ('<a href="index.html#there">', "index.html#there: no such element"),
        ('<script src="https://cdn.org/a.js">', "https://cdn.org/a.js: comes from another host"),
        ('<img src="//cdn.org/a.png">', "//cdn.org/a.png: comes from another host"),
        ('<link rel="stylesheet" href="https://cdn.org/a.css">', "a.css: comes from another host"),
    ],
)
def test_a_link_of_a_page(tmp_path: Path, tag: str, problem: str | None) -> None:
    (tmp_path / "index.html").write_text(tag)
    found = broken_links(tmp_path)
    assert len(found) == (problem is not None)
    assert all(line.endswith(problem) for line in found)


def test_a_link_of_a_style(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("")
    (tmp_path / "a.css").write_text(
        "@font-face { src: url('https://cdn.org/a.woff') } b { src: url(a.woff) }"
    )
    assert broken_links(tmp_path) == ["a.css: https://cdn.org/a.woff: comes from another host"]


def test_a_site_without_pages(tmp_path: Path) -> None:
    assert broken_links(tmp_path) == [f"{tmp_path} has no pages"]
