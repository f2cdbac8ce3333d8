"""``group_layers``: what becomes a layer, that the layers do what the model does, and what is in the way."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases import Case, assert_close, check_against_reference
from torch2pc import PCInfer, group_layers
from torch2pc.cutting.same import check_same

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def convolutions(*stages: tuple[int, int], normalised: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for width, count in stages:
        for _ in range(count):
            layers.append(nn.Conv2d(channels, width, 3, padding=1))
            layers += [nn.BatchNorm2d(width)] if normalised else []
            layers.append(nn.ReLU(inplace=True))
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


class VGG(nn.Module):
    """As torchvision's: features, avgpool, and a classifier after flattening in the forward."""

    def __init__(self, *stages: tuple[int, int], normalised: bool = False) -> None:
        super().__init__()
        self.features = convolutions(*stages, normalised=normalised)
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(
            *(nn.Linear(4 * stages[-1][0], 8), nn.ReLU(inplace=True), nn.Dropout()),
            *(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Dropout()),
            nn.Linear(8, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class Residual(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after)
        self.shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.shortcut(x)
        return self.relu(y)


class ResNet(nn.Module):
    """Stem and stages, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(Residual(4, 4), Residual(4, 4))
        self.layer2 = nn.Sequential(Residual(4, 6), Residual(6, 6))
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(x.mean((2, 3)))


class Block(nn.Module):
    """A transformer's, normalised before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """Adds its embedding in its own forward, as torchvision's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 17, width))
        self.dropout = nn.Dropout(0.2)
        self.blocks = nn.ModuleList([Block(width) for _ in range(3)])
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(x + self.position)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class ViT(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.encoder = Encoder(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        assert h == w
        x = self.patches(x)
        x = x.reshape(n, -1, (h // 4) * (w // 4)).permute(0, 2, 1)
        x = torch.cat([self.token.expand(n, -1, -1), x], dim=1)
        return self.head(self.encoder(x)[:, 0])


class Functional(nn.Module):
    """Activations, pooling and dropout as functions, and branches on shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc1, self.fc2 = nn.Linear(4 * 49, 8), nn.Linear(8, 5)
        self.register_buffer("offset", torch.ones(8))

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        if x.dim() != 4:
            raise ValueError("images, please")
        x = F.relu(F.max_pool2d(self.conv(x), 2))
        x = scale * F.relu_(self.fc1(x.view(x.size(0), -1))) + self.offset + torch.arange(8)
        x = F.dropout(x, 0.3, training=self.training)
        return F.log_softmax(self.fc2(x), dim=1)


class OneForward(nn.Module):
    """Residual connections in the model's own forward, each around one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 7), nn.Linear(7, 5)
        self.norms = nn.ModuleList([nn.LayerNorm(7) for _ in range(2)])
        self.middle = nn.ModuleList([nn.Linear(7, 7) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for norm, linear in zip(self.norms, self.middle, strict=True):
            x = x + torch.tanh(linear(norm(x)))
        return self.last(x)


def nested() -> nn.Sequential:
    inner = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), nn.PReLU())
    return nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(768, 8)), inner, nn.Linear(8, 5))


def of_pytorch() -> nn.Sequential:
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 3, nn.LayerNorm(6), enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(10, 6), encoder, nn.Flatten(), nn.Linear(24, 5))


WORDS = torch.randint(10, (3, 4), generator=torch.Generator().manual_seed(0))
VECTORS = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
# Builder, input, numbers of layers.
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, int]] = {
    "nested": (nested, IMAGES, 3),
    "VGG": (lambda: VGG((4, 2), (6, 1)), IMAGES, 6),
    "VGG_bn": (lambda: VGG((4, 2), (6, 1), normalised=True), IMAGES, 6),
    "ResNet": (ResNet, IMAGES, 6),
    "ViT": (ViT, IMAGES, 5),
    "Functional": (Functional, IMAGES, 3),
    "OneForward": (OneForward, VECTORS, 4),
    "TransformerEncoder": (of_pytorch, WORDS, 5),
}


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, int]:
    build, X, count = MODELS[request.param]
    model = build().double()
    return model, X.double() if X.is_floating_point() else X, count


