r"""
Training loops: micro-batches, schedules and Lightning
======================================================

**Question.** Where does ``PCInfer`` go in a training loop that accumulates gradients, has a
learning-rate schedule and clips, and in PyTorch Lightning's?

Always in the place of ``backward()``. What is around it stays; three things are good to know:

- ``.grad`` is *replaced* at each call, so that no ``zero_grad()`` is needed;
- with ``accumulate=True`` it is *added to*, so that ``zero_grad()`` is needed before the first
  micro-batch;
- ``Loss`` requires no grad: a trainer that calls ``backward()`` by itself has to be told not to.
"""

import copy
import logging
import warnings

import matplotlib.pyplot as plt
import pytorch_lightning as lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from paper_figures.data import load_digits
from torch2pc import PCInfer

STEPS = 150  # short: 4
BATCH, MICRO_BATCHES = 120, 4
CPU = torch.device("cpu")

digits = load_digits(None)

torch.manual_seed(0)
start = nn.Sequential(
    nn.Sequential(nn.Flatten(), nn.Linear(784, 100)),
    nn.Sequential(nn.Tanh(), nn.Linear(100, 50)),
    nn.Sequential(nn.Tanh(), nn.Linear(50, 10)),
)

# %%
# Micro-batches
# -------------
# A batch that is too large for the memory is handed over in parts. What the parts' updates add up to
# depends on the loss:
#
# .. math::
#
#    \mathrm{Loss} = \sum_i \mathrm{Loss}_i \quad \Rightarrow \quad \Delta\theta = \sum_i \Delta\theta_i ,
#
# while in a mean each example weighs 1/B against its own hidden errors.
#
# With a loss that sums, Strict's update is the sum of its examples' own updates, and parts add up exactly. A
# mean over each part is another energy than the mean over the whole, so that the parts
# have to be told what the whole is.

batch = next(digits.train_batches(1, BATCH, seed=0, device=CPU))


def update(model: nn.Sequential) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def whole_and_parts(LossFun, LossFun_of_a_part) -> float:
    """How far the update from micro-batches is from that of the whole batch, relatively."""
    model = copy.deepcopy(start)
    PCInfer(model, LossFun, batch.X, batch.labels, "Strict")
    whole = update(model).clone()
    model.zero_grad()
    parts = zip(batch.X.chunk(MICRO_BATCHES), batch.labels.chunk(MICRO_BATCHES), strict=True)
    for X, Y in parts:
        PCInfer(model, LossFun_of_a_part, X, Y, "Strict", accumulate=True)
    return ((update(model) - whole).norm() / whole.norm()).item()


total, mean = nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss()


def share_of_the_mean(y: Tensor, Y: Tensor) -> Tensor:
    return total(y, Y) / BATCH


print(f"sum, and sums of the parts:              {whole_and_parts(total, total):.1e}")
print(
    f"mean, and the parts' sums over {BATCH}:      {whole_and_parts(mean, share_of_the_mean):.1e}"
)
off = whole_and_parts(mean, lambda y, Y: mean(y, Y) / MICRO_BATCHES)
print(f"mean, and the parts' means over {MICRO_BATCHES}:       {off:.1e}  (the same thing)")
off = whole_and_parts(mean, mean)
print(f"mean, and the parts' means:              {off:.1e}  (four times too large)")

# %%
# A schedule, and clipping
# ------------------------
# Both work on ``.grad`` and on the optimizer, and so need nothing.


def train_by_hand() -> list[float]:
    model = copy.deepcopy(start)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.005, total_steps=STEPS)
    losses = []
    for batch in digits.train_batches(STEPS, BATCH, seed=0, device=CPU):
        optimizer.zero_grad()
        parts = zip(batch.X.chunk(MICRO_BATCHES), batch.labels.chunk(MICRO_BATCHES), strict=True)
        loss = 0.0
        for X, Y in parts:
            loss += PCInfer(model, share_of_the_mean, X, Y, "Strict", accumulate=True).Loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss)
    return losses


# %%
# Lightning
# ---------
# With ``automatic_optimization = False`` the module steps its optimizer and its schedule itself, and the
# trainer does the rest: data, devices, precision, checkpoints, logging.


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = copy.deepcopy(start)
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        result = PCInfer(self.model, mean, *batch, "Strict")
        self.clip_gradients(optimizer, gradient_clip_val=1.0)
        optimizer.step()
        schedule.step()
        self.losses.append(result.Loss.item())

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        X, Y = batch
        self.log("accuracy", (self.model(X).argmax(1) == Y).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.005)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.005, total_steps=STEPS)
        return [optimizer], [schedule]


def loader(images: Tensor, labels: Tensor, shuffle: bool) -> DataLoader:
    return DataLoader(TensorDataset(images / 255, labels), BATCH, shuffle=shuffle)


logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)  # it says which devices it found
warnings.filterwarnings("ignore", module="pytorch_lightning")  # and that PyTorch renamed something
trainer = lightning.Trainer(
    max_steps=STEPS,
    accelerator="cpu",
    devices=1,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    limit_val_batches=5,
)
classifier = Classifier()
trainer.fit(
    classifier,
    loader(digits.train_images, digits.train_labels, shuffle=True),
    loader(digits.test_images, digits.test_labels, shuffle=False),
)
scores = trainer.validate(
    classifier, loader(digits.test_images, digits.test_labels, shuffle=False), verbose=False
)
print(f"trained by Lightning: test accuracy {scores[0]['accuracy']:.3f}")

figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
axes.plot(train_by_hand(), label="by hand, in micro-batches")
axes.plot(classifier.losses, label="by Lightning")
axes.set(xlabel="training step", ylabel="loss", yscale="log")
axes.legend()
plt.show()

# %%
# **Conclusion.** Put the call where ``backward()`` was, say ``accumulate=True`` for micro-batches, and let
# the loss say what the whole batch is.
