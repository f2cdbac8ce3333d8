"""Predictive coding against backprop: the training loop of figures 1, 3 and 5, and its measures.

Two copies of a network start from the same weights and see the same batches. One is trained with
`torch2pc.PCInfer`, the other with ``loss.backward()``; at each step the predictive coding update is
compared with the gradient at the same weights. What is drawn of it is in `plotting`.
"""

from __future__ import annotations

import copy
import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from paper_figures.data import Batch, DataSet
from paper_figures.nets import mnist_net
from paper_figures.progress import track
from paper_figures.report import Number, Options
from torch2pc import PCInfer
from torch2pc.pcinfer import PCResult
from torch2pc.steps import Rule

LossFunction = Callable[[Tensor, Tensor], Tensor]


def squared_error(output: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error against one-hot labels: output (batch, classes), labels (batch,)."""
    targets = functional.one_hot(labels, output.shape[1])
    return functional.mse_loss(output, targets.to(output.dtype))


def half_squared_error(output: Tensor, labels: Tensor) -> Tensor:
    """Half the sum of the squared errors against one-hot labels: output (batch, classes)."""
    return 0.5 * (output - functional.one_hot(labels, output.shape[1])).square().sum()


def cross_entropy(output: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy: output (batch, classes), labels (batch,)."""
    return functional.cross_entropy(output, labels)


@dataclass(frozen=True)
class Setup:
    """How a network is trained, in the paper's symbols; Adam with PyTorch's other settings."""

    ErrType: str
    eta: float
    n: int
    LossFun: LossFunction
    steps: int
    batch_size: int
    learning_rate: float

    def summary(self) -> dict[str, str | float]:
        return {**vars(self), "LossFun": self.LossFun.__name__, "optimizer": "Adam"}


@dataclass
class Curves:
    """One value a step; accuracy is the share of right answers in the batch."""

    train_loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)

    def append(self, train: tuple[float, float], test: tuple[float, float]) -> None:
        self.train_loss.append(train[0])
        self.train_accuracy.append(train[1])
        self.test_loss.append(test[0])
        self.test_accuracy.append(test[1])