def kinds(layers: Iterable[nn.Module]) -> list[list[str]]:
    """The classes in each layer."""
    return [
        [type(part).__name__ for part in (layer if type(layer) is nn.Sequential else [layer])]
        for layer in layers
    ]


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("cut", ["before", "after"])
def test_layers_do_what_the_model_does(case: tuple[nn.Module, Tensor, int], cut: str) -> None:
    model, X, count = case
    layers = group_layers(model, X[:2], cut=cut)
    assert len(layers) == count
    assert set(layers.parameters()) == set(model.parameters())

    Y = torch.randint(5, (len(X),))
    torch.manual_seed(1)
    expected = model(X)
    F.cross_entropy(expected, Y).backward()
    wanted = gradients(model)
    model.zero_grad()
    buffers = [b.clone() for b in model.buffers()]
    torch.manual_seed(1)
    result = PCInfer(layers, F.cross_entropy, X, Y, "Exact")
    torch.testing.assert_close(result.vhat[-1], expected, rtol=0, atol=0)
    assert_close(gradients(model), wanted, 1e-12)
    assert len(buffers) == len(list(model.buffers()))

    model.eval()
    layers.eval()
    torch.testing.assert_close(layers(X), model(X), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["VGG", "ViT", "Functional"])
def test_strict_runs_on_the_layers(name: str) -> None:
    build, X, _ = MODELS[name]
    layers = group_layers(build().double(), X.double())
    Y = torch.randint(5, (len(X),))
    check_against_reference(Case(layers, F.cross_entropy, X.double(), Y), "Strict", n=6)


def test_activations_open_the_layer_that_they_feed() -> None:
    layers = group_layers(VGG((4, 2), (6, 1)), IMAGES)
    assert kinds(layers) == [
        ["Conv2d"],
        ["ReLU", "Conv2d"],
        ["ReLU", "MaxPool2d", "Conv2d"],
        ["ReLU", "MaxPool2d", "AdaptiveAvgPool2d", "Flatten", "Linear"],
        ["ReLU", "Dropout", "Linear"],
        ["ReLU", "Dropout", "Linear"],
    ]


def test_activations_close_the_layer_before_them() -> None:
    layers = group_layers(VGG((4, 2), (6, 1)), IMAGES, cut="after")
    assert kinds(layers) == [
        ["Conv2d", "ReLU"],
        ["Conv2d", "ReLU", "MaxPool2d"],
        ["Conv2d", "ReLU", "MaxPool2d", "AdaptiveAvgPool2d", "Flatten"],
        ["Linear", "ReLU", "Dropout"],
        ["Linear", "ReLU", "Dropout"],
        ["Linear"],
    ]


def test_normalisation_stays_with_what_it_normalises() -> None:
    assert kinds(group_layers(VGG((4, 1), normalised=True), IMAGES))[:2] == [
        ["Conv2d", "BatchNorm2d"],
        ["ReLU", "MaxPool2d", "AdaptiveAvgPool2d", "Flatten", "Linear"],
    ]
    before = nn.Sequential(
        nn.LayerNorm(6), nn.Linear(6, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 5)
    )
    assert kinds(group_layers(before, VECTORS)) == [
        ["LayerNorm", "Linear"],
        ["ReLU", "LayerNorm", "Linear"],
    ]


def test_blocks_and_what_is_between() -> None:
    assert kinds(group_layers(ResNet(), IMAGES)) == [
        ["Conv2d", "BatchNorm2d"],
        ["ReLU", "MaxPool2d", "Residual"],
        *[["Residual"]] * 3,
        ["Between", "Linear"],
    ]
    layers = group_layers(ViT(), IMAGES)
    assert kinds(layers) == [
        ["Between"],
        ["Dropout", "Block"],
        ["Block"],
        ["Block"],
        ["LayerNorm", "Between", "Linear"],
    ]
    names = [name.rpartition("model.")[2] for name, _ in layers[0].named_parameters()]
    assert names == ["token", "patches.weight", "patches.bias", "encoder.position"]
    assert "token" in repr(layers[0])


