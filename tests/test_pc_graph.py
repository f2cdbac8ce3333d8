"""``pc_graph``: where the beliefs are, that the layers do what the model does, and what is in the way."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases import ERR_TYPES, assert_close
from torch2pc import PCGraph, PCInfer, group_layers, pc_graph
from torch2pc.cutting.between import Between

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(3, 3, 8, 8, generator=GENERATOR).double()
VECTORS = torch.randn(3, 6, generator=GENERATOR).double()
SEQUENCES = torch.randn(3, 4, 6, generator=GENERATOR).double()
WORDS = torch.randint(10, (3, 4), generator=GENERATOR)


class BasicBlock(nn.Module):
    """As torchvision's."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(after), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.downsample = None
        if before != after:
            conv = nn.Conv2d(before, after, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 4))
        self.layer2 = nn.Sequential(BasicBlock(4, 6, 2), BasicBlock(6, 6))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class DenseLayer(nn.Module):
    def __init__(self, before: int, growth: int) -> None:
        super().__init__()
        self.norm, self.relu = nn.BatchNorm2d(before), nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(before, growth, 3, padding=1)

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.conv(self.relu(self.norm(torch.cat(features, 1))))


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layers = nn.ModuleList([DenseLayer(4 + 2 * i, 2) for i in range(3)])
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(features))
        return self.head(torch.cat(features, 1).mean((2, 3)))


