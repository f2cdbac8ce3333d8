"""Draws a followed inference: ``python docs/pictures/follow.py`` writes follow.png beside this file."""

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from paper_figures.data import load_digits  # noqa: E402
from torch2pc import Record, follow  # noqa: E402


def digits_record() -> Record:
    """Strict with its defaults on six layers: how the error climbs down."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Flatten(), nn.Linear(784, 128)),
        *[nn.Sequential(nn.Tanh(), nn.Linear(128, 128)) for _ in range(4)],
        nn.Sequential(nn.Tanh(), nn.Linear(128, 10)),
    )
    batch = next(load_digits(None).train_batches(1, 100, seed=1, device=torch.device("cpu")))
    return follow(
        model, nn.CrossEntropyLoss(reduction="sum"), batch.X, batch.labels, "Strict", eta=0.1, n=60
    )


if __name__ == "__main__":
    record = digits_record()
    print(record)
    figure = record.plot(Figure(figsize=(10, 5.2), layout="constrained"))
    figure.savefig(HERE / "follow.png", dpi=90)
