"""``group_layers`` and models that change afterwards: the layers follow, or say that they do not."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.cases import ERR_TYPES, assert_close
from torch2pc import FwdPassPlus, PCInfer, PCInferLatent, follow, group_layers

SCALE = 1.0
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).double()


class Helper:
    """What holds a number, and is no module."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.scale

    def shifted(self, x: Tensor) -> Tensor:
        return x + self.scale


class Net(nn.Module):
    """A chain of which the middle does something with what it holds."""

    of_class, library = 1.0, torch

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 7), nn.Linear(7, 7), nn.Linear(7, 5)
        self.tau, self.power, self.flag, self.p = 1.0, 2, True, 0.3
        self.config = SimpleNamespace(tau=1.0, epoch=0)
        self.options, self.taus = {"tau": 1.0, "epoch": 0}, [1.0, 2.0]
        self.tensor, self.act, self.none = torch.tensor(1.0), torch.tanh, None
        self.register_buffer("buffer", torch.ones(7))
        self.parameter = nn.Parameter(torch.ones(7))
        self.calls, self.log = 0, []
        self.letters = {"a", "b"}
        self.helper = Helper(1.0)
        self.bound, self.children_of = self.helper.scaled, nn.ModuleDict({"d": nn.Tanh()})
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.middle(self.b(torch.tanh(self.a(x)))))

    def middle(self, x: Tensor) -> Tensor:
        return x


def scaled(x: Tensor) -> Tensor:
    return x / SCALE


class Way(NamedTuple):
    """What a forward does, how the model is changed later, and what the layers do then."""

    middle: Callable[[Any, Tensor], Tensor]
    change: Callable[[Any], object]
    name: str | None
    """What the error names; None where the layers follow."""


