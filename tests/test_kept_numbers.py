"""Numbers of a few networks, kept: whoever rewrites the relaxations finds the same ones.

For each, the loss, the lengths of the errors, and the first four updates, each weighed by the places in it.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torch2pc import PCInfer

NETWORKS = {
    "tanh": lambda: [nn.Linear(6, 7), [nn.Tanh(), nn.Linear(7, 5)], [nn.Tanh(), nn.Linear(5, 3)]],
    "normalised": lambda: [
        nn.Linear(6, 8),
        [nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 6)],
        [nn.BatchNorm1d(6), nn.SiLU(), nn.Linear(6, 3)],
    ],
    "convolutional": lambda: [
        [nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2)],
        [nn.ReLU(), nn.Flatten(), nn.Linear(8, 5)],
        nn.Linear(5, 3),
    ],
}
# fmt: off
KEPT = {
    ("tanh", "Strict", "v"): [9.580310736227162, 0.2215987365564586, 1.0856715922985525, 2.132044469590015,
        4.5342810674517375, 1.1031483321987336, -0.06417345647097406, 2.6700881754185333],
    ("tanh", "ErrorBased", "v"): [9.580310736227162, 0.6237111094806759, 1.1253132953373766,
        2.061517913500171,
        15.116758407107701, 3.216661473660087, -1.4100284258921818, 2.1395780852706885],
    ("normalised", "Strict", "vhat"): [9.246084693145516, 0.1546263445852676, 0.7219988063109365,
        1.8885939574433173, -2.4781283896944304, 0.4339093032059086, 2.396106997832032, -0.6004562381172917],
    ("normalised", "ErrorBased", "vhat"): [9.246084693145516, 0.2612784945666529, 0.6654252671801796,
        1.88114728439185, -4.764013690120038, 0.9052278603237262, 2.891684924538748, -0.5606795333805068],
    ("convolutional", "Strict", "before"): [11.607426972045639, 0.4991483651327205, 1.1828476053685073,
        2.1990956442606175, -0.49753180643617045, 0.4075643583452879, 151.36670318460878, 7.471397264201483],
    ("convolutional", "ErrorBased", "before"): [11.607426972045639, 1.3306550066728804, 1.3737057918441327,
        1.901029784860521, -1.4481298028371006, 0.5056439506586536, 154.02056449293252, 8.432843655275473],
}
# fmt: on


@pytest.mark.parametrize(("network", "ErrType", "update_at"), list(KEPT))
def test_the_numbers_are_the_same(network: str, ErrType: str, update_at: str) -> None:
    items = [nn.Sequential(*i) if isinstance(i, list) else i for i in NETWORKS[network]()]
    model = nn.Sequential(*items).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((torch.arange(p.numel()) * 0.7).sin().reshape(p.shape) * 0.5)
    X, Y = (torch.arange(48.0).double() * 1.3).cos().reshape(8, 6), torch.arange(8) % 3
    loss = nn.CrossEntropyLoss(reduction="sum")
    result = PCInfer(model, loss, X, Y, ErrType, eta=0.1, n=12, update_at=update_at)
    errors = [e.norm().item() for e in result.epsilon[1:] if e is not None]
    gradients = [p.grad for p in model.parameters()][:4]
    updates = [
        (g * (torch.arange(g.numel()).reshape(g.shape) + 1)).sum().item()
        for g in gradients
        if g is not None
    ]
    found = [result.Loss.item(), *errors, *updates]
    assert found == pytest.approx(KEPT[network, ErrType, update_at], rel=1e-10)
