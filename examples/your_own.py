r"""
Your own loss, precision and displacement rule
==============================================

**Question.** What can be put in the place of the parts that come with PyTorch?

Three things, and this page takes them in turn: any function of the output and of Y that returns a
scalar is a loss, parameters of its own included; each layer's errors can be weighed by a precision; and a
module whose arithmetic ``PCInfer`` cannot follow can be taught to it, so that Strict's errors are right
to float precision again.
"""

import math

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from paper_figures.data import load_digits
from torch2pc import PCInfer, PCInferLatent, displacement_rule

STEPS = 200  # short: 5
CPU = torch.device("cpu")

digits = load_digits(None)

# %%
# A loss with parameters
# ----------------------
# The task is to tell from an image's upper half how much ink its lower half has. Some halves tell more
# than others; the network says how sure it is, and the loss is the negative log-likelihood of a Student
# distribution, whose degrees of freedom are learned with the network:
#
# .. math::
#
#    \mathrm{Loss} = \sum \Big[ \log s
#       + \tfrac{\nu + 1}{2} \log\big(1 + \tfrac{(y - m)^2}{\nu s^2}\big)
#       - \log \Gamma\big(\tfrac{\nu + 1}{2}\big) + \log \Gamma\big(\tfrac{\nu}{2}\big)
#       + \tfrac12 \log \nu\pi \Big]
#
# As it is an ``nn.Module``, its parameter gets a gradient too, with every algorithm. It sums over the
# batch, so that an example's update does not depend on how many others are in its batch.


class StudentLoss(nn.Module):
    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight
        self.log_nu = nn.Parameter(torch.tensor(3.0))

    def forward(self, output: Tensor, Y: Tensor) -> Tensor:
        m, log_s = output.unbind(1)
        nu = self.log_nu.exp()
        z = (Y - m) / log_s.exp()
        losses = (
            log_s
            + (nu + 1) / 2 * torch.log1p(z.square() / nu)
            - torch.lgamma((nu + 1) / 2)
            + torch.lgamma(nu / 2)
            + 0.5 * torch.log(nu * math.pi)
        )
        return self.weight * losses.sum()


def halves(X: Tensor) -> tuple[Tensor, Tensor]:
    """The upper half's pixels, and the lower half's ink in tenths of all its pixels."""
    return X[:, 0, :14].flatten(1), 10 * X[:, 0, 14:].mean((1, 2))


def train(ErrType: str, weight: float) -> tuple[nn.Sequential, StudentLoss]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(14 * 28, 64),
        nn.Sequential(nn.Tanh(), nn.Linear(64, 32)),
        nn.Sequential(nn.Tanh(), nn.Linear(32, 2)),
    )
    LossFun = StudentLoss(weight)
    optimizer = torch.optim.Adam([*model.parameters(), *LossFun.parameters()], lr=0.003)
    for batch in digits.train_batches(STEPS, 100, seed=0, device=CPU):
        upper, ink = halves(batch.X)
        PCInfer(model, LossFun, upper, ink, ErrType, eta=0.05, n=20)
        optimizer.step()
    return model, LossFun


upper, ink = halves(digits.test_images / 255)
print(f"deviation of the ink in test images: {ink.std():.2f}")
print("algorithm  weight   left unexplained   learned nu   within one scale")
for ErrType, weight in ("Exact", 1.0), ("Strict", 1.0), ("Strict", 0.01):
    model, LossFun = train(ErrType, weight)
    with torch.no_grad():
        m, log_s = model(upper).unbind(1)
    inside = ((ink - m).abs() < log_s.exp()).double().mean().item()
    left, nu = (ink - m).std().item(), LossFun.log_nu.exp().item()
    print(f"{ErrType:9} {weight:7} {left:14.2f} {nu:15.1f} {inside:15.0%}")

# %%
# Two thirds within one scale would be right. With weight 1 Strict is far too sure of itself: it takes its
# updates where the beliefs have already moved towards the target, so that the scale it learns is
# that of errors which the next layer has explained away. With a weight of 0.01 beliefs hardly move, and
# it is nearly as well calibrated as backpropagation.

# %%
# Precision
# ---------
# ``PCInferLatent`` weighs layer l's errors by :math:`\pi_l = 1/\sigma_l^2`. ``PCInfer`` has no such
# argument, as a weight of the loss does the same: the energy with a precision :math:`\pi` in all hidden
# layers is :math:`\pi` times the energy with the loss divided by :math:`\pi`. The heavier the loss, the
# further the beliefs move from the feed-forward values, and the more an update differs from the gradient:

