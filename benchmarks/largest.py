"""The largest model on a GPU of 24 GiB: a formula for Strict's memory, held against measured peaks.

During its iterations Strict keeps, for each layer, four tensors of the size of its output (vhat, delta,
epsilon, and v at the end) and what its displacement was prepared with; a graph only of one layer at a time.
So with P bytes of parameters, B of outputs and S of prepared tensors, both for one example,

    Strict = (2 + optimizer) P + batch (4 B + S) + one layer's evaluation

(layer 1, whose input is clamped, is prepared with nothing). That is an upper bound: where parameters outweigh
the beliefs, the updates take the place of what is no longer needed by then. Parts of a batch can be taken
one after the other, so that ``batch`` is a choice, down to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import peak_memory, size
from benchmarks.report import Options, save, table
from torch2pc import PCInfer
from torch2pc.displacement.lines import Displacement
from torch2pc.graph.network import Network

CPU = torch.device("cpu")
GPU = 23 * 2**30  # of 24 GiB; the rest for CUDA's own context and libraries
ADAM = 2  # tensors of the size of the parameters
METHOD = (
    "Chains of equal layers cut before the activation, float32, squared error. Measured: the peak of two "
    "Strict steps (n=20) in PyTorch's CPU allocator, on top of weights and batch, divided by the formula's "
    "updates + batch (4 B + S) + one layer's evaluation; B is the size of all layers' outputs and S that "
    "of the tensors that their displacements are prepared with, read off the tensors themselves at this "
    "size. BP keeps, for each layer, what autograd saves, and no beliefs. The largest depth is what fits "
    "into 23 GiB with parameters, gradients and Adam's two moments; 'batch 1' takes the batch one example "
    "after the other with accumulate=True and the loss weighted by the example's share, which gives the "
    "same updates (for layers that treat each example by itself). 'Offload / computing' is why beliefs "
    "are not moved to the CPU's memory between uses: fetching a layer's tensors at 25 GB/s in each "
    "iteration would take so many times as long as computing with them at 30 TFLOP/s (both assumed)."
)


def sequence(layer: Callable[[], nn.Module], depth: int) -> nn.Sequential:
    return nn.Sequential(*(layer() for _ in range(depth)))


@dataclass(frozen=True)
class Family:
    """Chains of one kind of layer: its builder and input, small for measuring and large for the GPU."""

    name: str
    layer: Callable[[int], nn.Module]
    shape: Callable[[int], tuple[int, ...]]
    small: tuple[int, int]
    """Width and batch that are measured."""
    large: tuple[int, int]
    """Width and batch on the GPU."""


def block(width: int) -> nn.Module:
    return nn.TransformerEncoderLayer(
        width, max(1, width // 64), 4 * width, dropout=0.0, batch_first=True, norm_first=True
    )


FAMILIES = (
    Family(
        "MLP: ReLU, Linear",
        lambda width: nn.Sequential(nn.ReLU(), nn.Linear(width, width)),
        lambda width: (width,),
        (256, 64),
        (4096, 128),
    ),
    Family(
        "convolutions: ReLU, Conv2d 3x3 on 28x28",
        lambda width: nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)),
        lambda width: (width, 28, 28),
        (16, 8),
        (256, 64),
    ),
    Family(
        "transformer blocks, 196 tokens",
        block,
        lambda width: (196, width),
        (64, 2),
        (768, 32),
    ),
)


@dataclass(frozen=True)
class Layer:
    """Bytes of one layer in the middle of a chain, and its operations; all but parameters for one example."""

    parameters: float
    output: float
    prepared: float
    saved: float
    evaluation: float
    flops: float


def loss(prediction: Tensor, Y: Tensor) -> Tensor:
    return (prediction - Y).square().mean()


def middle_layer(family: Family, width: int, batch: int) -> Layer:
    """Its sizes, read off a chain of two layers with this batch."""
    torch.manual_seed(0)
    model = sequence(lambda: family.layer(width), 2)
    X = torch.randn(batch, *family.shape(width))
    network = Network(model, loss, X, torch.zeros_like(X))
    with network.replaying():
        network.record()
    vhat = network.vhat
    displacement = network.layers[1].displacement
    assert isinstance(displacement, Displacement)
    held = {*map(storage, model.parameters()), *map(storage, vhat)}
    prepared = distinct((t for line in displacement.lines for t in line.tensors), held)

    kept: list[Tensor] = []
    x = vhat[1].clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model[1](x)
    # A layer's input is the output of the one before it: that much is kept anyway.
    saved = distinct(kept, set(map(storage, model.parameters())))

    error = torch.randn_like(vhat[2])

    def step() -> None:
        with torch.no_grad():
            displacement.backward(displacement.forward(torch.zeros_like(x))[1], error.clone())

    evaluation = peak_memory(step, CPU)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model[1](vhat[1])
    parameters = size(model[1].parameters())
    of_batch = (vhat[2].nbytes, prepared, saved, evaluation, counter.get_total_flops())
    return Layer(parameters, *(count / batch for count in of_batch))


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def distinct(tensors: Iterable[Tensor], others: set[int]) -> int:
    """Bytes of the memory behind the tensors, counted once, that is not among ``others``."""
    found = {storage(t): t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu"}
    return sum(count for start, count in found.items() if start not in others)


def strict_bytes(layer: Layer, depth: int, batch: int, optimizer: int = 0) -> float:
    """What a Strict step needs on top of parameters and batch: updates, beliefs, one evaluation.

    >>> strict_bytes(Layer(10, 3, 2, 4, 50, 9), depth=2, batch=5)
    400
    """
    beliefs = depth * 4 * layer.output + (depth - 1) * layer.prepared
    of_tensors = batch * (beliefs + layer.evaluation)
    return (1 + optimizer) * depth * layer.parameters + of_tensors


def largest_depth(layer: Layer, batch: int, kind: str, memory: float = GPU) -> int:
    """The most layers that fit, with parameters, gradients and Adam's moments.

    >>> largest_depth(Layer(10, 3, 2, 4, 50, 9), batch=1, kind="Strict", memory=1000)
    17
    """
    parameters = (2 + ADAM) * layer.parameters
    if kind == "BP":
        return math.floor(memory / (parameters + batch * layer.saved))
    held = 4 * layer.output + layer.prepared
    return math.floor((memory - batch * layer.evaluation) / (parameters + batch * held))


def offload(layer: Layer, link: float = 25e9, flops: float = 30e12) -> float:
    """Seconds to fetch a layer's tensors from the CPU's memory, over those of a step of its iteration.

    link: bytes per second over PCI Express; flops: operations per second, twice a forward pass's.
    """
    held = 4 * layer.output + layer.prepared
    return (held / link) / (2 * layer.flops / flops)


def measured(family: Family, depth: int) -> float:
    """The measured peak of Strict, as a multiple of the formula's."""
    width, batch = family.small
    torch.manual_seed(0)
    model = sequence(lambda: family.layer(width), depth)
    X = torch.randn(batch, *family.shape(width))
    Y = torch.zeros_like(X)

    def step() -> None:
        model.zero_grad()
        PCInfer(model, loss, X, Y, "Strict", n=20, update_at="vhat")

    step()  # layers are held against their operations once
    model.zero_grad()
    peak = peak_memory(lambda: (step(), step()), CPU)
    return peak / strict_bytes(middle_layer(family, width, batch), depth, batch)


