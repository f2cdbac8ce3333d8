"""Finished trainings, kept in a file beside the figure, so that none is repeated.

A figure that trains many networks goes on where it was stopped when its command is given again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, Generic, Protocol, TypeVar

from paper_figures.data import DataSet
from paper_figures.progress import track
from paper_figures.report import Options, write_atomically


class Training(Protocol):
    """What is trained, how, and from which seed: a frozen dataclass."""

    def key(self, data: str) -> str:
        """What its outcome is kept under, on the data set with this name."""
        ...

    def __hash__(self) -> int: ...


T = TypeVar("T", bound=Training)


class Runs(Generic[T]):
    """The outcomes of trainings on one data set, in ``NAME_runs.json``.

    ``train(training, data, options)`` does one and returns what is kept of it: what JSON can hold,
    NaN and infinity among it.
    """

    def __init__(
        self,
        name: str,
        train: Callable[[T, DataSet, Options], dict[str, Any]],
        data: DataSet,
        options: Options,
    ) -> None:
        self._name, self._train, self._data, self._options = name, train, data, options
        self._path = options.out / f"{name}_runs.json"
        self._found: dict[str, Any] = {}
        if self._path.is_file():
            self._found = json.loads(self._path.read_text("utf-8"))

    def __getitem__(self, training: T) -> dict[str, Any]:
        return self._found[training.key(self._data.name)]

    def __contains__(self, training: T) -> bool:
        return training.key(self._data.name) in self._found

    def finish(self, trainings: Iterable[T]) -> None:
        """Do those of the trainings that are not done yet."""
        todo = [training for training in dict.fromkeys(trainings) if training not in self]
        for training in track(todo, f"{self._name.replace('_', ' ')}: training"):
            found = self._train(training, self._data, self._options)
            self._found[training.key(self._data.name)] = found
            self._options.out.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self._found)
            write_atomically(self._path, lambda path, text=text: path.write_text(text, "utf-8"))
