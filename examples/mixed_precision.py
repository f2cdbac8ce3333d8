r"""
Mixed precision, compilation and the GPU
========================================

**Question.** Predictive coding lives on small differences. Can it run in bfloat16, where a number has
eight bits?

Strict's errors are :math:`\epsilon_l = f_l(v_{l-1}) - v_l`, small differences of nearly equal tensors.
Subtracting those in bfloat16 would leave nothing. ``PCInfer`` iterates the beliefs'
displacements :math:`\delta_l = v_l - \hat v_l` instead, holds them in float32, and lets
autocast choose the type of the products alone,

.. math:: \epsilon_l = d_l(\delta_{l-1}) - \delta_l,
   \qquad d_l(\delta) = f_l(\hat v_{l-1} + \delta) - f_l(\hat v_{l-1}),

whose round-off is then a share of the displacement, not of the belief. This page runs on a GPU if
there is one, and on the CPU otherwise.
"""

import shutil
import time

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from paper_figures.data import load_digits
from torch2pc import PCInfer

STEPS = 80  # short: 4
COMPILE = shutil.which("c++") is not None  # short: False
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

digits = load_digits(None)
LossFun = nn.CrossEntropyLoss()


def network(layers: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Flatten(), nn.Linear(784, 128)),
        *[nn.Sequential(nn.Tanh(), nn.Linear(128, 128)) for _ in range(layers - 2)],
        nn.Sequential(nn.Tanh(), nn.Linear(128, 10)),
    ).to(device)


def autocast(on: bool) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=on)


# %%
# One batch
# ---------
# The call goes inside ``autocast``, as a forward pass and ``backward()`` would. How far is an update in
# bfloat16 from the same update in float32?

batch = next(digits.train_batches(1, 100, seed=0, device=device))


def updates(algorithm: str, half: bool) -> list[Tensor]:
    model = network()
    with autocast(half):
        if algorithm == "backprop":
            LossFun(model(batch.X), batch.labels).backward()
        else:
            PCInfer(model, LossFun, batch.X, batch.labels, algorithm, eta=0.1, n=20)
    return [item[-1].weight.grad for item in model]


def plain_errors(half: bool) -> list[Tensor]:
    """Strict's errors by subtracting predictions and beliefs, epsilon_1..epsilon_{L-1}."""
    model, v = network(), [batch.X]
    with autocast(half):
        for layer in model:
            v.append(layer(v[-1]).detach().float())
        for _ in range(20):
            inputs = [v_l.detach().requires_grad_() for v_l in v[:-1]]
            predictions = [layer(x) for layer, x in zip(model, inputs, strict=True)]
            (top,) = torch.autograd.grad(
                LossFun(predictions[-1], batch.labels), predictions[-1], retain_graph=True
            )
            epsilon = [p.detach().float() - v_l for p, v_l in zip(predictions, v[1:], strict=True)]
            epsilon[-1] = top
            for l in range(1, len(model)):
                (back,) = torch.autograd.grad(
                    predictions[l], inputs[l], epsilon[l].to(predictions[l])
                )
                v[l] = v[l] + 0.1 * (epsilon[l - 1] - back)
    return epsilon[:-1]


def distance(a: list[Tensor], b: list[Tensor]) -> str:
    return "".join(f"{((x - y).norm() / y.norm()).item():9.1%}" for x, y in zip(a, b, strict=True))


print("bfloat16's distance from float32   layer 1  layer 2  layer 3  layer 4")
for algorithm in "backprop", "FixedPred", "Strict":
    print(f"updates, {algorithm:23}", distance(updates(algorithm, True), updates(algorithm, False)))
print("errors, Strict, subtracted       ", distance(plain_errors(True), plain_errors(False)))

# %%
# Half precision costs Strict what it costs backpropagation: a fraction of a percent. Subtracted, the
# errors of the hidden layers would be half noise or worse.
#
# Training
# --------
# bfloat16 has float32's range, so that no ``GradScaler`` is needed. (In float16, let ``LossFun`` return the
# scaled loss with Exact and FixedPred; it would change the energy that Strict descends.)


def train(half: bool) -> tuple[list[float], float]:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
    losses = []
    for batch in digits.train_batches(STEPS, 100, seed=0, device=device):
        with autocast(half):
            result = PCInfer(model, LossFun, batch.X, batch.labels, "Strict")
        optimizer.step()
        losses.append(result.Loss.item())
    with torch.no_grad():
        right = [model(b.X).argmax(1) == b.labels for b in digits.all_test_batches(500, device)]
    return losses, torch.cat(right).double().mean().item()


figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
for half, style in (False, "-"), (True, "--"):
    losses, accuracy = train(half)
    name = "bfloat16" if half else "float32"
    print(f"Strict in {name}: test accuracy after {STEPS} steps {accuracy:.3f}")
    axes.plot(losses, style, label=name)
axes.set(xlabel="training step", ylabel="loss", yscale="log")
axes.legend()
plt.show()

# %%
# Compilation
# -----------
# ``compile=True`` compiles Strict's whole call, by ``torch.compile``: 10 to 60 s at the first call, less
# time at each later one. Parameters, X, Y, eta and n are inputs of what is compiled, so that neither an
# optimizer's step nor another eta compiles anew. It needs a C++ compiler on the CPU.


def seconds_of_a_call(compile: bool) -> tuple[float, float]:
    """The first call, and the median of later ones."""
    model, times = network(layers=3), []
    for _ in range(12 if STEPS > 4 else 2):
        begin = time.perf_counter()
        PCInfer(model, LossFun, batch.X, batch.labels, "Strict", compile=compile)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return times[0], sorted(times[1:])[len(times[1:]) // 2]


first, eager = seconds_of_a_call(False)
print(f"eager:    first call {first:5.2f} s, then {1000 * eager:.1f} ms")
if COMPILE:
    first, compiled = seconds_of_a_call(True)
    print(f"compiled: first call {first:5.2f} s, then {1000 * compiled:.1f} ms")

# %%
# **Conclusion.** Strict belongs inside autocast like the other algorithms. Compile when one network is
# trained for more than a minute.