@dataclass
class Convergence:
    """Updates after 1, 2, ... iterations against the gradient: (iterations, layers).

    The angle of a layer that no error has reached, whose update is zero, is not a number.
    """

    relative_error: list[list[float]] = field(default_factory=list)
    angle: list[list[float]] = field(default_factory=list)

    def append(self, updates: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        self.relative_error.append(list(map(relative_error, updates, gradients)))
        self.angle.append(list(map(angle, updates, gradients)))

    def defined_angles(self) -> list[list[float]]:
        return [[value for value in angles if not math.isnan(value)] for angles in self.angle]

    def fate(self) -> str:
        """Whether every layer came nearer to the gradient than it was at the start."""
        start, end = self.relative_error[0], self.relative_error[-1]
        if not math.isfinite(sum(end)) or max(end) > max(start):
            return "diverges"
        return "converges" if max(end) < max(start) else "stays"


@dataclass
class Comparison:
    """What `compare_with_backprop` measured.

    PC, BP: the curves of the two networks; PC_accuracy, BP_accuracy: on all test images at the end.
    relative_error, angle: the predictive coding update against the gradient, (steps, layers).
    other: the same of another way to compute the updates, at every `other_every`-th step.
    """

    PC: Curves = field(default_factory=Curves)
    BP: Curves = field(default_factory=Curves)
    PC_accuracy: float = math.nan
    BP_accuracy: float = math.nan
    relative_error: list[list[float]] = field(default_factory=list)
    angle: list[list[float]] = field(default_factory=list)
    other: Convergence = field(default_factory=Convergence)
    other_every: int = 10

    def series(self) -> dict[str, object]:
        return {
            "PC": vars(self.PC),
            "BP": vars(self.BP),
            "relative error": self.relative_error,
            "angle in degrees": self.angle,
            f"computed otherwise, every {self.other_every} steps": vars(self.other),
            "PC accuracy on all test images": self.PC_accuracy,
            "BP accuracy on all test images": self.BP_accuracy,
        }


def infer_by_torch2pc(model: nn.Sequential, batch: Batch, setup: Setup) -> PCResult:
    """`PCInfer` with the settings of a training."""
    return PCInfer(model, setup.LossFun, batch.X, batch.labels, setup.ErrType, setup.eta, setup.n)


def compare_with_backprop(
    net: Callable[[], nn.Sequential],
    data: DataSet,
    setup: Setup,
    options: Options,
    title: str,
    infer: Callable[[nn.Sequential, Batch, Setup], PCResult] = infer_by_torch2pc,
    other: Callable[[nn.Sequential, Batch, Setup], list[Tensor]] | None = None,
) -> Comparison:
    """Train a network by predictive coding and by backprop, over the same batches.

    net: makes it; its weights come from the seed of the run.
    infer: writes the updates into ``.grad``, as PCInfer does.
    other: another way to compute the weights' updates, measured on the way.
    """
    BP_model, curves = trained_by_backprop(net, data, setup, options)
    comparison = Comparison(BP=curves)
    model = fresh(net, options.seed, options.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=setup.learning_rate)
    batches = paired_batches(data, setup, options.seed, options.device)
    for step, (train, test) in enumerate(track(batches, title, setup.steps)):
        gradients = weight_gradients(model, setup.LossFun, train)
        if other is not None and step % comparison.other_every == 0:
            comparison.other.append(other(model, train, setup), gradients)
        result = infer(model, train, setup)
        updates = [weight.grad for weight in weights_of(model)]
        comparison.relative_error.append(list(map(relative_error, updates, gradients)))
        comparison.angle.append(list(map(angle, updates, gradients)))
        PC_train = result.Loss.item(), accuracy(result.vhat[-1], train.labels)
        optimizer.step()
        comparison.PC.append(PC_train, evaluate(model, setup.LossFun, test))

    comparison.PC_accuracy = test_accuracy(model, data, options.device)
    comparison.BP_accuracy = test_accuracy(BP_model, data, options.device)
    return comparison


def fresh(net: Callable[[], nn.Sequential], seed: int, device: torch.device) -> nn.Sequential:
    """A network with weights from the seed."""
    torch.manual_seed(seed)
    return net().to(device)


def trained_by_backprop(
    net: Callable[[], nn.Sequential], data: DataSet, setup: Setup, options: Options
) -> tuple[nn.Sequential, Curves]:
    """The network after the set-up's steps of backprop, and its curves.

    It is trained once, for all figures that look at it.
    """
    setup = replace(setup, ErrType="backprop", eta=0, n=0)
    return copy.deepcopy(_trained_by_backprop(net, data, setup, options.seed, options.device))


@cache
def _trained_by_backprop(
    net: Callable[[], nn.Sequential], data: DataSet, setup: Setup, seed: int, device: torch.device
) -> tuple[nn.Sequential, Curves]:
    model, curves = fresh(net, seed, device), Curves()
    optimizer = torch.optim.Adam(model.parameters(), lr=setup.learning_rate)
    batches = paired_batches(data, setup, seed, device)
    for train, test in track(batches, "backprop", setup.steps):
        before_the_step = backprop_step(model, optimizer, setup.LossFun, train)
        curves.append(before_the_step, evaluate(model, setup.LossFun, test))
    return model, curves


def papers_setup(
    options: Options, ErrType: str, eta: float, n: int, LossFun: LossFunction
) -> Setup:
    """How the paper trains `mnist_net`: two epochs of MNIST."""
    steps, batch_size = options.pick(quick=(40, 100), default=(120, 300), full=(400, 300))
    return Setup(ErrType, eta, n, LossFun, steps, batch_size, learning_rate=0.002)


def papers_cifar_setup(options: Options, eta: float, n: int) -> Setup:
    """How the paper trains its network for CIFAR-10: five epochs by FixedPred."""
    steps, batch_size = options.pick(quick=(2, 8), default=(40, 64), full=(975, 256))
    return Setup("FixedPred", eta, n, cross_entropy, steps, batch_size, learning_rate=0.01)


def trained_mnist_net(
    data: DataSet, LossFun: LossFunction, options: Options
) -> tuple[nn.Sequential, dict[str, object]]:
    """`mnist_net` after the paper's training by backprop, and the settings of that training."""
    setup = papers_setup(options, "backprop", 0, 0, LossFun)
    model, _ = trained_by_backprop(mnist_net, data, setup, options)
    settings = {
        "trained by": "backprop, Adam",
        "LossFun": LossFun.__name__,
        "steps": setup.steps,
        "batch_size": setup.batch_size,
        "learning_rate": setup.learning_rate,
    }
    return model, settings


def backprop_step(
    model: nn.Sequential, optimizer: torch.optim.Optimizer, LossFun: LossFunction, batch: Batch
) -> tuple[float, float]:
    """One step of backprop; the loss and accuracy on its batch before the step."""
    optimizer.zero_grad()
    output = model(batch.X)
    loss = LossFun(output, batch.labels)
    loss.backward()
    optimizer.step()
    return loss.item(), accuracy(output, batch.labels)


def incremental_steps(
    model: nn.Sequential, LossFun: LossFunction, batch: Batch, eta: float | Rule, n: int
) -> Iterator[PCResult]:
    """Strict's beliefs from the feed-forward pass, with updates in ``.grad`` after each of n steps.

    Incremental predictive coding moves the weights after each, down the energy as the beliefs.
    """
    v = None
    for _ in range(n):
        result = PCInfer(
            model, LossFun, batch.X, batch.labels, "Strict", eta, 1, v, update_at="before"
        )
        yield result
        v = result.v


@contextmanager
def quietly() -> Iterator[None]:
    """Without the warnings about what is shown here: errors that arrive nowhere or stop short."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def paired_batches(
    data: DataSet, setup: Setup, seed: int, device: torch.device
) -> Iterator[tuple[Batch, Batch]]:
    """A training batch and a random test batch of the same size for every step."""
    train = data.train_batches(setup.steps, setup.batch_size, seed, device)
    test = data.test_batches(setup.steps, setup.batch_size, seed, device)
    return zip(train, test, strict=True)


@torch.no_grad()
def evaluate(model: nn.Sequential, LossFun: LossFunction, batch: Batch) -> tuple[float, float]:
    """The loss and the accuracy on one batch."""
    output = model(batch.X)
    return LossFun(output, batch.labels).item(), accuracy(output, batch.labels)


@torch.no_grad()
def test_accuracy(model: nn.Sequential, data: DataSet, device: torch.device) -> float:
    """The share of all test images that the model gets right."""
    right = 0
    for batch in data.all_test_batches(1000, device):
        right += int((model(batch.X).argmax(1) == batch.labels).sum())
    return right / len(data.test_images)


def accuracy(output: Tensor, labels: Tensor) -> float:
    return (output.argmax(1) == labels).to(torch.float32).mean().item()


def weights_of(model: nn.Sequential) -> list[Tensor]:
    """The weight of each layer that has one, from the input to the output."""
    weights = []
    for layer in model:
        named = [value for name, value in layer.named_parameters() if name.endswith("weight")]
        weights += named[:1]
    return weights


def weight_gradients(model: nn.Sequential, LossFun: LossFunction, batch: Batch) -> list[Tensor]:
    """The gradient of the loss for each layer's weight, leaving ``.grad`` alone."""
    loss = LossFun(model(batch.X), batch.labels)
    return list(torch.autograd.grad(loss, weights_of(model)))


def relative_error(update: Tensor, gradient: Tensor) -> float:
    """``||update - gradient|| / ||gradient||``, computed in float64."""
    update, gradient = update.double(), gradient.double()
    return ((update - gradient).norm() / gradient.norm()).item()


def angle(update: Tensor, gradient: Tensor) -> float:
    """The angle between an update and the gradient in degrees, computed in float64."""
    update, gradient = update.double().flatten(), gradient.double().flatten()
    cosine = update @ gradient / (update.norm() * gradient.norm())
    # Rounding can carry the cosine of parallel vectors past 1, where acos is not a number.
    return torch.rad2deg(torch.acos(cosine.clamp(-1, 1))).item()


def loss_numbers(
    comparison: Comparison, paper: Mapping[str, Mapping[int, float]], tolerance: float = 0.35
) -> list[Number]:
    """The training losses at the paper's steps, of ``PC`` and of ``BP``.

    The paper's are those of single batches, which vary by about the tolerance, a share of their
    value; ours are means over the 21 steps around, as far as there are so many.
    """
    numbers = []
    for who, values in paper.items():
        losses = getattr(comparison, who).train_loss
        numbers += [
            Number(
                f"{who} loss at step {step}",
                value,
                statistics.fmean(losses[max(step - 10, 0) : step + 11]),
                tolerance * value,
            )
            for step, value in values.items()
            if step < len(losses)
        ]
    return numbers


def layer_numbers(
    what: str,
    paper: Sequence[float],
    ours: Sequence[float],
    tolerances: Sequence[float | None],
    check: bool = False,
) -> list[Number]:
    """One number a layer."""
    return [
        Number(f"{what}, layer {layer}", *values, check)
        for layer, values in enumerate(zip(paper, ours, tolerances, strict=True), 1)
    ]


def share_to_come(m: int, k: int, eta: float) -> float:
    """``1 - c_m(k) = P[Binomial(k, eta) < m]``: FixedPred's relative error m layers below the loss."""
    return sum(math.comb(k, i) * eta**i * (1 - eta) ** (k - i) for i in range(min(m, k + 1)))


def sameness_numbers(comparison: Comparison) -> list[Number]:
    """What shows that predictive coding did as backprop does, step for step."""
    losses = zip(comparison.PC.train_loss, comparison.BP.train_loss, strict=True)
    return [
        Number(
            "largest relative error",
            1e-6,
            max(map(max, comparison.relative_error)),
            1e-4,
            check=True,
        ),
        Number("largest angle (degrees)", 0, max(map(max, comparison.angle)), 0.1, check=True),
        Number("largest distance of the losses", 0, max(abs(a - b) for a, b in losses), 0.05),
    ]