def setting(**attributes: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for name, value in attributes.items():
            setattr(model, name, value)

    return change


def scale(value: float) -> None:
    global SCALE
    SCALE = value


WAYS: dict[str, Way] = {
    "number": Way(lambda m, x: x / m.tau, setting(tau=0.2), None),
    "number_twice": Way(lambda m, x: (x / m.tau + m.tau), setting(tau=0.2), None),
    "integer": Way(lambda m, x: x**m.power, setting(power=3), None),
    "keyword": Way(lambda m, x: torch.add(x, x, alpha=m.tau), setting(tau=0.2), None),
    "becomes_tensor": Way(lambda m, x: x / m.tau, setting(tau=torch.tensor(0.2)), None),
    "of_class": Way(lambda m, x: x / m.of_class, setting(of_class=0.2), None),
    "tensor": Way(lambda m, x: x / m.tensor, setting(tensor=torch.tensor(0.2)), None),
    "tensor_written": Way(lambda m, x: x / m.tensor, lambda m: m.tensor.fill_(0.2), None),
    "item": Way(lambda m, x: x / m.tensor.item(), lambda m: m.tensor.fill_(0.2), None),
    "buffer": Way(
        lambda m, x: x / m.buffer, lambda m: setattr(m, "buffer", m.buffer / 5), None
    ),
    "parameter": Way(
        lambda m, x: x * m.parameter,
        lambda m: setattr(m, "parameter", nn.Parameter(m.parameter.detach() / 5)),
        None,
    ),
    "probability": Way(lambda m, x: F.dropout(x, m.p, m.training), setting(p=0.7), None),
    "mode": Way(lambda m, x: F.dropout(x, m.p, m.training), lambda m: m.eval(), None),
    "own_mode": Way(
        lambda m, x: F.dropout(x, m.p, m.training), setting(training=False), None
    ),
    "same_method": Way(lambda m, x: m.bound(x), lambda m: setting(bound=m.helper.scaled)(m), None),
    "same_set": Way(
        lambda m, x: x if "a" in m.letters else -x, setting(letters={"b", "a"}), None
    ),
    "unused": Way(
        lambda m, x: x / m.config.tau + m.options["tau"],
        lambda m: (setting(none=3.0)(m), setting(epoch=4)(m.config), m.options.update(epoch=4)),
        None,
    ),
    "computed": Way(lambda m, x: x / (2 * m.tau), setting(tau=0.2), "model.tau was 1.0 and is 0.2"),
    "root": Way(lambda m, x: x / math.sqrt(m.tau), setting(tau=0.2), "model.tau"),
    "both": Way(lambda m, x: x / m.tau * math.sqrt(m.tau), setting(tau=0.2), "model.tau"),
    "constant": Way(lambda m, x: x + torch.full((7,), m.tau), setting(tau=0.2), "model.tau"),
    "branch": Way(lambda m, x: x / m.tau if m.tau < 5 else x, setting(tau=9.0), "model.tau"),
    "largest": Way(lambda m, x: x / max(m.tau, 0.5), setting(tau=0.7), "model.tau"),
    "rounded": Way(lambda m, x: x * int(m.tau), setting(tau=2.0), "model.tau"),
    "loop": Way(
        lambda m, x: x if m.power == 0 else x.sin().mul(m.power), setting(power=0), "model.power"
    ),
    "flag": Way(lambda m, x: x * 2 if m.flag else x, setting(flag=False), "model.flag"),
    "is_none": Way(lambda m, x: x if m.none is None else -x, setting(none=1), "model.none"),
    "function": Way(lambda m, x: m.act(x), setting(act=torch.sin), "model.act"),
    "method": Way(lambda m, x: m.bound(x), lambda m: setting(bound=m.helper.shifted)(m), "model.bound"),
    "owner": Way(
        lambda m, x: m.bound(x), lambda m: setting(bound=Helper(1.0).scaled)(m), "model.bound"
    ),
    "set": Way(
        lambda m, x: x if "a" in m.letters else -x, lambda m: m.letters.remove("a"), "model.letters"
    ),
    "library": Way(
        lambda m, x: m.library.square(x), setting(library=torch.special), "model.library was torch"
    ),
    "no_tensor": Way(
        lambda m, x: x / m.tensor,
        setting(tensor=0.2),
        r"model.tensor was a tensor of shape \(\) and is 0.2 now",
    ),
    "tensor_gone": Way(
        lambda m, x: x / m.tensor,
        lambda m: delattr(m, "tensor"),
        r"model.tensor was a tensor of shape \(\) and is absent now",
    ),
    "no_parameter": Way(
        lambda m, x: x * m.parameter,
        lambda m: (delattr(m, "parameter"), setting(parameter=torch.ones(7))(m)),
        r"model.parameter was a parameter of shape \(7,\) and is a tensor of shape \(7,\) now",
    ),
    "children": Way(
        lambda m, x: m.children_of["d"](x),
        lambda m: m.children_of.update({"e": nn.Tanh()}),
        "model.children_of has other modules now",
    ),
    "gone": Way(lambda m, x: x / (m.tau + 1), lambda m: delattr(m, "tau"), "absent"),
    "config": Way(lambda m, x: x / m.config.tau, lambda m: setting(tau=0.2)(m.config), "model.config"),
    "dict": Way(lambda m, x: x / m.options["tau"], lambda m: m.options.update(tau=0.2), "model.options"),
    "list": Way(lambda m, x: x / m.taus[0], lambda m: m.taus.insert(0, 0.2), "model.taus"),
    "float": Way(lambda m, x: x / float(m.tensor), lambda m: m.tensor.fill_(0.2), "model.tensor"),
    "global": Way(lambda m, x: x / SCALE, lambda m: scale(0.2), "SCALE"),
    "inner": Way(lambda m, x: (lambda y: y / SCALE)(x), lambda m: scale(0.2), "SCALE"),
    "helper": Way(lambda m, x: scaled(x), lambda m: scale(0.2), r"SCALE \(which scaled uses\)"),
    "module": Way(lambda m, x: x, lambda m: setattr(m, "b", nn.Linear(7, 7).double()), "model.b"),
    "hook": Way(lambda m, x: x, lambda m: m.register_forward_hook(lambda *_: None), "has hooks"),
    "of_module": Way(
        lambda m, x: x / (m.b.in_features + 1), lambda m: setting(in_features=1)(m.b), "model.b.in"
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def unscaled() -> None:
    scale(1.0)


def model_of(way: Way) -> nn.Module:
    kind = type("Net", (Net,), {"middle": way.middle})
    torch.manual_seed(0)
    return kind()


def updates(layers: Any, ErrType: str) -> list[Tensor | None]:
    torch.manual_seed(1)
    PCInfer(layers, lambda y, _: y.square().sum(), X, None, ErrType, n=4, eta=0.05)
    return [p.grad for p in layers.parameters()]


@pytest.mark.parametrize("name", [name for name, way in WAYS.items() if way.name is None])
@settings(max_examples=5)
@given(ErrType=st.sampled_from(ERR_TYPES), called_before=st.booleans())
def test_what_is_read_anew_is_followed(name: str, ErrType: str, called_before: bool) -> None:
    """As layers that are made of a copy of the model once it was changed."""
    way = WAYS[name]
    model = model_of(way)
    layers = group_layers(model, X)
    if called_before:
        updates(layers, ErrType)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        way.change(each)
    torch.manual_seed(2)
    expected = twin(X)
    torch.manual_seed(2)
    assert_close(layers(X), expected, 1e-12)
    found = updates(layers, ErrType)
    wanted = updates(group_layers(twin, X), ErrType)
    assert_close(found, wanted, 1e-9)
    assert {id(p) for p in layers.parameters()} == {
        id(p) for p in model.parameters() if p.grad is not None
    }


@pytest.mark.parametrize("name", [name for name, way in WAYS.items() if way.name is not None])
@settings(max_examples=5)
@given(ErrType=st.sampled_from(ERR_TYPES), called_before=st.booleans())
def test_what_is_not_is_an_error(name: str, ErrType: str, called_before: bool) -> None:
    way = WAYS[name]
    scale(1.0)
    model = model_of(way)
    layers = group_layers(model, X)
    assert_close(layers(X), model(X), 1e-12)
    if called_before:
        updates(layers, ErrType)
    parameters = list(layers.parameters())
    before = [p.grad for p in parameters]
    way.change(model)
    with pytest.raises(RuntimeError, match=f"{way.name}.*Group anew"):
        updates(layers, ErrType)
    with pytest.raises(RuntimeError, match="Group anew"):
        layers(X)
    assert all(p.grad is g for p, g in zip(parameters, before, strict=True))
    scale(1.0)


def test_every_way_in_looks_whether_the_model_is_the_same() -> None:
    model = model_of(WAYS["computed"])
    layers, LossFun = group_layers(model, X), lambda y, _: y.square().sum()
    model.tau = 0.2
    ways_in: list[Callable[[], object]] = [
        lambda: FwdPassPlus(layers, LossFun, X, None),
        lambda: PCInferLatent(layers, LossFun, None, X, 0.1, 2),
        lambda: follow(layers, LossFun, X, None, "Strict"),
        lambda: layers[:2](X),
    ]
    for way_in in ways_in:
        with pytest.raises(RuntimeError, match=r"model\.tau"):
            way_in()
    model.tau = 1.0  # as it was
    for way_in in ways_in:
        way_in()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_follow_the_copy(copied: Callable[[Any], Any]) -> None:
    model = Followed()
    twin, layers = copied((model, group_layers(model, X)))
    twin.tau = 0.2
    assert_close(layers(X), twin(X), 1e-12)
    twin.flag = False
    with pytest.raises(RuntimeError, match=r"model\.flag"):
        layers(X)


class Followed(Net):
    def middle(self, x: Tensor) -> Tensor:
        return x / self.tau if self.flag else x


def test_modes_of_containers_are_their_own() -> None:
    """One that was put into eval mode by itself, as when it is not to be trained, stays there."""

    class Inner(Net):
        def middle(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5, self.training)

    class Outer(Inner):
        def __init__(self) -> None:
            super().__init__()
            self.a = Inner()
            self.between = nn.Linear(5, 7).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.middle(self.b(self.between(self.a(x)))))

    model = Outer()
    model.a.eval()
    layers = group_layers(model, X)
    for change in (lambda: None, model.eval, layers.train, lambda: model.a.eval(), layers.eval):
        change()
        torch.manual_seed(1)
        expected = model(X)
        torch.manual_seed(1)
        assert_close(layers(X), expected, 0)


def test_what_a_forward_sets_is_left_alone_and_said() -> None:
    class Counts(Net):
        def middle(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.log.append(x)
            self.kept = x
            return x

    model = Counts()
    with pytest.warns(UserWarning, match=r"model\.calls.*which the layers do not") as found:
        layers = group_layers(model, X)
    assert "model.log" in str(found[0].message) and "model.kept" in str(found[0].message)
    assert model.calls == 0 and model.log == [] and not hasattr(model, "kept")
    model(X)
    assert model.calls == 1
    assert_close(layers(X), model(X), 1e-12)


def test_conversions_are_followed() -> None:
    model = model_of(WAYS["buffer"]).float()
    layers = group_layers(model, X.float())
    model.double()
    assert_close(layers(X), model(X), 1e-12)
    layers.float()
    assert layers(X.float()).dtype == torch.float32


def test_a_state_that_is_assigned_is_taken_over() -> None:
    model, other = model_of(WAYS["parameter"]), model_of(WAYS["parameter"])
    layers = group_layers(model, X)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    model.load_state_dict(other.state_dict(), assign=True)
    assert_close(layers(X), other(X), 1e-12)
    assert set(layers.parameters()) <= set(model.parameters())


def test_layers_that_are_compiled_are_the_models() -> None:
    """Whether the model has changed is looked at outside of what is compiled."""
    layers = group_layers(Followed(), X)
    compiled = torch.compile(layers, backend="eager", fullgraph=True)
    assert_close(compiled(X), layers(input=X), 1e-12)


def test_a_variable_that_is_not_set_yet_is_no_setting() -> None:
    class Later(Net):
        def middle(self, x: Tensor) -> Tensor:
            return x if self.flag else later

    layers = group_layers(Later(), X)
    later = 3.0
    assert layers(X).isfinite().all() and later


def test_what_is_assigned_is_taken_over_where_it_is_used_alone() -> None:
    class Parted(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(torch.tanh(self.a(x)) * self.parameter) / self.buffer)

    model = Parted()
    layers = group_layers(model, X)
    names = [*layers.state_dict()]
    model.parameter = nn.Parameter(torch.full((7,), 3.0).double())
    model.buffer = torch.full((7,), 0.5).double()
    assert_close(layers(X), model(X), 1e-12)
    assert [*layers.state_dict()] == names


def test_groups_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for way in WAYS.values():
            group_layers(model_of(way), X)
