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
            "output": "cell_gates cell_gates_1 cell_gates_2",
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
    y = twin(X)
    loss(y, Y).backward()
    result = PCInfer(graph, loss, X, Y, "Exact")
    assert_close(result.vhat[-1], y.detach(), 0)
    assert_close(gradients(model), gradients(twin), 1e-12)
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


@pytest.mark.parametrize("ErrType", ERR_TYPES)
def test_every_algorithm_runs(ErrType: str) -> None:
    model, graph, X, Y = made("ViT")
    result = PCInfer(graph, loss, X, Y, ErrType, eta=0.05, n=4)
    assert all(e is not None and e.isfinite().all() for e in result.epsilon[1:])
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("build", [lambda: ViT(p=0.3), lambda: Encoder(p=0.3)])
def test_what_draws_random_numbers_does_so_once_and_in_turn(build: Callable[[], Any]) -> None:
    """Dropout that several layers would draw for themselves has a belief of its own."""
    model = build().double()
    X = WORDS if isinstance(model, Encoder) else IMAGES
    graph = pc_graph(model, X)
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    loss(twin(X), torch.zeros(3, 5)).backward()
    after = torch.get_rng_state()
    torch.manual_seed(1)
    PCInfer(graph, loss, X, torch.zeros(3, 5).double(), "Exact")
    assert torch.equal(torch.get_rng_state(), after)
    assert_close(gradients(model), gradients(twin), 1e-12)


class LateDropout(nn.Module):
    """The skip's mask is drawn before, and used after, that of the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        skip = F.dropout(x, 0.5, self.training)
        return self.c(torch.tanh(self.b(self.drop(x))) + skip)


def test_random_numbers_are_drawn_in_the_models_order() -> None:
    model = LateDropout().double()
    graph = pc_graph(model, VECTORS)
    assert connections(graph) == {"a": "x", "dropout": "a", "b": "a", "c": "b dropout"}
    torch.manual_seed(1)
    expected = model(VECTORS)
    torch.manual_seed(1)
    assert_close(graph(VECTORS), expected, 0)
    with pytest.raises(
        ValueError, match=r"dropout of model\.a's output draws random numbers.* late"
    ):
        pc_graph(model, VECTORS, ["a", "b"])


class Dropped(LateDropout):
    def __init__(self) -> None:
        super().__init__()
        self.p, self.drop.p = 0.0, 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.drop(self.a(x)), self.p, self.training)
        return self.c(torch.tanh(self.b(x)) + x)


@pytest.mark.parametrize("name", ["p", "drop.p"])
def test_dropout_that_draws_later_is_an_error(name: str) -> None:
    model = Dropped().double()
    graph = pc_graph(model, VECTORS)
    assert connections(graph) == {"a": "x", "b": "a", "c": "a b"}
    graph(VECTORS)
    (model if name == "p" else model.drop).p = 0.5
    with pytest.raises(RuntimeError, match=rf"model\.{name} was 0\.0 and is 0\.5"):
        PCInfer(graph, loss, VECTORS, torch.zeros(3, 5).double(), "Exact")


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.a(x)))


def test_a_module_that_is_called_twice_makes_tied_layers() -> None:
    model = Twice()
    graph = pc_graph(model, VECTORS.float())
    assert connections(graph) == {"a": "x", "a_1": "a", "b": "a_1"}
    assert graph.a is graph.a_1 is model.a


class Sized(nn.Module):
    """Reads sizes far from where it uses them, one of them only computed with; N may be C."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.out = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        shape, (B, N, _), kind = x.shape, x.shape, x.dtype
        y = self.mix(x.sin()).reshape(B, -1, 2).reshape(shape).to(kind)
        y = self.out(y.transpose(1, 2).reshape(B, x.size(-1), N).transpose(-1, -2))
        return y.reshape(B * N, 5) / x.dim() * torch.ones(x.size(1)).sum()


@pytest.mark.parametrize("tokens", [3, 4])
def test_sizes_are_read_from_parents(tokens: int) -> None:
    model = Sized().double()
    graph = pc_graph(model, torch.randn(2, tokens, 6).double())
    assert connections(graph) == {"embed": "x", "mix": "embed", "out": "mix", "output": "out"}
    for size in (2, 3), (1, 7), (5, 4):
        X = torch.randn(*size, 6).double()
        assert_close(graph(X), model(X), 0)


class Counted(nn.Module):
    """Multiplied by a size that no other tensor has."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        tokens = y.size(1)
        return self.b(y.mean(1)).tanh() * tokens


def test_a_size_that_no_parent_has_makes_one() -> None:
    model = Counted().double()
    graph = pc_graph(model, SEQUENCES)
    assert connections(graph) == {"a": "x", "b": "a", "output": "a b"}
    X = torch.randn(2, 7, 6).double()
    assert_close(graph(X), model(X), 0)


def test_another_batch_size_than_the_samples() -> None:
    for name in EXAMPLES:
        model, graph, X, _ = made(name)
        model.eval(), graph.eval()
        assert_close(graph(X[:1]), model(X[:1]), 1e-12)


class WritingInPlace(nn.Module):
    """What is written into feeds several layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.act = nn.Hardswish(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.a(x))
        y = F.celu_(self.b(x))
        return self.c(y) + y + x