batch = next(digits.train_batches(1, 100, seed=1, device=CPU))
torch.manual_seed(0)
classifier = nn.Sequential(
    nn.Sequential(nn.Flatten(), nn.Linear(784, 64)),
    nn.Sequential(nn.Tanh(), nn.Linear(64, 32)),
    nn.Sequential(nn.Tanh(), nn.Linear(32, 10)),
)
cross_entropy = nn.CrossEntropyLoss(reduction="sum")
cross_entropy(classifier(batch.X), batch.labels).backward()
weights = [item[-1].weight for item in classifier]
gradients = [weight.grad.clone() for weight in weights]
print("weight of the loss    angle between update and gradient, layers 1 to 3 (degrees)")
for weight_of_loss in 0.01, 0.1, 1.0:
    PCInfer(
        classifier,
        lambda y, Y, w=weight_of_loss: w * cross_entropy(y, Y),
        batch.X,
        batch.labels,
        "Strict",
        eta=0.05,
        n=100,
    )
    cosines = [
        nn.functional.cosine_similarity(w.grad.flatten(), g.flatten(), 0)
        for w, g in zip(weights, gradients, strict=True)
    ]
    angles = [torch.rad2deg(c.clamp(-1, 1).acos()).item() for c in cosines]
    print(f"{weight_of_loss:14}          ", *(f"{angle:6.2f}" for angle in angles))

# %%
# With a latent, a precision for each layer: how much of the explanation is left to the hidden belief.

decoder = nn.Sequential(nn.Sequential(nn.Linear(8, 64), nn.Tanh()), nn.Linear(64, 784))
images = batch.X.flatten(1)
for pi in 0.1, 1.0, 10.0:
    result = PCInferLatent(
        decoder,
        lambda output, Y: 0.5 * (output - Y).square().sum(),
        images,
        torch.zeros(len(images), 8),
        eta=0.05 / max(1.0, pi),
        n=200,
        precision=[pi],
    )
    print(f"precision {pi:4}: hidden error {result.epsilon[1].square().mean().sqrt():.3f}")

# %%
# A displacement rule
# -------------------
# Strict iterates how far beliefs have moved from the feed-forward pass, by a rule for each of PyTorch's
# operations. An operation with a backward pass of its own is not one of them: the layer is then evaluated
# at a + d and at a and the two are subtracted, which costs the digits that they share. Take an
# activation that saves memory by a backward pass of its own:


class SineSquared(torch.autograd.Function):
    """x + sin(x)^2, whose backward pass needs x alone."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x + x.sin().square()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (1 + (2 * x).sin())


class Snake(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return SineSquared.apply(x)


def deep(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    items = [nn.Sequential(nn.Flatten(), nn.Linear(784, 64))]
    items += [nn.Sequential(Snake(), nn.Linear(64, 64)) for _ in range(6)]
    items += [nn.Sequential(Snake(), nn.Linear(64, 10))]
    return nn.Sequential(*items).to(dtype)


def errors(dtype: torch.dtype) -> list[Tensor]:
    LossFun = nn.CrossEntropyLoss()
    result = PCInfer(deep(dtype), LossFun, batch.X.to(dtype), batch.labels, "Strict", 0.2, 20)
    return [e.double() for e in result.epsilon[1:]]


without_rule = errors(torch.float32)

# %%
# The rule says what :math:`f(a + d) - f(a)` is without subtracting: by a formula for differences of
# sines, :math:`\sin^2(a+d) - \sin^2 a = \sin(2a + d) \sin d`.


@displacement_rule(Snake)
def snake_moves(module: Snake, a: Tensor, d: Tensor) -> Tensor:
    return d + torch.sin(2 * a + d) * torch.sin(d)


with_rule, precise = errors(torch.float32), errors(torch.float64)

figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
for name, found in {"without": without_rule, "with": with_rule}.items():
    off = [((e - p).norm() / p.norm()).item() for e, p in zip(found, precise, strict=True)]
    print(f"{name:7} the rule, error of epsilon in float32:", *(f"{x:.0e}" for x in off))
    axes.plot(range(1, len(off) + 1), off, "o-", label=f"{name} the rule")
axes.set(xlabel="layer", ylabel="relative error of ε in float32", yscale="log")
axes.legend()
plt.show()

# %%
# **Conclusion.** Losses are free. A precision of the hidden layers is the loss's weight turned
# over. And a rule of one line brings an operation that PyTorch does not know into Strict's arithmetic;
# it is checked against the module the first time that it is used.