@pytest.mark.parametrize("cut", ["before", "after"])
@pytest.mark.parametrize("normalised", [False, True])
def test_vgg19_has_the_papers_19_layers(cut: str, normalised: bool) -> None:
    model = VGG((2, 2), (2, 2), (3, 4), (3, 4), (3, 4), normalised=normalised)
    assert len(group_layers(model, torch.randn(2, 3, 64, 64), cut=cut)) == 19


def test_the_model_is_left_as_it_is() -> None:
    model = VGG((4, 2), normalised=True).eval()
    model.features[1].train()
    F.mse_loss(model(IMAGES), torch.zeros(3, 5)).backward()
    before, random = copy.deepcopy(model), torch.get_rng_state()
    old = {name: g if g is None else g.clone() for name, g in gradients(model).items()}
    X = IMAGES.clone()
    layers = group_layers(model, X)
    assert torch.equal(X, IMAGES)
    assert torch.equal(random, torch.get_rng_state())
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert_close(list(model.state_dict().values()), list(before.state_dict().values()), 0)
    assert_close(gradients(model), old, 0)
    assert not layers.training and not layers[0].training


def test_layers_are_the_models_own() -> None:
    """State goes in and out by the model's names; hooks and parametrizations stay where they are."""
    model, other = ViT(), ViT()
    nn.utils.parametrizations.weight_norm(model.head)
    nn.utils.parametrizations.weight_norm(other.head)
    fired = []
    model.head.register_forward_hook(lambda *_: fired.append(1))
    layers = group_layers(model, IMAGES)
    model.load_state_dict(other.state_dict())
    fired.clear()
    layers.eval()
    torch.testing.assert_close(layers(IMAGES), other.eval()(IMAGES))
    assert fired == [1]


