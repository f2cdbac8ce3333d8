"""Recording a layer's operations: what is covered, and what must never be used silently."""

from __future__ import annotations

import copy
import ctypes
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests import reference
from tests.cases import Case, Does, assert_close, check_against_reference
from torch2pc import PCInfer, displacement_rule
from torch2pc.displacement.lines import Displacement
from torch2pc.displacement.recorder import Recorder, Uncovered
from torch2pc.displacement.rules import PREPARED, Rule, Step
from torch2pc.graph.apart import until_guarded
from torch2pc.graph.layer import Layer
from torch2pc.graph.network import Network
from torch2pc.inference.strict import strict


def layers_of(case: Case) -> list[Layer]:
    """The model's layers, recorded."""

    def attempt() -> list[Layer]:
        network = Network(case.model, case.LossFun, case.X, case.Y)
        strict(network, 0.1)
        return network.layers

    return until_guarded(attempt)


def around(item: nn.Module, width: int = 6) -> Case:
    model = nn.Sequential(nn.Linear(4, width), item, nn.Linear(width, 3)).double()
    return Case(model, nn.MSELoss(), torch.randn(5, 4).double(), torch.randn(5, 3).double())


def branches_on_values(x: Tensor) -> Tensor:
    return 2 * x if x.detach().sum() > -1e9 else x


def branches_on_a_list(x: Tensor) -> Tensor:
    return 2 * x if x.tolist()[0][0] > -1e9 else x


def writes_through_a_view(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 1] = x[:, 0]
    return y


def writes_and_reads_under_two_names(x: Tensor) -> Tensor:
    y = x * 2
    first = y[:, :1]
    y.add_(x)
    return y + first


def returns_another_name(x: Tensor) -> Tensor:
    y = x * 2
    other = y.view_as(y)
    y.add_(x)
    return other


def writes_into_an_argument(x: Tensor) -> Tensor:
    y = x.detach() * 2
    torch.add(y, 1, out=y)
    return x.sin() + y


