"""Code written for Torch2PC runs with the import changed, and the page about it as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from paper_figures.data import load_digits
from tests.cases import ERR_TYPES, assert_close

PAGE = Path(__file__).parent.parent / "docs" / "from_torch2pc.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)

# In the manner of its example notebooks: what surrounds a training loop, and what is looked at in it.
SCRIPT = """
import numpy as np
import torch
import torch.nn as nn
import torch2pc as T2PC

model=nn.Sequential(
    nn.Sequential(nn.Conv2d(1,4,5,stride=2), nn.ReLU(), nn.MaxPool2d(2)),
    nn.Sequential(nn.Flatten(), nn.Linear(4*6*6,30), nn.ReLU()),
    nn.Sequential(nn.Linear(30,10))
)
LossFun = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=.005)
train_loader = torch.utils.data.DataLoader(train_dataset, batch_size=100, shuffle=True)

NumSteps=len(train_loader)
Losses=np.zeros(NumSteps)
RelErrs=np.zeros([NumSteps,len(model)])
etas=np.full(NumSteps,.1)

for j,(X,Y) in enumerate(train_loader):
    vhat,Loss,dLdy,v,epsilon=T2PC.PCInfer(model,LossFun,X,Y,ErrType,etas[j],n)

    # The gradients, by hand, from a feed-forward pass and the exact errors
    vhat0,Loss0,dLdy0=T2PC.FwdPassPlus(model,LossFun,X,Y)
    for layer in range(len(model)):
        e=torch.autograd.grad(Loss0,vhat0[layer+1],retain_graph=True)[0]
        for p in model[layer].parameters():
            g=torch.autograd.grad(vhat0[layer+1],p,grad_outputs=e,retain_graph=True)[0]
            if p.dim()>1:
                RelErrs[j,layer]=((p.grad-g).norm()/g.norm()).item()

    optimizer.step()
    model.zero_grad()
    optimizer.zero_grad()
    with torch.no_grad():
        Losses[j]=Loss.item()
        Yhat=model(X)
        Accuracy=(torch.sum(Yhat.argmax(1)==Y)/len(Y)).item()
"""


@pytest.mark.parametrize(
    ("ErrType", "n"), [*[(ErrType, 20) for ErrType in ERR_TYPES], ("FixedPred", None)]
)
def test_a_training_script(ErrType: str, n: int | None) -> None:
    digits = load_digits(None)
    images = digits.train_images[:3000].float() / 255
    names: dict[str, Any] = {
        "train_dataset": torch.utils.data.TensorDataset(images, digits.train_labels[:3000]),
        "ErrType": ErrType,
        "n": n,
    }
    exec(compile(SCRIPT, "script", "exec"), names)
    Losses, RelErrs = names["Losses"], names["RelErrs"]
    assert Losses[-5:].mean() < 0.6 * Losses[0]
    assert names["Accuracy"] > 0.6
    if ErrType == "Exact":
        assert RelErrs.max() < 1e-4
    elif ErrType == "FixedPred":
        # 1 - P[Binomial(n-1, eta) >= L-l]
        k = 19 if n == 20 else 2
        expected = [1 - (1 - 0.9**k - k * 0.1 * 0.9 ** (k - 1)), 0.9**k, 0]
        assert RelErrs == pytest.approx(torch.tensor([expected] * 30).numpy(), abs=1e-4)
    elif ErrType in ("Strict", "ErrorBased"):  # the others come near the gradient
        assert RelErrs[:, 0].min() > 0.1


def test_the_pages_blocks_run() -> None:
    """One after the other, as a notebook's cells do."""
    model = nn.Sequential(nn.Linear(784, 5), nn.Tanh(), nn.Linear(5, 10))
    names = {
        "torch": torch,
        "nn": nn,
        "model": model,
        "LossFun": nn.CrossEntropyLoss(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "X": torch.rand(6, 784),
        "Y": torch.randint(10, (6,)),
        "ErrType": "FixedPred",
        "eta": 0.1,
        "n": 20,
    }
    assert len(BLOCKS) == 5
    for block in BLOCKS:
        exec(compile(block, str(PAGE), "exec"), names)
    assert torch.equal(names["epsilon"][0], names["X"].grad)
    Loss = names["LossFun"](names["model"](names["X"]), names["Y"])
    assert_close(names["dtheta"], torch.autograd.grad(Loss, names["model"][0].weight)[0], 1e-5)
