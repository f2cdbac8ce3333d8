"""The paper's networks, each an ``nn.Sequential`` whose items are its predictive coding layers.

Weights start as PyTorch draws them; seed before calling.
"""

from __future__ import annotations

from torch import nn


def mnist_net() -> nn.Sequential:
    """5 layers and 32 695 parameters, for images of shape (batch, 1, 28, 28)."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 10, 3), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(10, 5, 3), nn.ReLU(), nn.Flatten()),
        nn.Sequential(nn.Linear(605, 50), nn.ReLU()),
        nn.Sequential(nn.Linear(50, 30), nn.ReLU()),
        nn.Sequential(nn.Linear(30, 10)),
    )


def cifar_net() -> nn.Sequential:
    """6 layers and 4 633 738 parameters, for images of shape (batch, 3, 32, 32)."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(128, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        nn.Sequential(nn.Linear(16384, 256), nn.ReLU()),
        nn.Sequential(nn.Linear(256, 256), nn.ReLU()),
        nn.Sequential(nn.Linear(256, 10)),
    )
