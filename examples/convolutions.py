r"""
Convolutional and residual networks
===================================

**Question.** Which parts of a network should be layers of predictive coding?

``PCInfer`` takes every item of the ``nn.Sequential`` as one layer :math:`f_l` with one belief; a layer
can be any module. The choice matters twice. First, an error climbs down one *item* an iteration,
so that of the gradient of the item that lies m items below the loss FixedPred's update has the share

.. math:: c_m(n-1) = P[\mathrm{Binomial}(n-1, \eta) \ge m],

and Strict's at first a little less. Second, what lies *between* two beliefs has to be a function of
the lower one alone: a skip connection must begin and end inside one item.
"""

import math
import warnings

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from paper_figures.data import load_digits
from torch2pc import PCInfer

STEPS = 80  # short: 2
BATCH = 50  # short: 10
CPU = torch.device("cpu")

digits = load_digits(None)
LossFun = nn.CrossEntropyLoss()

# %%
# A convolutional network, cut in two ways
# ----------------------------------------
# The same modules with the same weights, once with every module an item, once with a convolution and
# what belongs to it as one item, cut before the next activation.

torch.manual_seed(0)
convolution_1, convolution_2 = nn.Conv2d(1, 16, 5, stride=2), nn.Conv2d(16, 32, 3)
dense_1, dense_2 = nn.Linear(32 * 5 * 5, 64), nn.Linear(64, 10)

every_module = nn.Sequential(
    convolution_1,
    nn.ReLU(),
    convolution_2,
    nn.MaxPool2d(2),
    nn.ReLU(),
    nn.Flatten(),
    dense_1,
    nn.ReLU(),
    dense_2,
)
blocks = nn.Sequential(
    convolution_1,
    nn.Sequential(nn.ReLU(), convolution_2, nn.MaxPool2d(2)),
    nn.Sequential(nn.ReLU(), nn.Flatten(), dense_1),
    nn.Sequential(nn.ReLU(), dense_2),
)

batch = next(digits.train_batches(1, BATCH, seed=0, device=CPU))
LossFun(blocks(batch.X), batch.labels).backward()
gradient = convolution_1.weight.grad.norm()

print("layer 1's update, as a share of the gradient, at eta = 0.1")
print("items    n   binomial   FixedPred     Strict")
for model in every_module, blocks:
    for n in 10, 20, 40:
        m = len(model) - 1
        expected = sum(math.comb(n - 1, k) * 0.1**k * 0.9 ** (n - 1 - k) for k in range(m, n))
        shares = []
        for ErrType in "FixedPred", "Strict":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they say what this table shows
                PCInfer(model, LossFun, batch.X, batch.labels, ErrType, eta=0.1, n=n)
            shares.append((convolution_1.weight.grad.norm() / gradient).item())
        print(f"{len(model):5} {n:4}   {expected:8.1e}    {shares[0]:8.1e}   {shares[1]:8.1e}")

# %%
# With nine items and n = 20, hardly anything arrives at layer 1; with four, 29% of the gradient does.
# An activation of its own is a layer to climb through and brings nothing. (``PCInfer`` warns
# where less than a millionth arrives.)

# %%
# A residual network
# ------------------
# Each item is a whole residual block. Its belief is about the stream that the block adds to. In a call,
# the running statistics of batch normalisation move once, as in one forward pass, not once an iteration.


class Residual(nn.Module):
    """x + F(x); the scale of F's last normalisation starts at ``scale``."""

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        nn.init.constant_(self.branch[-1].weight, scale)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def residual_network(scale: float) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 16, 5, stride=3, padding=1, bias=False), nn.BatchNorm2d(16)),
        Residual(16, scale),
        Residual(16, scale),
        nn.Sequential(
            nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(144, 10)
        ),
    )


# %%
# How large may eta be?
# ---------------------
# Relaxation is stable for eta below 2 over the energy's largest curvature, which grows as
# :math:`(1 + \max \lVert J_l \rVert)^2`. A block whose last scale starts at 0, a usual thing to do in
# deep networks, starts as the identity, with a Jacobian of 1; with a scale of 1, its Jacobian is several
# times that. We look at layer 1's error after 20 iterations, relative to the gradient
# there: below 1 it is on its way, far above 1 it diverges.

print("layer 1's error relative to the gradient, n = 20")
print("eta                 0.05      0.1      0.2      0.4")
for scale in 0.0, 1.0:
    model = residual_network(scale)
    exact = PCInfer(model, LossFun, batch.X, batch.labels, "Exact").epsilon[1].norm()
    ratios = [
        PCInfer(model, LossFun, batch.X, batch.labels, "Strict", eta).epsilon[1].norm() / exact
        for eta in (0.05, 0.1, 0.2, 0.4)
    ]
    print(f"scale {scale:8}", *(f"{ratio.item():8.2g}" for ratio in ratios))

# %%
# Training
# --------
# Jacobians grow in training, so that we stay well below what is stable at the start. With eta = 0.1 and
# n = 20 the share that reaches layer 1 is P[Binomial(19, 0.1) ≥ 3] = 0.29, enough for Adam.


def train(ErrType: str) -> tuple[list[float], float]:
    """The losses of the steps, and the test accuracy."""
    model = residual_network(scale=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
    losses = []
    for batch in digits.train_batches(STEPS, BATCH, seed=0, device=CPU):
        result = PCInfer(model, LossFun, batch.X, batch.labels, ErrType, eta=0.1, n=20)
        optimizer.step()
        losses.append(result.Loss.item())
    model.eval()
    with torch.no_grad():
        right = [model(b.X).argmax(1) == b.labels for b in digits.all_test_batches(500, CPU)]
    return losses, torch.cat(right).double().mean().item()


figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
for ErrType, style in {"Exact": "-", "FixedPred": "--", "Strict": "-."}.items():
    losses, accuracy = train(ErrType)
    print(f"{ErrType:10} test accuracy after {STEPS} steps: {accuracy:.3f}")
    means = torch.tensor(losses).unfold(0, min(8, STEPS), 1).mean(1)
    axes.plot(means, style, label=f"{ErrType}, {accuracy:.1%} right")
axes.set(xlabel="training step", ylabel="loss, mean over 8 steps", yscale="log")
axes.legend()
plt.show()

# %%
# All three end near 85% after these few steps.
#
# **Conclusion.** Make an item of what you would call a layer or a block, cut it before the activation,
# and leave skip connections inside. Let the Jacobians be near 1, so that eta may be 0.1, and choose n so
# that the error arrives: from n = 1 + (L−1)/eta on, at least half of it is at layer 1.
