"""One bar over all figures that a command draws: which one it is at, and about how long the rest takes.

`track` stands around every long loop. It draws nothing of its own, but says in the bar where its loop
is; without a bar it is the plain loop.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

FORMAT = "{percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}  {desc}"


class Bar:
    """Counts the seconds that figures are expected to take, whatever the machine makes of them."""

    def __init__(self, seconds: Sequence[float]) -> None:
        self._seconds, self._place, self._at_start, self._begun = seconds, 0, 0.0, 0.0
        self._bar = tqdm(total=sum(seconds), bar_format=FORMAT, leave=False)

    @contextmanager
    def figure(self) -> Iterator[None]:
        """Around the drawing of the next figure; one that cannot be drawn takes no time."""
        self._begun, seconds = time.perf_counter(), self._seconds[self._place]
        try:
            yield
        except Exception:
            self._bar.total -= seconds
            raise
        else:
            self._at_start += seconds
        finally:
            self._place += 1
            self._show(self._at_start)

    def at(self, where: str) -> None:
        """Say where the figure is. By itself it never comes to its end."""
        self._bar.set_description_str(where, refresh=False)
        passed = time.perf_counter() - self._begun
        self._show(self._at_start + min(passed, 0.95 * self._seconds[self._place]))

    def _show(self, done: float) -> None:
        self._bar.update(max(0.0, done - self._bar.n))

    def say(self, text: str) -> None:
        """Print above the bar."""
        self._bar.clear()
        print(text, flush=True)
        self._bar.refresh()


_bar: Bar | None = None


@contextmanager
def bar_over(seconds: Sequence[float]) -> Iterator[Bar]:
    """The bar, for figures that are expected to take so long each."""
    global _bar
    _bar = Bar(seconds)
    try:
        yield _bar
    finally:
        _bar._bar.close()
        _bar = None


def track(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """The items; ``total``: how many there are, if ``len`` does not say it."""
    count = len(items) if total is None and hasattr(items, "__len__") else total
    for k, item in enumerate(items, 1):
        if _bar is not None:
            _bar.at(f"{title}, {k} of {count}")
        yield item