def leaves_torch(x: Tensor) -> Tensor:
    class Outside(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return torch.from_numpy(x.detach().numpy() ** 2)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * g * ctx.saved_tensors[0]

    return Outside.apply(x)


def draws_from_its_input(x: Tensor) -> Tensor:
    return x * torch.bernoulli(x.detach().sigmoid())


def has_another_gradient(x: Tensor) -> Tensor:
    """Straight through: rounds, with the gradient of not rounding."""
    return x + (torch.round(4 * x) / 4 - x).detach()


def as_many_as_there_are(x: Tensor) -> Tensor:
    return x * x[x > 0].mean()


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -g


def is_conditional(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > -1e9, lambda x: x.sin(), lambda x: x.cos(), (x,))


def uses_what_it_changes(x: Tensor) -> Tensor:
    unit = torch.ones_like(x)
    y = x + torch.div(x.detach(), unit, rounding_mode="floor")
    unit.add_(1)
    return y


def compares_with_what_it_changes(x: Tensor) -> Tensor:
    bias = torch.ones_like(x)
    y = x + bias
    bias.add_(1)
    return y * (y == y.amax(1, keepdim=True))


def changes_what_it_compared(x: Tensor) -> Tensor:
    y = torch.native_dropout(x, 0.3, True)[0]
    largest = y == y.amax(1, keepdim=True)
    return y.add_(1) * largest


UNCOVERED = {
    "changes a divisor": (uses_what_it_changes, "that the layer used was changed afterwards"),
    "changes a term": (compares_with_what_it_changes, "that the layer used was changed afterwards"),
    "changes what is compared": (changes_what_it_compared, "used was changed afterwards"),
    "branches on values": (branches_on_values, "a Python number is taken"),
    "writes through a view": (writes_through_a_view, "writes into a part of a tensor"),
    "two names": (writes_and_reads_under_two_names, "changed through another name"),
    "output of two names": (returns_another_name, "the output was changed through another name"),
    "out=": (writes_into_an_argument, "writes into one of its arguments"),
    "leaves torch": (leaves_torch, "is read outside PyTorch"),
    "Python numbers": (branches_on_a_list, "is read outside PyTorch"),
    "draws from its input": (draws_from_its_input, "draws random numbers"),
    "as many as there are": (as_many_as_there_are, "the shape of what aten.index.Tensor returns"),
}


@pytest.mark.parametrize("name", UNCOVERED)
def test_what_is_not_covered_is_evaluated_again(name: str) -> None:
    function, reason = UNCOVERED[name]
    case = around(Does(function))
    layers = layers_of(case)
    assert reason in layers[1].uncovered
    assert layers[0].uncovered is layers[2].uncovered is None
    check_against_reference(case, "Strict")


def test_a_hook_that_changes_gradients_is_not_left_out() -> None:
    """Also where it comes after the layer was found to be right without."""
    case = around(nn.Tanh())
    case.infer("Strict")
    case.model[1].register_full_backward_hook(lambda module, inputs, outputs: (3 * inputs[0],))
    check_against_reference(case, "Strict")
    layer = layers_of(case)[1]
    assert (layer.uncovered, layer.own_backward) == (None, "a module has a backward hook")


def test_a_tensor_hook_is_not_left_out() -> None:
    triples = False

    def hooked(x: Tensor) -> Tensor:
        y = x.sin()
        if triples and y.requires_grad:
            y.register_hook(lambda g: 3 * g)
        return y.cos()

    case = around(Does(hooked))
    case.infer("Strict")
    triples = True
    assert layers_of(case)[1].own_backward == "a tensor has a backward hook"
    check_against_reference(case, "Strict")


class Copied(torch.autograd.Function):
    """Works on memory, as kernels in other languages do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        found = torch.empty_like(x)
        ctypes.memmove(found.data_ptr(), x.data_ptr(), x.nbytes)
        return found

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def test_a_kernel_is_not_taken_for_a_constant() -> None:
    """Also where it comes after the layer was found to be right without."""
    copies = False

    def works_on_memory(x: Tensor) -> Tensor:
        return (Copied.apply(x) if copies else x).sin() + x

    case = around(Does(works_on_memory))
    case.infer("Strict")
    copies = True
    check_against_reference(case, "Strict")
    assert "a forward of its own computes cannot be followed" in layers_of(case)[1].uncovered


def test_what_is_changed_after_its_use_is_not_used_as_it_is_then() -> None:
    """Also where it comes after the layer was found to be right without."""
    changes = False

    def rounds(x: Tensor) -> Tensor:
        unit = torch.full_like(x, 0.5)
        y = x + torch.div(x.detach(), unit, rounding_mode="floor")
        if changes:
            unit.add_(1)
        return y

    case = around(Does(rounds))
    case.infer("Strict")
    changes = True
    check_against_reference(case, "Strict")
    assert "changed afterwards" in layers_of(case)[1].uncovered


def test_hooks_that_change_outputs_and_inputs_are_recorded() -> None:
    case = around(nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
    case.infer("Strict")
    case.model[1].register_forward_hook(lambda module, inputs, output: output * 2)
    case.model[1][0].register_forward_pre_hook(lambda module, inputs: (inputs[0].sin(),))
    check_against_reference(case, "Strict")
    assert layers_of(case)[1].uncovered is None


def test_a_module_that_changes_is_recorded_anew() -> None:
    """Each call records what it computes: nothing of an earlier call can be used."""
    case = around(Does(lambda x: x.tanh()))
    for function in (lambda x: x.sin(), lambda x: x * x, lambda x: x * 3, lambda x: x * 5):
        case.infer("Strict")
        case.model[1].function = function
        check_against_reference(case, "Strict")


@pytest.mark.parametrize(
    "item",
    [
        nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Dropout(0.3)),
        Does(has_another_gradient),
        Does(lambda x: x.clone().sub_(1).mul_(x).abs_()),
        Does(lambda x: torch.zeros_like(x).add_(x).exp_()),
        Does(lambda x, f: checkpoint(f, x, use_reentrant=False), nn.Linear(6, 6)),
        Does(lambda x, f: x + f(x), nn.Sequential(nn.Linear(6, 6), nn.GELU())),
        Does(lambda x: x),
        Does(lambda x: x.view(5, 2, 3).transpose(1, 2).reshape(5, 6)),
        Does(lambda x: torch.ones_like(x)),
        Does(lambda x: x.detach() * x),
        Does(lambda x: torch.nn.functional.dropout(x, 0.5) * torch.rand(6)),
        Does(lambda x: (x > 0).double() * x),
        Does(lambda x: x * x.argmax(1, keepdim=True)),
        Does(lambda x: torch.sort(x, 1)[0]),
        Does(lambda x, f: x.sin() + f(x.argmax(1)), nn.Embedding(6, 6)),
        Does(lambda x: torch.fft.rfft(x).abs().repeat(1, 2)[:, :6]),
        nn.BatchNorm1d(6, momentum=None),
        nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)),
        nn.utils.parametrizations.orthogonal(nn.Linear(6, 6)),
    ],
    ids=repr,
)
def test_is_the_iteration_whatever_the_item_does(item: nn.Module) -> None:
    check_against_reference(around(copy.deepcopy(item)), "Strict", n=10)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules() -> None:
    case = around(nn.Identity())
    plain = nn.Sequential(nn.Linear(6, 6), nn.Tanh()).double()
    case.model[1] = torch.jit.trace(plain, torch.ones(5, 6).double())
    expected = reference.strict(*case, 0.1, 10)
    assert_close(case.infer("Strict", n=10).epsilon[1:], expected.epsilon[1:])
    assert layers_of(case)[1].uncovered is None


def test_what_the_user_compiles_is_recorded_and_stays_compiled() -> None:
    case = around(nn.Identity())
    block = nn.Sequential(nn.Linear(6, 6), nn.Tanh()).double()
    runs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        runs.append(graph)
        return graph.forward

    case.model[1] = torch.compile(block, backend=backend)
    expected = reference.strict(*around_with(case, block), 0.1, 10)
    assert_close(case.infer("Strict", n=10).epsilon[1:], expected.epsilon[1:])
    assert layers_of(case)[1].uncovered is None
    # The update is computed by what was compiled.
    assert runs


def test_a_conditional_operation_works_as_before() -> None:
    case = around(Does(is_conditional))
    expected = reference.strict(*around_with(case, torch.sin), 0.1, 10)
    assert_close(case.infer("Strict", n=10).epsilon[1:], expected.epsilon[1:])


def around_with(case: Case, function: Callable[[Tensor], Tensor]) -> Case:
    return case._replace(model=nn.Sequential(case.model[0], Does(function), case.model[2]))


def test_nothing_is_kept_between_calls_and_no_garbage_is_made() -> None:
    case = around(nn.Sequential(nn.Conv1d(6, 6, 1), nn.MaxPool1d(1), nn.Flatten()))
    case.model.insert(1, nn.Unflatten(1, (6, 1)))
    case.infer("Strict")
    gc.collect()
    gc.disable()
    try:
        case.infer("Strict")
        assert gc.collect() == 0
    finally:
        gc.enable()
    model = weakref.ref(case.model)
    item = weakref.ref(case.model[2])
    del case
    gc.collect()
    assert model() is item() is None


class Versine(nn.Module):
    """1 - cos(x), whose operations subtract nearly equal numbers around 0."""

    def forward(self, x: Tensor) -> Tensor:
        return 1 - torch.cos(x)


class ShiftedVersine(Versine):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@pytest.fixture
def versine_rule() -> Any:
    plain = Versine.forward
    uses = []

    @displacement_rule(Versine)
    def versine(module: Versine, a: Tensor, d: Tensor) -> Tensor:
        uses.append(type(module))
        return 2 * torch.sin(a + d / 2) * torch.sin(d / 2)

    yield uses
    Versine.forward = plain


def test_a_rule_of_the_users_own_is_used(versine_rule: list[type]) -> None:
    case = around(nn.Sequential(nn.Linear(6, 6), Versine(), nn.Tanh()))
    check_against_reference(case, "Strict")
    assert set(versine_rule) == {Versine}
    # Outside Strict the module is what it was.
    versine_rule.clear()
    case.infer("Exact")
    assert not versine_rule
    assert_close(Versine()(case.X), 1 - torch.cos(case.X))


def test_a_wrong_rule_of_the_users_is_not_used(versine_rule: list[type]) -> None:
    plain = Versine.forward

    @displacement_rule(Versine)
    def wrong(module: Versine, a: Tensor, d: Tensor) -> Tensor:
        return 3 * torch.sin(a + d / 2) * torch.sin(d / 2)

    try:
        case = around(Versine())
        assert "its operations alone" in layers_of(case)[1].uncovered
        check_against_reference(case, "Strict")
    finally:
        Versine.forward = plain


def test_an_error_in_a_rule_of_the_users_is_shown(versine_rule: list[type]) -> None:
    plain = Versine.forward

    @displacement_rule(Versine)
    def broken(module: Versine, a: Tensor, d: Tensor) -> Tensor:
        raise ZeroDivisionError("in the rule")

    try:
        with pytest.raises(ZeroDivisionError, match="in the rule"):
            around(Versine()).infer("Strict")
    finally:
        Versine.forward = plain


@pytest.mark.parametrize("at", ["preparation", "forward", "backward"])
def test_an_error_in_a_rule_of_ours_is_no_error_of_the_users(
    at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise IndexError("a case that was not thought of")

    def passes(d: Tensor) -> tuple[Tensor, None]:
        return d, None

    def prepare(call: Any) -> Step:
        if at == "preparation":
            fails()
        forward, backward = (fails, fails) if at == "forward" else (passes, fails)
        return Step(Rule(forward, backward), (call.args[0],))

    monkeypatch.setitem(PREPARED, torch.ops.aten.sin.default, prepare)
    case = around(Does(torch.sin))
    check_against_reference(case, "Strict")
    assert layers_of(case)[1].uncovered


def test_subclasses_that_do_more_are_recorded(versine_rule: list[type]) -> None:
    check_against_reference(around(ShiftedVersine()), "Strict")
    # Its own forward calls the one with the rule.
    assert set(versine_rule) == {ShiftedVersine}


@pytest.mark.parametrize(
    "kind", [int, 3, Versine(), type("Same", (Versine,), {}), type("Other", (), {"forward": None})]
)
def test_a_rule_needs_a_module_with_a_forward_of_its_own(kind: Any) -> None:
    with pytest.raises(TypeError, match=r"kind must be a subclass of nn\.Module with a forward"):
        displacement_rule(kind)


def test_a_module_with_a_rule_works_in_a_thread_that_records_nothing(
    versine_rule: list[type],
) -> None:
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(Versine()(torch.zeros(2))))
    thread.start()
    thread.join()
    assert torch.equal(found[0], torch.zeros(2))


def test_recording_in_one_thread_leaves_the_others_alone() -> None:
    cases = [around(nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.LayerNorm(6))) for _ in range(4)]
    expected = [copy.deepcopy(case).infer("Strict") for case in cases]
    found: list[Any] = [None] * 4

    def run(k: int) -> None:
        for _ in range(5):
            found[k] = cases[k].infer("Strict")

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, expected, strict=True):
        assert_close(list(one), list(other), tolerance=1e-12)
    # Nor is anything left behind: what is compiled from now on runs compiled.
    backend_runs = []
    doubled = torch.compile(
        lambda x: 2 * x, backend=lambda graph, _: backend_runs.append(1) or graph
    )
    doubled(torch.ones(2))
    assert backend_runs


def test_tensors_that_are_overwritten_are_no_one_elses() -> None:
    """A displacement leaves its argument, and the error it is given, as they were."""
    item = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.ReLU())
    x = torch.randn(3, 2, 4, 4, requires_grad=True)
    recorder = Recorder(x)
    with recorder:
        output = item(x)
    recorded = recorder.displacement(output)
    delta, e = torch.randn_like(x), torch.randn_like(output)
    given = delta.clone(), e.clone()
    with torch.no_grad():
        for _ in range(2):
            moved, saved = recorded.forward(delta)
            (back,) = recorded.backward(saved, e)
            assert torch.equal(delta, given[0])
            assert torch.equal(e, given[1])
    y = (x + delta).detach().requires_grad_()
    (expected,) = torch.autograd.grad(item(y), y, e)
    assert_close(moved, (item(y) - output).detach(), 1e-5)
    assert_close(back, expected, 1e-5)


def test_an_output_that_is_no_recorded_tensor_is_uncovered() -> None:
    x = torch.randn(3, requires_grad=True)
    recorder = Recorder(x)
    with recorder:
        y = x.sin()
    with pytest.raises(Uncovered, match="under another name"):
        recorder.displacement(y.detach())
    assert isinstance(recorder.displacement(y), Displacement)


def test_integers_are_embedded_by_the_first_layer() -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Embedding(9, 6), nn.Flatten()),
        nn.Linear(24, 5),
        nn.Tanh(),
        nn.Linear(5, 3),
    ).double()
    X, Y = torch.randint(9, (5, 4)), torch.randn(5, 3).double()
    expected = reference.strict(model, nn.MSELoss(), X, Y, 0.1, 10)
    PCInfer(model, nn.MSELoss(), X, Y, "Strict", n=10)
    assert_close({p: p.grad for p in model.parameters()}, expected.updates)
