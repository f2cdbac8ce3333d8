"""The character model of the transformer figure, and the texts that it learns.

Where its beliefs lie is up to ``layers``.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torch2pc import PCGraph, pc_graph

TEXTS = Path(__file__).parent / "texts"
CONTEXT, BATCH = 32, 16
# What a position may not look at has this score: its share of the attention is below 1e-8.
HIDDEN = -20.0


class Text(NamedTuple):
    """A text as numbers of its letters: eight tenths to learn, one to choose by, one to be tested on."""

    name: str
    letters: str
    training: Tensor
    held_out: Tensor
    test: Tensor

    def batches(
        self, count: int, seed: int, part: str = "training"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Stretches (batch, context) of a part, and what follows each of their characters."""
        generator = torch.Generator().manual_seed(seed)
        source = getattr(self, part)
        for _ in range(count):
            starts = torch.randint(len(source) - CONTEXT, (BATCH,), generator=generator)
            stretches = torch.stack([source[start : start + CONTEXT + 1] for start in starts])
            yield stretches[:, :-1], stretches[:, 1:]


def load_text(name: str) -> Text:
    """``"shakespeare"`` or ``"federalist"``."""
    text = gzip.decompress((TEXTS / f"{name}.txt.gz").read_bytes()).decode("ascii")
    letters = "".join(sorted(set(text)))
    codes = torch.tensor([letters.index(character) for character in text])
    first, second = 8 * len(codes) // 10, 9 * len(codes) // 10
    return Text(name, letters, codes[:first], codes[first:second], codes[second:])


class Embedding(nn.Module):
    """Each letter and its place, as vectors ``scale`` times as large as usual."""

    def __init__(self, letters: int, width: int, scale: float) -> None:
        super().__init__()
        self.scale, self.letter = scale, nn.Embedding(letters, width)
        self.place = nn.Parameter(0.1 * torch.randn(CONTEXT, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (self.letter(x) + self.place[: x.shape[1]])


class Scores(nn.Module):
    """How much each position looks at each earlier one, before the softmax: (batch, heads, to, from)."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        is_later = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).triu(1)
        self.register_buffer("is_later", is_later, persistent=False)

    is_later: Tensor

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        q, k = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (q, k))
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
        return scores.masked_fill(self.is_later[: q.shape[2], : q.shape[2]], HIDDEN)


class Mix(nn.Module):
    """The mean of the values by the softmax of the scores."""

    def forward(self, scores: Tensor, v: Tensor) -> Tensor:
        v = v.unflatten(2, (scores.shape[1], -1)).transpose(1, 2)
        return (scores.softmax(3) @ v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """x + attention, and to that a perceptron's output, each of the normalised stream."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.scores, self.mix, self.proj = Scores(heads), Mix(), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.proj(self.mix(self.scores(self.q(y), self.k(y)), self.v(y)))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


INSIDE = ["?", "*.q", "*.k", "*.v", "*.mix", "*.up"]
# Where beliefs lie: nn.Sequential's items, or the modules of these names.
PLACES: dict[str, list[str] | None] = {
    "between blocks": None,
    "inside": INSIDE,
    "inside, with scores": [*INSIDE, "*.scores"],
}


def layers(
    letters: int, places: str, seed: int, width: int = 32, blocks: int = 2, scale: float = 3.0
) -> nn.Sequential | PCGraph:
    """The model, whose weights follow from the seed, wherever its beliefs lie."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        Embedding(letters, width, scale),
        *[Block(width) for _ in range(blocks)],
        nn.Sequential(nn.LayerNorm(width), nn.Linear(width, letters)),
    )
    beliefs = PLACES[places]
    if beliefs is None:
        return model
    return pc_graph(model, torch.zeros(2, CONTEXT, dtype=torch.long), beliefs)


def summed_cross_entropy(logits: Tensor, Y: Tensor) -> Tensor:
    """Of all characters of the batch."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), Y.flatten(), reduction="sum")


@torch.no_grad()
def bits_per_character(model: nn.Module, text: Text, part: str, batches: int = 20) -> float:
    """On the same stretches of a part of the text for every model."""
    losses = [summed_cross_entropy(model(X), Y).item() for X, Y in text.batches(batches, 1, part)]
    return math.fsum(losses) / (batches * BATCH * CONTEXT * math.log(2))