def test_beliefs_are_not_written_into() -> None:
    model = WritingInPlace().double()
    graph = pc_graph(model, VECTORS)
    assert connections(graph) == {"a": "x", "b": "a", "c": "b", "output": "a b c"}
    assert_close(graph(VECTORS), model(VECTORS), 0)
    result = PCInfer(graph, loss, VECTORS, torch.zeros(3, 6).double(), "Strict", n=3)
    assert_close(result.vhat[1], model.a(VECTORS), 0)


class WritingIntoAView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.same, self.act = nn.Linear(6, 6), nn.Identity(), nn.ReLU(inplace=True)
        self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(x.sin() + self.b(self.act(self.same(x.clone()))))


def test_nor_is_what_shares_their_memory() -> None:
    """The model copies, in a layer of another belief; what a belief shares memory with is another one."""
    model = WritingIntoAView().double()
    graph = pc_graph(model, VECTORS, ["a", "same", "b"])
    assert connections(graph) == {"a": "x", "same": "a", "b": "same", "output": "a b"}
    for each in (model, graph):
        assert_close(each(VECTORS), model(VECTORS), 0)


def test_layers_of_a_chain_are_those_of_group_layers() -> None:
    model = nn.Sequential(
        nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Flatten(), nn.Linear(6, 3)
    )
    graph, layers = pc_graph(model, VECTORS.float()), group_layers(model, VECTORS.float())
    assert connections(graph) == {"0": "x", "2": "0", "4": "2"}
    for one, other in zip(graph.children(), layers, strict=True):
        assert repr(one) == repr(other)


def test_pytorchs_transformers() -> None:
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = nn.Sequential(nn.Embedding(10, 6), encoder, nn.Flatten(), nn.Linear(24, 5)).double()
    graph = pc_graph(model, WORDS, ["0", "**.dropout1", "**.linear1", "**.norm?"])
    assert connections(graph)["1_layers_1_norm2"] == "1_layers_1_linear1 1_layers_1_norm1"
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    loss(twin(WORDS), torch.zeros(3, 5)).backward()
    torch.manual_seed(1)
    PCInfer(graph, loss, WORDS, torch.zeros(3, 5).double(), "Exact")
    assert_close(gradients(model), gradients(twin), 1e-12)


def test_patterns() -> None:
    def chosen(*patterns: str) -> list[str]:
        return pc_graph(ViT(), IMAGES.float(), patterns).names[1:-1]

    assert chosen("patch", "blocks.*") == ["patch", "blocks_0", "blocks_1"]
    assert chosen("**.q", "blocks.1.fc?") == [
        *("blocks_0_attn_q", "blocks_1_attn_q", "blocks_1_fc1", "blocks_1_fc2"),
    ]
    assert pc_graph(ViT(), IMAGES.float(), "blocks.0").names == ["x", "blocks_0", "output"]
    by_kind = pc_graph(ViT(), IMAGES.float(), lambda name, m: isinstance(m, Attention))
    assert by_kind.names[1:-1] == ["blocks_0_attn", "blocks_1_attn"]


class Named(nn.Module):
    """Names that mean something else in a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.a = nn.Linear(6, 6), nn.ModuleDict({"b": nn.Linear(6, 6)})
        self.a_b, self.output, self.names = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.names(self.a_b(self.a["b"](self.x(x))))).tanh()


def test_places_have_names_of_their_own() -> None:
    graph = pc_graph(Named(), VECTORS.float())
    assert graph.names == ["x", "x_1", "a_b", "a_b_1", "names_1", "output", "output_1"]


class Changing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.tau, self.flag = 1.0, True
        self.register_buffer("scale", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.b(x / self.tau) * self.scale + x
        return self.c(y) if self.flag else self.c(x)


@pytest.mark.parametrize("copied", [None, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_changes_of_the_model_are_followed_or_errors(copied: Callable[[Any], Any] | None) -> None:
    model = Changing().double()
    graph = pc_graph(model, VECTORS)
    if copied is not None:
        model, graph = copied((model, graph))
    model.tau, model.scale = 0.3, torch.full((6,), 2.0).double()
    assert_close(graph(VECTORS), model(VECTORS), 1e-12)
    model.flag = False
    message = r"when pc_graph followed.*model\.flag.*Follow it anew, graph = pc_graph\(model, X\)"
    for use in (graph, lambda X: PCInfer(graph, loss, X, torch.zeros(3, 6).double(), "Strict")):
        with pytest.raises(RuntimeError, match=message):
            use(VECTORS)


def test_the_model_is_left_as_it_is() -> None:
    model = ResNet().double().eval()
    model.layer1[0].train()
    before, random = copy.deepcopy(model), torch.get_rng_state()
    graph = pc_graph(model, IMAGES)
    assert torch.equal(random, torch.get_rng_state())
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert_close(dict(model.state_dict()), dict(before.state_dict()), 0)
    assert not graph.training and isinstance(graph, PCGraph)
    between = [m for m in graph.modules() if isinstance(m, Between)]
    assert between and not any(m.training for m in between)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(x)[0][:, -1])


class Unused(Twice):
    def __init__(self) -> None:
        super().__init__()
        self.unused, self.uncalled = nn.Linear(6, 6), nn.Linear(6, 6)
        self.constant, self.kind = nn.Embedding(4, 6), Kind()

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x)
        x = torch.where(self.kind(x), x, -x)
        return super().forward(x) + self.constant(torch.tensor(2)) + self.uncalled.bias


class Kind(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x > 0


class Statistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x))
        return self.b(x) + x


class Rewritten(Twice):
    """What is written into is used again, as it then is."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = x.exp_()
        return self.b(y) + x


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 6))
    model[0].register_forward_hook(lambda *_: None)
    return model


