"""Checks a built site's links: ``python docs/check_links.py build`` after building it there.

Sphinx reports references in the text that it cannot resolve; this looks at what came out. Every
relative link and picture must lead to a file of the site, and what stands after ``#`` to an element.
What a page needs to be shown (scripts, styles, fonts, pictures) must not come from another host.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Links of these kinds are followed when a page is shown.
LOADED = {"stylesheet", "icon", "preload", "modulepreload", "prefetch"}

ELSEWHERE = re.compile(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"')\s]+)")


class Page(HTMLParser):
    """A page's links, those of them that are followed to show it, and the names of its elements."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.needed: list[str] = []
        self.names: set[str] = set()
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        kinds = {kind for name, value in attributes if name == "rel" for kind in str(value).split()}
        for name, value in attributes:
            if name in {"href", "src"} and value:
                self.links.append(value)
                if name == "src" or kinds & LOADED:
                    self.needed.append(value)
            elif (name == "id" or (tag == "a" and name == "name")) and value:
                self.names.add(value)


def broken_links(site: Path) -> list[str]:
    """What is wrong, one line a link."""
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                problem = "no such file"
            elif parts.fragment and target in pages and parts.fragment not in pages[target].names:
                problem = "no such element"
            else:
                continue
            broken.append(f"{path.relative_to(site.resolve())}: {link}: {problem}")
        broken += [
            f"{path.relative_to(site.resolve())}: {link}: comes from another host"
            for link in page.needed
            if urlsplit(link).netloc
        ]
    for path in sorted(site.rglob("*.css")):
        for link in ELSEWHERE.findall(path.read_text("utf-8")):
            broken.append(f"{path.relative_to(site)}: {link}: comes from another host")
    if not pages:
        broken.append(f"{site} has no pages")
    return broken


if __name__ == "__main__":
    found = broken_links(Path(sys.argv[1]))
    print("\n".join(found) or "all links lead somewhere, and nothing is needed from elsewhere")
    sys.exit(bool(found))
