"""Operations that compare, select or round: as the layer itself does, in any call and for any batch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import reference
from tests.cases import Case, Does, assert_close, check_against_reference, squared_error
from torch2pc.displacement.rules.decisions import JUMP, VALUE
from torch2pc.graph.network import Network
from torch2pc.inference.strict import strict


def sparsemax(x: Tensor) -> Tensor:
    ordered = x.sort(1, descending=True)[0]
    k = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)
    sums = ordered.cumsum(1)
    count = (1 + k * ordered > sums).sum(1, keepdim=True)
    return (x - (sums.gather(1, count - 1) - 1) / count.to(x.dtype)).clamp(min=0)


def largest(x: Tensor) -> Tensor:
    return x.amax(1, keepdim=True)


SELECTING: dict[str, Callable[[Tensor], Tensor]] = {
    "winner": lambda x: x * (x == largest(x)),
    "k winners": lambda x: x * (x >= x.topk(2, 1)[0][:, -1:]),
    "others": lambda x: x.masked_fill(x == largest(x), 0.5),
    "filled": lambda x: x.masked_fill(x < x.mean(1, keepdim=True), -0.5),
    "branches": lambda x: torch.where(x == largest(x), x.exp(), 0.1 * x),
    "winner of a branch": lambda x: (lambda y: y * (y == largest(y)))(
        torch.where(x > 0, x, 0.1 * x)
    ),
    "scaled": lambda x: x / x.abs().amax(1, keepdim=True).detach(),
    "rounded at the end": lambda x: x + torch.floor(x / largest(x)).detach(),
    "sign": lambda x: x + torch.sign(largest(x) - x),
    "straight through": lambda x: x + (torch.round(4 * x) / 4 - x).detach(),
    "inside": lambda x: (lambda y: y * (y < 1.1))(x.clamp(-1.1, 1.1)),
    "by place": lambda x: x * (x.sort(1)[1] == 0),
    "the place": lambda x: x.gather(1, x.argmax(1, keepdim=True)).expand_as(x) - x,
    "bounds": lambda x: x.clamp(x.mean(1, keepdim=True) - 0.3, largest(x)),
    "sparsemax": sparsemax,
    "after a linear map": lambda x: (lambda h: h * (h > 0))(x.flip(1) * 1.5 + 0.1),
    "heaviside": lambda x: x + torch.heaviside((largest(x) - x).detach(), x.new_zeros(())),
    "remainder": lambda x: x + 0.1 * torch.remainder(x / largest(x), 1.0).detach(),
}


class Selects(nn.Module):
    """``x + gate (f(act(x)) - x)``, with what selects behind a gate that may be closed."""

    def __init__(self, name: str, is_bounded: bool) -> None:
        super().__init__()
        self.name, self.is_bounded, self.gate = name, is_bounded, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * (SELECTING[self.name](x.tanh() if self.is_bounded else x) - x)


def case_with(name: str, is_bounded: bool, batch: int) -> Case:
    items = [nn.Linear(6, 12), Selects(name, is_bounded), nn.Linear(12, 8), nn.Linear(8, 3)]
    return Case(nn.Sequential(*items), squared_error, *data(batch))


def data(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 6), torch.randn(batch, 3)


names = st.sampled_from(sorted(SELECTING))


@given(names, st.booleans(), st.sampled_from(["Strict", "ErrorBased"]), st.integers(0, 99))
def test_is_the_iteration(name: str, is_bounded: bool, ErrType: str, seed: int) -> None:
    torch.manual_seed(seed)
    case = case_with(name, is_bounded, 3)
    double = Case(case.model.double(), case.LossFun, case.X.double(), case.Y.double())
    check_against_reference(double, ErrType, n=6)


@given(names, st.booleans(), st.booleans(), st.integers(0, 99))
def test_a_batch_is_the_sum_of_its_examples(
    name: str, is_bounded: bool, starts_closed: bool, seed: int
) -> None:
    """In float32, whatever batch the layer was met with first, and whatever it did there."""
    torch.manual_seed(seed)
    case = case_with(name, is_bounded, 2)
    with torch.no_grad():
        case.model[1].gate.fill_(not starts_closed)
        case.infer("Strict", n=6)
        case.model[1].gate.fill_(1.0)
    X, Y = data(48)
    case = case._replace(X=X, Y=Y)
    found = case.infer("Strict", n=6).epsilon
    double = copy.deepcopy(case.model).double()
    expected = reference.strict(double, case.LossFun, X.double(), Y.double(), 0.1, 6).epsilon
    # A number may lie so near to a jump that float32 is on its other side: in few examples.
    for e, right in zip(found[1:], expected[1:], strict=True):
        off = (e - right).norm(dim=1) > 1e-4 * right.norm(dim=1) + 1e-6 * right.norm()
        assert off.sum() <= 1, (name, off.nonzero())


def lines_of(case: Case) -> list[object]:
    network = Network(case.model, case.LossFun, case.X, case.Y)
    strict(network, 0.1)
    return [line.rule for line in network.layers[1].displacement.lines]


def test_only_what_round_off_can_decide_is_evaluated_again() -> None:
    """What is compared with 0 after a linear map, or where nothing moved in between, costs no more."""
    model = [nn.Linear(6, 12), nn.Identity(), nn.Linear(12, 3)]

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            h = self.linear(x)
            return torch.where(h > 0, h, 0.1 * h) * (h[:, :1] > h[:, 1:2])

    model[1] = Gated()
    rules = lines_of(Case(nn.Sequential(*model), squared_error, *data(4)))
    assert VALUE not in rules
    assert JUMP not in rules
    assert VALUE in lines_of(case_with("winner", False, 4))
    assert JUMP in lines_of(case_with("sign", False, 4))


@pytest.mark.parametrize(
    "before",
    [
        nn.BatchNorm1d(12),
        nn.RReLU(),
        Does(lambda x: torch.native_dropout(x, 0.3, True)[0]),
        nn.Sequential(nn.BatchNorm1d(12), nn.Sigmoid(), nn.Dropout(0.3)),
    ],
    ids=repr,
)
def test_what_is_not_evaluated_again_is_compared_as_it_has_moved(before: nn.Module) -> None:
    """It draws numbers, or writes statistics aside."""
    winner = Does(SELECTING["winner"])
    items = [nn.Linear(6, 12), nn.Sequential(before, winner), nn.Linear(12, 3)]
    X, Y = data(5)
    case = Case(nn.Sequential(*items).double(), squared_error, X.double(), Y.double())
    check_against_reference(case, "Strict", n=6)


def test_dropout_before_a_comparison_keeps_its_mask() -> None:
    class Drops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = nn.functional.dropout(x, 0.3)
            return y * (y == largest(y))

    items = [nn.Linear(6, 12), Drops(), nn.Linear(12, 3)]
    model = nn.Sequential(*items).double()
    X, Y = data(5)
    case = Case(model, squared_error, X.double(), Y.double())
    torch.manual_seed(3)
    found = case.infer("Strict", n=6)
    torch.manual_seed(3)
    masks = nn.functional.dropout(torch.ones(5, 12).double(), 0.3)

    class Dropped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * masks
            return y * (y == largest(y))

    model[1] = Dropped()
    expected = reference.strict(*case, 0.1, 6)
    assert_close(found.epsilon[1:], expected.epsilon[1:])