@pytest.mark.parametrize("name", ["ViT", "Functional"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_layers_can_be_copied(name: str, copied: Callable[[Any], Any]) -> None:
    build, X, _ = MODELS[name]
    layers = group_layers(build(), X).eval()
    twin = copied(layers)
    torch.testing.assert_close(twin(X), layers(X))
    PCInfer(twin, F.cross_entropy, X, torch.zeros(len(X), dtype=torch.long), "Strict", n=2)


class InPlaceOnView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.last = nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.view(-1, 2, 6)).transpose(1, 2)
        return self.last(self.relu(x).reshape(-1, 12))


def test_modules_that_write_into_views_of_their_input() -> None:
    model, X = InPlaceOnView(), torch.randn(3, 12)
    layers = group_layers(model, X)
    assert kinds(layers)[1] == ["Between", "ReLU", "Between", "Linear"]
    expected, before = model(X), X.clone()
    result = PCInfer(layers, F.mse_loss, X, torch.zeros(3, 5), "Strict", n=3)
    torch.testing.assert_close(result.vhat[-1], expected)
    assert torch.equal(X, before)


def test_functions_are_told_the_mode() -> None:
    layers = group_layers(Functional().eval(), IMAGES)
    assert torch.equal(layers(IMAGES), layers(IMAGES))
    layers.train()
    assert not torch.equal(layers(IMAGES), layers(IMAGES))
    layers.eval()
    assert torch.equal(layers(IMAGES), layers(IMAGES))
    assert not any([module.training for module in layers.modules()])


def test_modes_stay_as_they_are() -> None:
    model = Functional().train()
    modules = list(model.modules())
    assert len(modules) > 2
    modules[1].eval()
    before = [module.training for module in modules]
    group_layers(model, IMAGES)
    assert [module.training for module in modules] == before
    with pytest.raises(ValueError, match="same in train"):
        group_layers(longer := Longer().eval(), VECTORS)
    assert not longer.training


def test_what_is_no_number_is_so_in_the_layers_too() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    with torch.no_grad():
        model[0].bias[0] = torch.nan
    assert group_layers(model, VECTORS)(VECTORS).isnan().all()


class Halved(nn.Module):
    """A block without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) / 2 + x


def test_a_block_before_a_layer_does_not_keep_its_normalisation_away() -> None:
    items = [Halved(), nn.Linear(6, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3)]
    layers = group_layers(nn.Sequential(*items), VECTORS)
    assert [len(layer) for layer in layers] == [3, 2]


def test_an_output_that_is_not_used_may_have_any_name() -> None:
    model = Probed()
    assert_close(group_layers(model, VECTORS)(VECTORS), model(VECTORS), tolerance=0)


def test_another_batch_size_than_the_samples() -> None:
    model = ViT().eval()
    layers = group_layers(model, IMAGES)
    torch.testing.assert_close(layers(IMAGES[:1]), model(IMAGES[:1]))


class AroundTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.third(torch.relu(self.second(x))) + x


class IntoModule(AroundTwo):
    def forward(self, x: Tensor) -> Tensor:
        size = x.size(0)
        x = self.second(self.first(x))
        return self.third(x.view(size, -1))


class Inner(AroundTwo):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.dropout(self.first(x), 0.5, self.training))


class Outer(Inner):
    def __init__(self) -> None:
        super().__init__()
        self.first = Inner()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.third(x))


def test_functions_in_a_container_are_told_the_mode_too() -> None:
    layers = group_layers(Outer(), VECTORS)
    assert len(layers) == 4
    assert not torch.equal(layers(VECTORS), layers(VECTORS))
    inner = layers[:3]
    assert not torch.equal(inner(VECTORS), inner(VECTORS))
    layers.eval()
    assert torch.equal(layers(VECTORS), layers(VECTORS))


class Scaling(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.inner, self.x = nn.Tanh(), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.x


def test_numbers_of_one_name_in_one_layer() -> None:
    model = nn.Sequential(nn.Linear(6, 6), Wrapped(Scaling(2.0)), Scaling(3.0), nn.Linear(6, 3))
    layers = group_layers(model, VECTORS)
    assert len(layers) == 2
    assert_close(layers(VECTORS), model(VECTORS), tolerance=0)


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Branching(AroundTwo):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x) if x.sum() > 0 else self.third(x)


class Unequal(AroundTwo):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * torch.tensor(2.0 if self.training else 1.0))


class Reading(AroundTwo):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * float(x.mean()))


class Writing(AroundTwo):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x.tanh_()
        return self.second(x)


class Counting(AroundTwo):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return self.second(self.first(x))


class Longer(AroundTwo):
    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))
        return x if self.training else x.softmax(1)


class Probed(AroundTwo):
    """The name of what it does not use looks like that of a function that writes."""

    def __init__(self) -> None:
        super().__init__()
        self.probe_ = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.probe_(x)
        return self.second(x)


class Cut(AroundTwo):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.first(x)
        return self.second(x)


class Noisy(AroundTwo):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) + torch.randn(6))


class Auxiliary(AroundTwo):
    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        return (self.second(x), self.third(x)) if self.training else self.second(x)


class TwoInputs(AroundTwo):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.second(self.first(x)) + y


class Pair(AroundTwo):
    def forward(self, x: Tensor) -> Any:
        return self.first(x), self.second(x)


class Labels(AroundTwo):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)).argmax(1)


class BranchingOnAPart(AroundTwo):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x) if x.mT[0, 0] else self.third(x)


class Rows(AroundTwo):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.stack([row.tanh() for row in self.first(x)]))


class TakesPair(AroundTwo):
    def forward(self, pair: Any) -> Tensor:
        return self.first(pair[0]) + pair[1][0]


class OneSize(AroundTwo):
    """Adds what has as many examples as the sample."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("noise", torch.ones(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) + self.noise)


class Trained(nn.Linear):
    """Not made to be trained."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            raise KeyError("frozen")
        return super().forward(x)


class SizeOfTheSample(AroundTwo):
    """Takes one way for a batch of three, where what the layers do needs three."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x.view(3, 6) if x.shape[0] == 3 else x.view(6, 6))


def hooked() -> nn.Module:
    model = VGG((4, 1))
    model.features.register_forward_hook(lambda *_: None)
    return model


class DistributedDataParallel(Wrapped):
    pass


class ShardedLinear(type("FSDPModule", (), {}), nn.Linear):  # type: ignore[misc]
    pass


ERRORS = [
    (
        AroundTwo(),
        ValueError,
        r"relu of model\.first's output goes around model\.second into a later add, "
        r"so that it cannot be cut between model\.second and model\.third",
    ),
    (IntoModule(), ValueError, r"size of model's input goes around model\.first into a later view"),
    (Wrapped(AroundTwo()), ValueError, r"model\.inner is no chain.* relu of model\.inner\.first's"),
    (
        Branching(),
        ValueError,
        r"branch on the values of tensors.* gt of sum of model\.first's output",
    ),
    (Unequal(), ValueError, "could not be made a chain|another one each time"),
    (Reading(), ValueError, "could not be followed .*float"),
    (Writing(), ValueError, r"write into tensors in place.*tanh_ of model\.first's output"),
    (Counting(), ValueError, r"write into tensors in place.*add_ of model\.count does"),
    (Cut(), ValueError, r"another the gradient of first\.weight"),
    (Noisy(), ValueError, r"draw random numbers like the input \(torch.randn_like\)"),
    (Auxiliary(), ValueError, "same in train and in eval mode"),
    (Longer(), ValueError, "same in train and in eval mode"),
    (TwoInputs(), ValueError, "could not be followed .*'y'"),
    (Pair(), ValueError, "must return a tensor"),
    (Labels(), ValueError, r"must return a floating-point tensor, got torch\.int64"),
    (
        BranchingOnAPart(),
        ValueError,
        r"does on \[\(0, 0\)\] of mT of model\.first's output",
    ),
    (Rows(), ValueError, r"^model could not be followed \(TraceError"),
    (
        nn.Sequential(nn.LSTM(6, 6), TakesPair()),
        ValueError,
        r"model\.0's output is no single floating-point tensor, .* between model\.0 and model\.1\.",
    ),
    (
        OneSize(),
        ValueError,
        r"accepts in eval mode, with each example twice, but it raised RuntimeError: The size",
    ),
    (Trained(6, 6), ValueError, r"accepts in train mode, but it raised KeyError: 'frozen'"),
    (SizeOfTheSample(), ValueError, r"made of layers: in eval mode they raise RuntimeError: shape"),
    (nn.LSTM(6, 6), ValueError, "must return one tensor, got tuple"),
    (nn.Sequential(nn.ReLU(), nn.PReLU()), ValueError, "a module with weights"),
    (nn.Sequential(), ValueError, "a tensor that depends on its input|module with weights"),
    (nn.Sequential(nn.LazyLinear(4)), ValueError, "lazy modules"),
    (
        nn.Sequential(
            nn.Linear(6, 6), nn.LazyBatchNorm1d(affine=False)
        ),  # lazy in its buffers alone
        ValueError,
        "lazy modules",
    ),
    (DistributedDataParallel(nn.Linear(6, 6)), TypeError, "must not be wrapped, got Distributed"),
    (nn.Sequential(ShardedLinear(6, 6)), TypeError, "whole parameters, got ShardedLinear"),
    (
        torch.compile(nn.Linear(6, 6), backend="eager"),
        TypeError,
        "must not be wrapped, got OptimizedModule",
    ),
    (torch.relu, TypeError, "must be an nn.Module"),
    (nn.Sequential(nn.Linear(7, 6)), ValueError, "could not be followed .*shapes"),
]


@pytest.mark.parametrize(("model", "error", "message"), ERRORS, ids=lambda x: type(x).__name__)
def test_what_is_in_the_way_is_named(model: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        group_layers(model, VECTORS)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"model\.features has hooks, which would not run"):
        group_layers(hooked(), IMAGES)
    with pytest.raises(ValueError, match='cut must be "before" or "after", got \'behind\''):
        group_layers(nested(), IMAGES, cut="behind")
    with pytest.raises(TypeError, match=r"X must be a torch\.Tensor, got list"):
        group_layers(nested(), [1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"could not be followed .*more than 1 value per channel"):
        group_layers(nested(), IMAGES[:1])


class Parts(AroundTwo):
    """Goes through the parts of a tensor, and through its sizes."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([part.tanh() for part in self.first(x).chunk(2, 1)], 1)
        return self.second(x) / sum(size for size in x.shape[1:])


def test_a_forward_may_go_through_what_an_operation_returns() -> None:
    model = Parts()
    layers = group_layers(model, VECTORS)
    assert len(layers) == 2
    assert_close(layers(VECTORS[:2]), model(VECTORS[:2]), tolerance=0)


class Masked(nn.Module):
    """An encoder that is handed a mask besides, by name or by place."""

    def __init__(self, by_name: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.embed, self.head, self.by_name = nn.Embedding(10, 6), nn.Linear(6, 5), by_name
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = self.encoder(x, mask=self.mask) if self.by_name else self.encoder(x, self.mask)
        return self.head(x).mean(1)


@pytest.mark.parametrize("by_name", [True, False])
def test_an_encoder_that_is_given_a_mask_is_one_layer(by_name: bool) -> None:
    model = Masked(by_name)
    layers = group_layers(model, WORDS)
    assert len(layers) == 3
    assert_close(layers(WORDS), model(WORDS), tolerance=1e-6)


def test_a_container_that_cannot_be_followed_is_one_layer() -> None:
    model = nn.Sequential(nn.Linear(6, 6), Branching(), Wrapped(Branching()), nn.Linear(6, 3))
    layers = group_layers(model, VECTORS)
    assert kinds(layers) == [["Linear"], ["Branching"], ["Wrapped"], ["Linear"]]
    assert_close(layers(-VECTORS), model(-VECTORS), tolerance=0)


def test_layers_are_shown_as_a_sequential() -> None:
    assert repr(group_layers(nn.Linear(6, 3), VECTORS)).startswith("Sequential(\n  (0): Linear")


def test_a_failed_grouping_leaves_the_model_as_it_is() -> None:
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(), Cut()).eval()
    before, random = copy.deepcopy(model), torch.get_rng_state()
    with pytest.raises(ValueError, match="could not be made a chain"):
        group_layers(model, VECTORS)
    assert torch.equal(random, torch.get_rng_state())
    assert not any(m.training for m in model.modules())
    assert_close(list(model.state_dict().values()), list(before.state_dict().values()), 0)


def test_pcinfer_names_the_way_out() -> None:
    with pytest.raises(TypeError, match=r"got VGG: torch2pc\.group_layers\(model, X\) makes one"):
        PCInfer(VGG((4, 1)), F.cross_entropy, IMAGES, torch.zeros(3).long(), "Exact")  # type: ignore[arg-type]


def library(name: str) -> ModuleType:
    """torchvision or timm; skips where it is missing, or built for another PyTorch."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        pytest.skip(f"{name} cannot be imported: {type(error).__name__}")


def check_known(model: nn.Module, X: Tensor, count: int) -> None:
    """``count`` layers either way, whose Exact update is the gradient."""
    Y = torch.zeros(len(X), dtype=torch.long)
    for cut in "before", "after":
        layers = group_layers(model, X, cut=cut)
        assert len(layers) == count
        torch.manual_seed(1)
        F.cross_entropy(model(X), Y).backward()
        wanted = gradients(model)
        torch.manual_seed(1)
        PCInfer(layers, F.cross_entropy, X, Y, "Exact")
        assert_close(gradients(model), wanted, 1e-4)
        model.zero_grad()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("normalised", [False, True])
def test_vgg_of_torchvision(normalised: bool) -> None:
    vgg = library("torchvision.models.vgg")
    narrow = [width if width == "M" else width // 8 for width in vgg.cfgs["E"]]
    features = vgg.make_layers(narrow, normalised)
    features[0] = nn.Conv2d(3, 8, 3, padding=1)
    model = vgg.VGG(features, num_classes=10, init_weights=False)
    for i, (before, after) in {0: (3136, 8), 3: (8, 8), 6: (8, 10)}.items():
        model.classifier[i] = nn.Linear(before, after)
    check_known(model, torch.randn(2, 3, 32, 32), 19)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
def test_resnet_of_torchvision(block: str) -> None:
    resnet = library("torchvision.models.resnet")
    model = resnet.ResNet(getattr(resnet, block), [1, 2, 1, 1])
    check_known(model, torch.randn(2, 3, 64, 64), 7)


@pytest.mark.filterwarnings("ignore")
def test_vision_transformer_of_torchvision() -> None:
    vit = library("torchvision.models.vision_transformer")
    model = vit.VisionTransformer(32, 8, 3, 2, 16, 32, dropout=0.1, num_classes=10)
    check_known(model, torch.randn(2, 3, 32, 32), 5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("vit_tiny_patch16_224", dict(img_size=32, patch_size=8, embed_dim=16, num_heads=2), 14),
        ("resnet18", dict(num_classes=10), 10),
    ],
)
def test_models_of_timm(name: str, options: dict[str, Any], count: int) -> None:
    timm = library("timm")
    side = 32 if name.startswith("vit") else 64
    check_known(timm.create_model(name, **options), torch.randn(2, 3, side, side), count)


class Doubles(nn.Module):
    """Does something in one of the modes alone."""

    def __init__(self, in_training: bool) -> None:
        super().__init__()
        self.in_training = in_training

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if self.training == self.in_training else x


@pytest.mark.parametrize("changed", [Tensor.double, lambda y: y.unsqueeze(0)])
def test_other_types_and_shapes_are_other_outputs(changed: Callable[[Tensor], Tensor]) -> None:
    class Changed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return changed(super().forward(x))

    layers = nn.Sequential(Changed(3, 2))
    model = nn.Sequential(nn.Linear(3, 2))
    model[0].weight, model[0].bias = layers[0].weight, layers[0].bias
    with pytest.raises(ValueError, match="in train mode they give another output"):
        check_same(model, layers, torch.randn(4, 3), "a chain")


class Counts(nn.Module):
    """How often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x


def test_buffers_of_integers_are_compared() -> None:
    counts, linear = Counts(), nn.Linear(3, 2)
    layers = nn.Sequential(counts, counts, linear)
    with pytest.raises(ValueError, match=r"give another buffer 0\.count\."):
        check_same(nn.Sequential(counts, linear), layers, torch.randn(4, 3), "a chain")


class InAnotherOrder(nn.Module):
    """A linear layer whose sums are taken from the other end, off by so much, with another slope."""

    def __init__(self, linear: nn.Linear, shift: float = 0.0, slope: float = 1.0) -> None:
        super().__init__()
        self.linear, self.shift, self.slope = linear, shift, slope

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x.flip(1), self.linear.weight.flip(1), self.linear.bias) + self.shift
        return y + (self.slope - 1) * (y - y.detach())


def test_what_differs_by_round_off_is_the_same() -> None:
    """A bias before a normalisation has a gradient of round-off alone; other gradients and outputs not."""
    linear, norm, X = nn.Linear(20, 3), nn.BatchNorm1d(3), torch.randn(8, 20)
    model = nn.Sequential(linear, norm)
    check_same(model, nn.Sequential(InAnotherOrder(linear), norm), X, "a chain")
    with pytest.raises(ValueError, match=r"give another the gradient of 0\.weight\."):
        layers = nn.Sequential(InAnotherOrder(linear, slope=1.001), norm)
        check_same(model, layers, X, "a chain")
    # What is right to its own size, though gradients are larger.
    with torch.no_grad():
        linear.weight.mul_(1e-4)
    with pytest.raises(ValueError, match=r"give another output\."):
        layers = nn.Sequential(InAnotherOrder(linear, shift=1e-3))
        check_same(nn.Sequential(linear), layers, 1e4 * X, "a chain")


def test_frozen_parameters_have_no_gradient_to_compare() -> None:
    model = nested()
    model[1].requires_grad_(False)
    layers = group_layers(model, IMAGES)
    assert not next(layers[0].parameters()).requires_grad


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_layers_are_compared_in_each_mode(mode: str) -> None:
    linear = nn.Linear(3, 2)
    layers = nn.Sequential(linear, Doubles(mode == "train"))
    with pytest.raises(ValueError, match=rf"in {mode} mode they give another output\."):
        check_same(nn.Sequential(linear), layers, torch.randn(4, 3), "a chain")
