r"""
Predicted from both sides
=========================

**Question.** Can one network say which digit an image shows, draw a digit that is asked for, and complete
an image of which it sees half?

In bidirectional predictive coding (Oliviers, Tang and Bogacz 2025) a belief is predicted from below and from
above. Here the layers :math:`f` go from the label to the image and the layers :math:`g` back, and all
beliefs descend

.. math::

   F(v) = \tfrac{\alpha}{2} \lVert f_3(v_2) - \mathrm{image} \rVert^2
   + \tfrac{\alpha}{2} \sum_{l=1}^{2} \lVert f_l(v_{l-1}) - v_l \rVert^2
   + \tfrac12 \sum_{l=0}^{2} \lVert g_l(v_{l+1}) - v_l \rVert^2

with :math:`v_0` the label and :math:`v_3` the image. What is known is clamped, the rest is inferred.
"""

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from paper_figures.data import load_digits
from torch2pc import PCGraph, PCInfer, PCInferLatent

STEPS = 150  # short: 3
INFERENCE = 60  # short: 5
BATCH, ALPHA = 100, 0.1
CPU = torch.device("cpu")

digits = load_digits(None)
test = next(digits.all_test_batches(400, CPU))
images, labels = test.X.flatten(1), test.labels


def layer(into: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Tanh(), nn.Linear(into, out))


# %%
# The model
# ---------
# ``above`` has the second predictions. A layer that reads the last place, ``"image"``, is given the target
# that is clamped there.

torch.manual_seed(0)
to_image = dict(
    top=(nn.Linear(10, 64), "x"),
    low=(layer(64, 128), "top"),
    image=(layer(128, 784), "low"),
)
to_label = {
    "low": (nn.Linear(784, 128), "image"),
    "top": (layer(128, 64), "low"),
    "x": (layer(64, 10), "top"),
}
model = PCGraph(**to_image, above=to_label)
print(model.extra_repr())
precision = {"top": ALPHA, "low": ALPHA}


def error_of_image(output: Tensor, Y: Tensor) -> Tensor:
    return 0.5 * ALPHA * (output - Y).square().sum()


# %%
# Training
# --------
# Label and image are both clamped. One call makes the updates of all layers, each from its own error.

optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
for batch in digits.train_batches(STEPS, BATCH, seed=0, device=CPU):
    one_hot = nn.functional.one_hot(batch.labels, 10).float()
    PCInfer(
        model,
        error_of_image,
        one_hot,
        batch.X.flatten(1),
        "Strict",
        eta=0.05,
        n=8,
        precision=precision,
    )
    optimizer.step()


# %%
# Which digit is it?
# ------------------
# With the image clamped and the label free, ``PCInferLatent`` infers the label from none. A single pass up
# through the second predictions is the other way to ask.


def right(output: Tensor) -> float:
    return (output.argmax(1) == labels).float().mean().item()


@torch.no_grad()
def pass_up(image: Tensor) -> Tensor:
    for module in model.above.low, model.above.top, model.above.x:
        image = module(image)
    return image


none = torch.full((len(images), 10), 0.1)
inferred = PCInferLatent(
    model, error_of_image, images, none, eta="auto", n=INFERENCE, precision=precision
)
print(f"test digits named rightly: inferred {right(inferred.v[0]):.1%}, ", end="")
print(f"by a pass up {right(pass_up(images)):.1%}")

# %%
# Draw a seven
# ------------
# With the label clamped, what the layers predict down to the image is the mean of its class.

with torch.no_grad():
    drawn = model(torch.eye(10))
training = digits.train_images.flatten(1).float() / 255
means = torch.stack([training[digits.train_labels == digit].mean(0) for digit in range(10)])
print(
    f"root mean square of drawn - mean of the class: {(drawn - means).square().mean().sqrt():.3f}"
)
between = (means - means.mean(0)).square().mean().sqrt()
print(f"of mean of the class - mean of all:            {between:.3f}")

# %%
# Half an image
# -------------
# The same layers in a graph in which the image is a belief as well, and what can be seen of it a loss that
# looks at the upper half alone. Label and lower half are inferred together.

seen = torch.zeros(28, 28)
seen[:14] = 1
seen = seen.flatten()
with_belief = PCGraph(**to_image, eye=(nn.Identity(), "image"), above=to_label)


def error_of_seen(output: Tensor, Y: Tensor) -> Tensor:
    return 0.5 * ((output - Y) * seen).square().sum()


found = PCInferLatent(
    with_belief,
    error_of_seen,
    images,
    none,
    eta="auto",
    n=INFERENCE,
    precision={**precision, "image": ALPHA},
)
completed = found.v[with_belief.names.index("image")]
print("named rightly, of the upper half alone: ", end="")
print(f"inferred {right(found.v[0]):.1%}, by a pass up {right(pass_up(images * seen)):.1%}")
print("error in a hidden pixel: ", end="")
for name, guess in {"inferred": completed, "the mean image": training.mean(0)}.items():
    print(f"{name} {(guess - images)[:, seen == 0].square().mean().sqrt():.3f}  ", end="")
print()

# %%

rows = {
    "drawn": drawn,
    "mean of class": means,
    "image": images[:10],
    "seen": images[:10] * seen,
    "completed": completed[:10],
}
figure, all_axes = plt.subplots(len(rows), 10, figsize=(7, 3.9), layout="constrained")
for row, (name, pictures) in zip(all_axes, rows.items(), strict=True):
    for axes, picture in zip(row, pictures, strict=True):
        axes.imshow(picture.reshape(28, 28).numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
    row[0].set_ylabel(name, rotation=0, ha="right", va="center")
plt.show()

# %%
# **Conclusion.** One set of layers, trained once by errors in both directions, classifies (83% by inference
# and by a pass up alike), draws the classes' means, and answers what it was not trained for: of the upper
# half alone it infers 66% of the digits, where a pass up through the same layers names 54%. The lower
# half that it infers is nearer than the mean image, by an error of 0.245 against 0.259. It is a small
# network after a few steps; none of this is the best that such networks can do.