def run(options: Options) -> None:
    """Measure, print and save the tables."""
    checks: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for family in FAMILIES:
        width, batch = family.small
        depths = (6,) if options.quick else (6, 12, 24)
        for depth in depths:
            ratio = measured(family, depth)
            checks.append(
                {
                    "layers": family.name,
                    "width": width,
                    "batch": batch,
                    "depth": depth,
                    "measured / formula": ratio,
                }
            )
        width, batch = family.small if options.quick else family.large
        layer = middle_layer(family, width, min(batch, 4))
        rows.append(
            {
                "layers": family.name,
                "width": width,
                "batch": batch,
                "parameters a layer, MB": layer.parameters / 1e6,
                "4 B + S a layer and example, MB": (4 * layer.output + layer.prepared) / 1e6,
                "BP saves, MB": layer.saved / 1e6,
                "depth, Strict": largest_depth(layer, batch, "Strict"),
                "depth, BP": largest_depth(layer, batch, "BP"),
                "depth, Strict, batch 1": largest_depth(layer, 1, "Strict"),
                "offload / computing": offload(layer),
                "parameters there, 1e6": largest_depth(layer, 1, "Strict") * layer.parameters / 4e6,
            }
        )
    text = f"{as_table(checks)}\n\nOn 24 GiB:\n\n{as_table(rows)}"
    print(text)
    save(options, "largest", method=METHOD, text=text, record=dict(checks=checks, largest=rows))


def as_table(rows: list[dict[str, Any]]) -> str:
    cells = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    return table(list(rows[0]), cells)