def double_convolution(before: int, after: int) -> nn.Sequential:
    first = nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True)
    return nn.Sequential(*first, nn.Conv2d(after, after, 3, padding=1), nn.ReLU(inplace=True))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2 = double_convolution(3, 2), double_convolution(2, 4)
        self.bottom, self.pool = double_convolution(4, 6), nn.MaxPool2d(2)
        self.up2, self.dec2 = nn.ConvTranspose2d(6, 4, 2, 2), double_convolution(8, 4)
        self.up1, self.dec1 = nn.ConvTranspose2d(4, 2, 2, 2), double_convolution(4, 2)
        self.head = nn.Conv2d(2, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        e1 = self.enc1(x)
        e2 = self.enc2(self.pool(e1))
        y = self.dec2(torch.cat([self.up2(self.bottom(self.pool(e2))), e2], 1))
        y = self.dec1(torch.cat([self.up1(y), e1], 1))
        return self.head(y).mean((2, 3))


class Attention(nn.Module):
    """Reads the sizes where it begins, as most do."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.mixed = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = (
            f(x).reshape(B, N, self.heads, C // self.heads).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        p = (q @ k.transpose(-2, -1) * (C // self.heads) ** -0.5).softmax(-1)
        return self.proj(self.mixed((p @ v).transpose(1, 2).reshape(B, N, C)))


class Block(nn.Module):
    def __init__(self, width: int, p: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = (
            nn.LayerNorm(width),
            Attention(width),
            nn.LayerNorm(width),
        )
        self.fc1, self.act, self.fc2 = nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width)
        self.drop1, self.drop2 = nn.Dropout(p), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop1(self.attn(self.norm1(x)))
        return x + self.fc2(self.drop2(self.act(self.fc1(self.norm2(x)))))


class ViT(nn.Module):
    def __init__(self, width: int = 6, p: float = 0.0) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 5, width))
        self.drop = nn.Dropout(p)
        self.blocks = nn.ModuleList([Block(width, p) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = self.drop(torch.cat([self.token.expand(n, -1, -1), x], 1) + self.position)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class PostNorm(nn.Module):
    """As ``nn.TransformerEncoderLayer``, of plain modules."""

    def __init__(self, width: int, p: float) -> None:
        super().__init__()
        self.attn, self.drop1, self.norm1 = Attention(width), nn.Dropout(p), nn.LayerNorm(width)
        self.linear1, self.linear2 = nn.Linear(width, 12), nn.Linear(12, width)
        self.drop, self.drop2, self.norm2 = nn.Dropout(p), nn.Dropout(p), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.drop1(self.attn(x)))
        return self.norm2(x + self.drop2(self.linear2(self.drop(torch.relu(self.linear1(x))))))


class Encoder(nn.Module):
    """Of words, whose positions do not depend on them."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(10, 6), nn.Embedding(5, 6)
        self.layers = nn.Sequential(PostNorm(6, p), PostNorm(6, p))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position(torch.arange(4))
        return self.head(self.layers(x).mean(1))


class Cell(nn.Module):
    """An LSTM's, which returns two tensors."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.gates = nn.Linear(6 + width, 4 * width)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = self.gates(torch.cat([x, h], 1)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class Unrolled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = Cell(), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], 5)
        for t in range(3):
            h, c = self.cell(x[:, t], h, c)
        return self.head(h)


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 7), nn.Linear(7, 7), nn.Linear(7, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.c(F.gelu(self.b(torch.tanh(self.a(x)))))


class Example(NamedTuple):
    build: Callable[[], nn.Module]
    X: Tensor
    beliefs: Any
    edges: dict[str, str]
    """Some of its layers and their parents."""


INSIDE = ["**.q", "**.k", "**.v", "**.mixed", "**.proj", "blocks.*.fc?", "blocks.*", "patch"]
EXAMPLES = {
    "ResNet": Example(
        ResNet,
        IMAGES,
        None,
        {
            "bn1": "x",
            "layer1_0_bn1": "bn1",
            "layer1_1_bn1": "bn1 layer1_0_bn2",
            "layer2_0_bn1": "bn1 layer1_0_bn2 layer1_1_bn2",
            "layer2_0_downsample_1": "bn1 layer1_0_bn2 layer1_1_bn2",
            "fc": "layer2_0_bn2 layer2_0_downsample_1 layer2_1_bn2",
        },
    ),
    "ResNet_blocks": Example(
        ResNet,
        IMAGES,
        ["bn1", "layer*.*", "layer*.*.bn1"],
        {
            "layer1_0_bn1": "bn1",
            "layer1_0": "bn1 layer1_0_bn1",
            "layer1_1": "layer1_1_bn1 layer1_0",
            "layer2_0": "layer2_0_bn1 layer1_1",
            "output": "layer2_1",
        },
    ),
    "DenseNet": Example(
        DenseNet,
        IMAGES,
        None,
        {"layers_2_conv": "stem layers_0_conv layers_1_conv", "layers_0_conv": "stem"},
    ),
    "UNet": Example(
        UNet,
        IMAGES,
        lambda name, m: isinstance(m, nn.Conv2d | nn.ConvTranspose2d) or name == "bottom",
        {"bottom": "bottom_3" , "dec2_0": "enc2_3 up2", "dec1_0": "enc1_3 up1", "output": "head"},
    ),
    "ViT": Example(
        ViT,
        IMAGES,
        INSIDE,
        {
            "blocks_0_attn_q": "patch",
            "blocks_1_attn_k": "blocks_0",
            "blocks_1_attn_mixed": "blocks_1_attn_q blocks_1_attn_k blocks_1_attn_v",
            "blocks_1_attn_proj": "blocks_1_attn_mixed",
            "blocks_1_fc1": "blocks_1_attn_proj blocks_0",
            "blocks_1": "blocks_1_attn_proj blocks_0 blocks_1_fc2",
            "output": "blocks_1",
        },
    ),
    "Encoder": Example(
        Encoder,
        WORDS,
        None,
        {
            "layers_0_attn_q": "embed",
            "layers_0_attn_proj": "layers_0_attn_q layers_0_attn_k layers_0_attn_v",
            "layers_0_linear1": "embed layers_0_attn_proj",
        },
    ),
    "Unrolled": Example(
        Unrolled,
        SEQUENCES,
        ["cell.gates"],
        {
            "cell_gates": "x",
            "cell_gates_1": "x cell_gates",
            "cell_gates_2": "x cell_gates cell_gates_1",
            "output": "x cell_gates cell_gates_1 cell_gates_2",
        },
    ),
    "Skip": Example(Skip, VECTORS, None, {"a": "x", "b": "a", "c": "b", "output": "x c"}),
}  # fmt: skip


def connections(graph: PCGraph) -> dict[str, str]:
    pairs = zip(graph.names[1:], graph.parents, strict=True)
    return {name: " ".join(graph.names[p] for p in parents) for name, parents in pairs}


def made(name: str) -> tuple[nn.Module, PCGraph, Tensor, Tensor]:
    example = EXAMPLES[name]
    model = example.build().double()
    graph = pc_graph(model, example.X[:2], example.beliefs)
    shape = model(example.X).shape
    return model, graph, example.X, torch.randn(shape, dtype=torch.double)


def loss(y: Tensor, Y: Tensor) -> Tensor:
    return (y - Y).square().sum()


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", EXAMPLES)
def test_beliefs_are_where_they_are_asked_for(name: str) -> None:
    _, graph, _, _ = made(name)
    found = connections(graph)
    assert {place: found[place] for place in EXAMPLES[name].edges} == EXAMPLES[name].edges


def test_exactly_these_are_the_layers() -> None:
    _, graph, _, _ = made("Unrolled")
    assert connections(graph) == EXAMPLES["Unrolled"].edges
    _, graph, _, _ = made("Skip")
    assert connections(graph) == EXAMPLES["Skip"].edges


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", EXAMPLES)
def test_exact_is_backpropagation(name: str, training: bool) -> None:
    model, graph, X, Y = made(name)
    model.train(training), graph.train(training)
    twin = copy.deepcopy(model)
    loss(twin(X), Y).backward()
    result = PCInfer(graph, loss, X, Y, "Exact")
    assert_close(result.vhat[-1], twin(X) if not training else result.vhat[-1], 0)
    assert_close(gradients(model), gradients(twin), 1e-12)
    if training:
        assert_close(dict(model.named_buffers()), dict(twin.named_buffers()), 1e-12)
    assert {*graph.parameters()} == {p for p in model.parameters() if p.grad is not None}
    assert_close(graph(X), model(X), 0)


def strict_with_hooks(
    model: nn.Module, names: list[str], X: Tensor, Y: Tensor, eta: float, n: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor | None]]:
    """Strict in the model itself, whose modules are made to return beliefs instead of predictions.

    The beliefs, their last errors, and the gradient of the energy where these were taken.
    """
    modules = {name.replace(".", "_"): module for name, module in model.named_modules() if name}
    v: dict[str, Tensor] = {}
    predictions: dict[str, Tensor] = {}
    calls: Counter[nn.Module] = Counter()

    def hook(base: str) -> Callable[..., Tensor | None]:
        def replace(module: nn.Module, _: Any, output: Tensor) -> Tensor | None:
            place = f"{base}_{calls[module]}" if calls[module] else base
            calls[module] += 1
            if place not in names[1:-1]:
                return None
            predictions[place] = output
            return v.setdefault(place, output.detach().clone().requires_grad_()).clone()

        return replace

    handles = [m.register_forward_hook(hook(base)) for base, m in modules.items() if base in names]
    energy = torch.zeros(())
    for k in range(n + 1):
        calls.clear()
        output = model(X)
        if k == 0:
            continue  # the feed-forward pass
        errors = {place: predictions[place] - v[place] for place in v}
        energy = loss(output, Y) + sum(e.square().sum() for e in errors.values()) / 2
        model.zero_grad()
        energy.backward()
        for belief in v.values():
            assert belief.grad is not None
            belief.data -= eta * belief.grad
            belief.grad = None
    for handle in handles:
        handle.remove()
    return v, errors, gradients(model)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", EXAMPLES)
def test_strict_is_that_of_the_model_with_its_modules_clamped(name: str, training: bool) -> None:
    model, graph, X, Y = made(name)
    model.train(training), graph.train(training)
    twin = copy.deepcopy(model)
    wanted_v, wanted_errors, wanted = strict_with_hooks(twin, graph.names, X, Y, 0.05, 6)
    result = PCInfer(graph, loss, X, Y, "Strict", eta=0.05, n=6, update_at="before")
    inner = graph.names[1:-1]
    assert set(wanted_v) == set(inner)
    assert_close(
        dict(zip(inner, result.v[1:-1], strict=True)), {n: wanted_v[n] for n in inner}, 1e-9
    )
    found = dict(zip(inner, result.epsilon[1:-1], strict=True))
    assert_close(found, {n: wanted_errors[n].detach() for n in inner}, 1e-9)
    assert_close(gradients(model), wanted, 1e-9)