ERRORS: list[tuple[Any, Tensor, Any, type[Exception], str]] = [
    (Skip, VECTORS, ["a", "d"], ValueError, "no.* called 'd' .*there are a, b, c"),
    (Skip, VECTORS, ["a", "**.q"], ValueError, r"called '\*\*\.q'"),
    (Skip, VECTORS, [], ValueError, "at least one module, got \\[\\]"),
    (Skip, VECTORS, lambda name, m: False, ValueError, "at least one module"),
    (Skip, VECTORS, 3, TypeError, "patterns of names, or a function of .*got int"),
    (Skip, VECTORS, nn.Linear, TypeError, "names of modules.*got type"),
    (Skip, VECTORS, nn.Sequential(nn.Tanh()), TypeError, "names of modules.*got Sequential"),
    (Skip, VECTORS, [nn.Linear(6, 6)], TypeError, "names of modules.*got Linear"),
    (Unused, VECTORS, ["a", "uncalled"], ValueError, "does not call uncalled"),
    (Unused, VECTORS, ["a", "unused"], ValueError, "unused's is used nowhere"),
    (Unused, VECTORS, ["a", "constant"], ValueError, "constant does not depend on the model's input"),
    (Unused, VECTORS, ["a", "kind"], ValueError, r"kind returns a tensor of torch\.bool"),
    (attention, SEQUENCES, ["self_attn.out_proj"], ValueError, r"not call self_attn\.out_proj"),
    (attention, SEQUENCES, None, ValueError, "self_attn returns a tuple"),
    (Recurrent, SEQUENCES, None, ValueError, "lstm returns a tuple"),
    (Unrolled, SEQUENCES, ["cell", "cell.gates"], ValueError, "cell returns a tuple"),
    (ViT, IMAGES, ["blocks"], ValueError, "does not call blocks"),
    (Statistics, VECTORS, ["a", "b"], ValueError,
        r"model\.norm's output changes buffers.*that of b and that of the output\. Put a belief"),
    (lambda: ViT(p=0.3), IMAGES, INSIDE, ValueError, r"model\.drop's output draws random numbers"),
    (Rewritten, VECTORS, None, ValueError, "could not be made a graph of layers.*another output"),
    (hooked, VECTORS, None, ValueError, "model.0 has hooks"),
    (lambda: nn.Sequential(nn.Tanh()), VECTORS, None, ValueError, "a module with weights, got none"),
    (lambda: nn.LazyLinear(3), VECTORS, None, ValueError, "lazy modules"),
    (lambda: torch.compile(nn.Linear(6, 6), backend="eager"), VECTORS, None, TypeError, "wrapped"),
    (lambda: torch.relu, VECTORS, None, TypeError, "must be an nn.Module"),
    (Skip, [1.0], None, TypeError, "X must be a torch.Tensor"),
]  # fmt: skip


@pytest.mark.parametrize("error", range(len(ERRORS)))
def test_what_is_in_the_way_is_named(error: int) -> None:
    build, X, beliefs, kind, message = ERRORS[error]
    model = build()
    model = model.double() if isinstance(model, nn.Module) else model
    with pytest.raises(kind, match=message):
        pc_graph(model, X, beliefs)


def test_by_default_what_can_hold_no_belief_is_in_the_layer_that_it_feeds() -> None:
    assert connections(pc_graph(Unused(), VECTORS.float())) == {
        "a": "x",
        "a_1": "a",
        "b": "a_1",
        "output": "b",
    }
    assert connections(pc_graph(nn.Linear(6, 3), VECTORS.float())) == {"output": "x"}


def test_group_layers_names_the_way_out() -> None:
    with pytest.raises(
        ValueError, match=r"or let torch2pc\.pc_graph\(model, X\) make a graph of it"
    ):
        group_layers(Skip(), VECTORS.float())
