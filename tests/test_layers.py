"""One call has the side effects of one forward pass, whatever the layers do."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from tests.cases import ERR_TYPES, RELAXED, Case, assert_close, check_against_reference
from torch2pc.graph.layer import Layer
from torch2pc.graph.network import Network
from torch2pc.graph.nodes import may_write_input

err_types = pytest.mark.parametrize("ErrType", ERR_TYPES)
relaxed = pytest.mark.parametrize("ErrType", RELAXED)


class RandomGain(nn.Module):
    """A user's module that draws random numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(x.shape[1:], dtype=x.dtype, device=x.device)


class Counter(nn.Module):
    """A user's module whose buffers count its evaluations, and whose output depends on them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("written", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("absent", None)

    def forward(self, x: Tensor) -> Tensor:
        self.written += 1
        self.replaced = self.replaced + 1
        return x * (1 + 0.1 * self.written + 0.2 * self.replaced)


def dense(*middle: nn.Module) -> Case:
    model = nn.Sequential(nn.Linear(4, 6), *middle, nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
    model.append(nn.Linear(6, 3))
    X, Y = torch.randn(8, 4).double(), torch.randn(8, 3).double()
    return Case(model.double(), nn.MSELoss(), X, Y)


def convolutional(*middle: nn.Module) -> Case:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), *middle, nn.Flatten(), nn.Linear(48, 3))
    X, Y = torch.randn(5, 1, 6, 6).double(), torch.randint(3, (5,))
    return Case(model.double(), nn.CrossEntropyLoss(), X, Y)


def after_one_pass(case: Case, seed: int = 1) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """What one forward and backward pass leaves: gradients, state, and the generator's state."""
    twin = case._replace(model=copy.deepcopy(case.model))
    twin.model.zero_grad()
    torch.manual_seed(seed)
    Loss = twin.LossFun(twin.model(twin.X), twin.Y)
    if Loss.requires_grad:
        Loss.backward()
    return twin.gradients(), twin.model.state_dict(), torch.get_rng_state()


RANDOM: list[Callable[[], Case]] = [
    lambda: dense(nn.Dropout()),
    lambda: dense(nn.Dropout(), nn.Dropout(0.2)),
    lambda: dense(nn.AlphaDropout()),
    lambda: dense(nn.RReLU()),
    lambda: dense(RandomGain()),
    lambda: dense(nn.Sequential(nn.Linear(6, 6), nn.Dropout(), nn.ReLU(), RandomGain())),
    lambda: convolutional(nn.Dropout2d()),
    lambda: convolutional(nn.FeatureAlphaDropout()),
    lambda: dense()._replace(LossFun=lambda yhat, Y: (yhat * torch.rand_like(yhat) - Y).norm()),
]


@err_types
@pytest.mark.parametrize("make", RANDOM)
def test_random_numbers_are_drawn_once(make: Callable[[], Case], ErrType: str) -> None:
    case = make()
    gradients, _, random = after_one_pass(case)
    torch.manual_seed(1)
    case.infer(ErrType)
    assert torch.equal(torch.get_rng_state(), random)
    if ErrType == "Exact":
        assert_close(case.gradients(), gradients)


@err_types
@pytest.mark.parametrize("make", RANDOM[:-1])
def test_one_mask_a_call(make: Callable[[], Case], ErrType: str) -> None:
    check_against_reference(make(), ErrType)


@torch.library.custom_op("torch2pc_tests::noisy", mutates_args=())
def noisy(x: Tensor) -> Tensor:
    """Draws, and does not say so, as operations that are none of PyTorch's may."""
    return x * torch.rand_like(x)


def _with_same_numbers(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(output / inputs[0])


noisy.register_autograd(
    lambda ctx, error: error * ctx.saved_tensors[0], setup_context=_with_same_numbers
)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.torch2pc_tests.noisy(x)


@err_types
def test_an_operation_of_the_users_own_may_draw(ErrType: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), Noisy(), nn.Tanh(), nn.Linear(5, 3)).double()
    X, Y = torch.randn(6, 4).double(), torch.randn(6, 3).double()
    check_against_reference(Case(model, nn.MSELoss(), X, Y), ErrType)


def test_a_random_loss_is_one_function_too() -> None:
    """With the same weights drawn in every iteration, Strict finds the minimum of its energy."""
    case = dense()._replace(
        LossFun=lambda yhat, Y: (torch.rand_like(yhat) * (yhat - Y).square()).sum()
    )
    result = case.infer("Strict", n=400, eta=0.2)
    again = case.infer("Strict", n=1, eta=0.2, vinit=result.v)
    assert not torch.equal(again.Loss, result.Loss)  # another call, other random numbers
    torch.manual_seed(2)
    long = case.infer("Strict", n=2000)
    torch.manual_seed(2)
    longer = case.infer("Strict", n=2100)
    assert_close(longer.v, long.v)


STATEFUL: list[Callable[[], Case]] = [
    lambda: dense(nn.BatchNorm1d(6)),
    lambda: dense(nn.BatchNorm1d(6, momentum=None), nn.ReLU()),
    lambda: convolutional(nn.BatchNorm2d(3)),
    lambda: convolutional(nn.InstanceNorm2d(3, track_running_stats=True, affine=True)),
    lambda: dense(parametrizations.spectral_norm(nn.Linear(6, 6))),
    lambda: dense(Counter()),
    lambda: dense(nn.Sequential(nn.Linear(6, 6), Counter(), nn.BatchNorm1d(6), nn.Dropout())),
    lambda: dense(*[nn.BatchNorm1d(6)] * 2),
]


@err_types
@pytest.mark.parametrize("n", [1, 100])
@pytest.mark.parametrize("make", STATEFUL)
def test_buffers_move_once(make: Callable[[], Case], ErrType: str, n: int) -> None:
    case = make()
    gradients, state, _ = after_one_pass(case)
    buffers = dict(case.model.named_buffers())
    torch.manual_seed(1)
    case.infer(ErrType, n=n)
    assert_close(case.model.state_dict(), state, tolerance=0)
    for name, buffer in case.model.named_buffers():
        assert buffer is buffers[name] or name.endswith("replaced")
    if ErrType == "Exact":
        assert_close(case.gradients(), gradients)


@err_types
@pytest.mark.parametrize("make", STATEFUL[:-1])
def test_buffers_are_found_as_they_were(make: Callable[[], Case], ErrType: str) -> None:
    check_against_reference(make(), ErrType)


@err_types
@pytest.mark.parametrize("make", [*STATEFUL[:5], *RANDOM])
def test_eval_mode_touches_nothing(make: Callable[[], Case], ErrType: str) -> None:
    case = make()
    case.infer("Exact")
    case.model.eval()
    _, before, _ = after_one_pass(case)
    case.infer(ErrType)
    assert_close(case.model.state_dict(), before, tolerance=0)
    assert not case.model.training


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_hook_based_spectral_norm() -> None:
    def make() -> Case:  # it cannot be copied after a forward pass
        torch.manual_seed(2)
        return dense(torch.nn.utils.spectral_norm(nn.Linear(6, 6)))

    for ErrType in ERR_TYPES:
        expected, case = make(), make()
        expected.LossFun(expected.model(expected.X), expected.Y).backward()
        case.infer(ErrType)
        assert_close(case.model.state_dict(), expected.model.state_dict(), tolerance=0)
        if ErrType == "Exact":
            assert_close(case.gradients(), expected.gradients())


IN_PLACE: list[tuple[Callable[[bool], nn.Module], str]] = [
    (lambda inplace: nn.ReLU(inplace), "own layer"),
    (lambda inplace: nn.Dropout(0.5, inplace), "own layer"),
    (lambda inplace: nn.Hardswish(inplace), "own layer"),
    (lambda inplace: nn.Sequential(nn.ReLU(inplace), nn.Linear(6, 6)), "first in a block"),
    (
        lambda inplace: nn.Sequential(nn.Sequential(nn.Identity(), nn.ELU(inplace=inplace))),
        "behind a view",
    ),
    (lambda inplace: nn.Sequential(nn.Flatten(), nn.SiLU(inplace)), "behind a view"),
    (
        lambda inplace: nn.Sequential(
            nn.Sequential(nn.Identity(), nn.Flatten()), nn.ELU(inplace=inplace)
        ),
        "behind views in a block",
    ),
]


def test_only_layers_that_may_write_into_their_input_are_given_copies() -> None:
    """Not those whose first operation makes a tensor of its own."""
    elu = nn.ELU(inplace=True)
    views, linear = nn.Sequential(nn.Identity(), nn.Flatten()), nn.Linear(6, 6)
    writing = [elu, nn.Sequential(views, elu), nn.Sequential(nn.Dropout(), nn.Sequential(elu))]
    others = [
        nn.ELU(),
        nn.Sequential(linear, elu),
        nn.Sequential(nn.Sequential(nn.Identity(), linear), elu),
        nn.Sequential(views),
    ]
    assert all(map(may_write_input, writing)) and not any(map(may_write_input, others))


@err_types
@pytest.mark.parametrize(("make", "where"), IN_PLACE)
@pytest.mark.parametrize("first", [True, False])
def test_in_place_layers(
    make: Callable[[bool], nn.Module], where: str, ErrType: str, first: bool
) -> None:
    found = []
    for inplace in (False, True):
        torch.manual_seed(3)
        items = [make(inplace), nn.Tanh(), make(inplace), nn.Identity(), make(inplace)]
        model = nn.Sequential(*items if first else items[1:]).double()
        case = Case(model, nn.MSELoss(), torch.randn(8, 6).double(), torch.randn(8, 6).double())
        X = case.X.clone()
        result = case.infer(ErrType)
        assert torch.equal(case.X, X)
        found.append([*result, case.gradients()])
    assert_close(found[1], found[0], tolerance=1e-12)


@err_types
def test_an_inplace_attribute_announces_a_write(ErrType: str) -> None:
    class Doubles(nn.Module):
        inplace = True

        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2)

    case = Case(
        nn.Sequential(nn.Tanh(), Doubles()), nn.MSELoss(), torch.ones(2, 3), torch.ones(2, 3)
    )
    result = case.infer(ErrType)
    assert_close(result.vhat[2], 2 * result.vhat[1], tolerance=0)


@err_types
def test_a_loss_that_writes_into_the_output_writes_into_a_copy(ErrType: str) -> None:
    case = dense()._replace(LossFun=lambda yhat, Y: yhat.sub_(Y).square().sum())
    plain = dense()._replace(LossFun=lambda yhat, Y: (yhat - Y).square().sum())
    plain.model.load_state_dict(case.model.state_dict())
    result, expected = case.infer(ErrType), plain._replace(X=case.X, Y=case.Y).infer(ErrType)
    assert_close(result.vhat, expected.vhat, tolerance=0)
    assert_close(result.epsilon[1:], expected.epsilon[1:])
    assert_close(case.gradients(), plain.gradients())


class Adds(nn.Module):
    """Uses a parameter that belongs to something else."""

    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__()
        self.parameter = (parameter,)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.parameter[0]


def twice() -> Case:
    layer = nn.Linear(6, 6)
    return dense(layer, nn.Tanh(), layer)


def tied() -> Case:
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    return dense(first, nn.Sigmoid(), second)


def frozen(*places: int) -> Case:
    case = dense(nn.Tanh(), nn.Linear(6, 6))
    for place in places:
        case.model[place].requires_grad_(False)
    return case


def subclass() -> Case:
    class Net(nn.Sequential):
        def __init__(self, *items: nn.Module) -> None:
            super().__init__(*items)
            self.shift = nn.Parameter(torch.randn(6).double())
            self.unused = nn.Parameter(torch.randn(6).double())

    case = dense()
    net = Net(*case.model)
    net.insert(1, Adds(net.shift))
    return case._replace(model=net)


PARAMETERS: list[Callable[[], Case]] = [
    twice,
    tied,
    lambda: frozen(0),
    lambda: frozen(2),
    lambda: frozen(4),
    lambda: frozen(0, 2, 3, 4),
    subclass,
    lambda: dense(parametrizations.weight_norm(nn.Linear(6, 6))),
    lambda: dense(parametrizations.orthogonal(nn.Linear(6, 6))),
]


@err_types
@pytest.mark.parametrize("make", PARAMETERS)
def test_parameters(make: Callable[[], Case], ErrType: str) -> None:
    case = make()
    gradients, state, _ = after_one_pass(case)
    case.infer(ErrType)
    found = case.gradients()
    # For every ErrType, a gradient is there where backward would leave one.
    assert {k for k, g in found.items() if g is None} == {
        k for k, g in gradients.items() if g is None
    }
    if ErrType == "Exact":
        assert_close(found, gradients)
    assert_close(case.model.state_dict(), state, tolerance=0)


@err_types
def test_model_without_parameters(ErrType: str) -> None:
    case = Case(
        nn.Sequential(nn.Tanh(), nn.Flatten()), nn.MSELoss(), torch.ones(2, 3), torch.zeros(2, 3)
    )
    case.X.requires_grad_()
    result = case.infer(ErrType)
    assert_close(case.X.grad, result.epsilon[0], tolerance=0)


@err_types
@pytest.mark.parametrize("make", [twice, tied])
def test_shared_parameters_against_the_reference(make: Callable[[], Case], ErrType: str) -> None:
    check_against_reference(make(), ErrType)


@relaxed
@pytest.mark.parametrize("make", [twice, tied, *RANDOM[:-1]])
def test_updates_at_vhat_against_the_reference(make: Callable[[], Case], ErrType: str) -> None:
    check_against_reference(make(), ErrType, update_at="vhat")


class Spread(nn.Module):
    """Of its gradients two are one tensor, and one is a number that is spread."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(8, 6))
        self.c = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return x.sin() + self.a + self.b + self.c.sum()


@err_types
def test_gradients_that_share_memory(ErrType: str) -> None:
    case = dense(Spread())
    check_against_reference(case, ErrType)
    addresses = {p.grad.data_ptr() for p in case.model.parameters()}
    assert len(addresses) == len([*case.model.parameters()])
    assert case.model[1].c.grad.is_contiguous()


class ScaledError(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7).double())
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, yhat: Tensor, Y: Tensor) -> Tensor:
        self.calls += 1
        return self.scale * (yhat - Y).square().mean()


@err_types
def test_loss_with_parameters_and_buffers(ErrType: str) -> None:
    case = dense()._replace(LossFun=ScaledError())
    result = case.infer(ErrType)
    output = case.model[-1](result.v[-2]) if ErrType in RELAXED else result.vhat[-1]
    assert_close(case.LossFun.scale.grad, (output - case.Y).square().mean().detach())
    assert case.LossFun.calls == 1
    case.infer(ErrType, update_at="vhat")
    assert_close(case.LossFun.scale.grad, (result.vhat[-1] - case.Y).square().mean())


@err_types
def test_loss_that_uses_the_parameters_of_the_model(ErrType: str) -> None:
    """A weight penalty is added to the update as it is, without FixedPred's factor."""
    plain = dense()
    model = copy.deepcopy(plain.model)

    def penalised(yhat: Tensor, Y: Tensor) -> Tensor:
        return plain.LossFun(yhat, Y) + 0.1 * sum(p.square().sum() for p in model.parameters())

    plain.infer(ErrType)
    plain._replace(model=model, LossFun=penalised).infer(ErrType)
    for p, q in zip(model.parameters(), plain.model.parameters(), strict=True):
        assert_close(p.grad, q.grad + 0.2 * p.detach())


@err_types
def test_sparse_gradients_stay_sparse(ErrType: str) -> None:
    embedding = nn.Embedding(7, 4, sparse=True)
    model = nn.Sequential(embedding, nn.Flatten(), nn.Linear(12, 2)).double()
    case = Case(model, nn.MSELoss(), torch.randint(7, (5, 3)), torch.randn(5, 2).double())
    case.infer(ErrType)
    once = embedding.weight.grad.to_dense()
    case.infer(ErrType, accumulate=True)
    assert embedding.weight.grad.is_sparse
    assert_close(embedding.weight.grad.to_dense(), 2 * once)


@err_types
def test_checkpointed_layer(ErrType: str) -> None:
    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    block = nn.Sequential(nn.Linear(6, 6), nn.Dropout(), nn.Tanh())
    case = dense(Checkpointed(*block))
    plain = case._replace(model=copy.deepcopy(case.model))
    plain.model[1] = copy.deepcopy(block).double()
    for each in (case, plain):
        torch.manual_seed(1)
        each.infer(ErrType)
    assert_close(list(case.gradients().values()), list(plain.gradients().values()))


@err_types
def test_target_that_requires_grad(ErrType: str) -> None:
    case = dense()
    case.Y.requires_grad_()
    result = case.infer(ErrType)
    if ErrType not in RELAXED:
        assert_close(case.Y.grad, -result.dLdy)
    assert case.Y.grad is not None


@err_types
def test_layer_cut_off_from_its_input(ErrType: str) -> None:
    """As with backward: what lies below a detach gets no gradient; its error is zero."""

    class Detach(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach()

    case = dense(Detach())
    result = case.infer(ErrType)
    assert not result.epsilon[1].any()
    of_first = case.model[0].weight.grad
    assert of_first is None if ErrType not in RELAXED else not of_first.any()


def count_hooks(module: nn.Module) -> list[str]:
    fired: list[str] = []
    module.register_forward_pre_hook(lambda *_: fired.append("pre"))
    module.register_forward_hook(lambda *_: fired.append("forward"))
    module.register_full_backward_hook(lambda *_: fired.append("backward"))
    return fired


@pytest.mark.parametrize("ErrType", ["Exact", "FixedPred"])
def test_module_hooks_fire_once(ErrType: str) -> None:
    case = dense()
    case.X.requires_grad_()  # or else PyTorch warns that the first layer's hook sees no input
    fired = [count_hooks(module) for module in case.model.modules()]
    case.infer(ErrType)
    assert all(sorted(each) == ["backward", "forward", "pre"] for each in fired)


@err_types
def test_hooks_of_the_model_are_told_which_module_it_is(ErrType: str) -> None:
    case = dense()
    case.X.requires_grad_()
    told: list[tuple[str, nn.Module]] = []
    model = case.model
    model.register_forward_pre_hook(lambda m, x: told.append(("pre", m)))
    model.register_forward_pre_hook(lambda m, x, kw: told.append(("pre", m)), with_kwargs=True)
    model.register_forward_hook(lambda m, x, y: told.append(("forward", m)), always_call=True)
    model.register_forward_hook(lambda m, x, kw, y: told.append(("forward", m)), with_kwargs=True)
    model.register_full_backward_pre_hook(lambda m, g: told.append(("backward", m)))
    model.register_full_backward_hook(lambda m, g, h: told.append(("backward", m)))
    case.infer(ErrType)
    # The others have no backward pass through the model.
    expected = ["pre", "pre", "forward", "forward"]
    expected += ["backward"] * 2 * (ErrType not in RELAXED)
    assert [name for name, _ in told] == expected
    assert all(module is model for _, module in told)
    assert "forward" not in vars(model)


@relaxed
def test_hooks_of_the_model_itself_fire_once(ErrType: str) -> None:
    case = dense()
    case.X.requires_grad_()
    of_model, of_layer = count_hooks(case.model), count_hooks(case.model[1])
    case.infer(ErrType, n=5)
    assert of_model.count("pre") == of_model.count("forward") == 1
    assert of_layer.count("forward") > 1


@err_types
def test_hooks_may_change_values(ErrType: str) -> None:
    """A hook of a layer belongs to its function; a pre-hook of the model to its input."""
    plain = dense()
    hooked = plain._replace(model=copy.deepcopy(plain.model))
    hooked.model[1].register_forward_hook(lambda module, inputs, output: output * 2)
    hooked.model.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    plain.model[1] = nn.Sequential(plain.model[1], Twice())
    expected = plain._replace(X=plain.X + 1).infer(ErrType)
    found = hooked.infer(ErrType)
    assert_close(found.v[1:], expected.v[1:])
    assert_close(list(hooked.gradients().values()), list(plain.gradients().values()))


@err_types
def test_a_hook_that_makes_the_output_none_is_named(ErrType: str) -> None:
    case = dense()
    case.model.register_forward_hook(lambda module, inputs, output: (output,))
    with pytest.raises(TypeError, match="model must return a tensor, but a hook made it tuple"):
        case.infer(ErrType)


@relaxed
def test_a_hook_that_replaces_the_output_of_the_model(ErrType: str) -> None:
    case = dense()
    case.model.register_forward_hook(lambda module, inputs, output: output * 2)
    gradients, _, _ = after_one_pass(case)
    case.infer("Exact")
    assert_close(case.gradients(), gradients)
    with pytest.raises(ValueError, match="model must have no forward hook that replaces"):
        case.infer(ErrType)


@err_types
def test_hooks_of_parameters(ErrType: str) -> None:
    """Post-accumulate hooks run once, when ``.grad`` is there; tensor hooks change the update."""
    case = dense()
    case.infer(ErrType)
    expected = case.model[0].weight.grad.clone()
    seen = []
    case.model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    case.model[0].weight.register_hook(lambda g: 3 * g)
    case.infer(ErrType)
    assert len(seen) == 1
    assert_close(seen[0], 3 * expected)
    assert_close(case.model[0].weight.grad, 3 * expected)
    # One may take the step itself, as in ``backward()``.
    bias, before = case.model[0].bias, case.model[0].bias.detach().clone()
    bias.register_post_accumulate_grad_hook(lambda p: p.sub_(p.grad))
    case.infer(ErrType)
    assert_close(bias.detach(), before - bias.grad)


def test_a_tensor_hook_may_return_a_tensor_of_its_own() -> None:
    case = dense()
    mine = torch.ones_like(case.model[0].weight)
    case.model[0].weight.register_hook(lambda g: mine)
    case.infer("FixedPred")
    assert torch.equal(mine, torch.ones_like(mine))


class RaisesInCall(nn.Module):
    """Raises when it is evaluated the k-th time, having changed all that it can."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k, self.calls = k, 0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        self.calls += 1
        self.count += 1
        self.eval()
        torch.rand(3)
        if self.calls == self.k:
            raise KeyError("the k-th call")
        return x if not others else x.square().sum()


def check_nothing_changed(case: Case, call: Callable[[], Any]) -> None:
    case.model[0].weight.requires_grad_(False)
    case.model.register_parameter("unused", nn.Parameter(torch.ones(1)))
    for parameter in case.model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    before = copy.deepcopy(case.model.state_dict())
    buffers = dict(case.model.named_buffers())
    gradients = case.gradients()
    random = torch.get_rng_state()
    with pytest.raises(KeyError, match="the k-th call"):
        call()
    assert torch.equal(torch.get_rng_state(), random)
    assert_close(case.model.state_dict(), before, tolerance=0)
    assert dict(case.model.named_buffers()) == buffers
    assert all(module.training for module in case.model.modules())
    for name, parameter in case.model.named_parameters():
        assert parameter.grad is gradients[name] and (parameter.grad == 7).all()
        assert parameter.requires_grad == (name != "0.weight")
    assert "forward" not in vars(case.model)


# The relaxations evaluate a layer in the feed-forward pass, once more to check what it recorded there, and
# for its update if it has parameters; the loss in each iteration.
@pytest.mark.parametrize(
    ("where", "ErrType", "k"),
    [
        *itertools.product(
            ["layer", "forward hook", "pre-hook", "loss"], ["Exact", "FixedPred"], [1]
        ),
        *itertools.product(["layer"], RELAXED, [1, 2]),
        *itertools.product(["forward hook", "pre-hook"], RELAXED, [1, 2, 3]),
        *itertools.product(["loss"], RELAXED, [1, 2, 4, 5]),
    ],
)
def test_failure_changes_nothing(where: str, ErrType: str, k: int) -> None:
    raises = RaisesInCall(k)
    case = dense(nn.BatchNorm1d(6), nn.Dropout(), raises if where == "layer" else Counter())
    if where == "loss":
        case = case._replace(LossFun=raises)
    elif where == "forward hook":
        case.model[4].register_forward_hook(lambda module, inputs, output: raises(output))
    elif where == "pre-hook":
        case.model[4].register_forward_pre_hook(lambda module, inputs: raises(inputs[0]))
    check_nothing_changed(case, lambda: case.infer(ErrType, n=6))
    assert raises.calls == k


@err_types
@pytest.mark.parametrize("accumulate", [False, True])
def test_failing_hooks_of_parameters_change_nothing(ErrType: str, accumulate: bool) -> None:
    def fails(_: Tensor) -> None:
        raise KeyError("the k-th call")

    case = dense(nn.BatchNorm1d(6))
    case.model[1].weight.register_post_accumulate_grad_hook(fails)
    check_nothing_changed(case, lambda: case.infer(ErrType, accumulate=accumulate))
    case = dense(nn.BatchNorm1d(6))
    case.model[1].weight.register_hook(fails)
    check_nothing_changed(case, lambda: case.infer(ErrType, accumulate=accumulate))


def test_lazy_layers() -> None:
    for ErrType in ERR_TYPES:
        model = nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.Linear(5, 2))
        Case(model, nn.MSELoss(), torch.randn(4, 3), torch.randn(4, 2)).infer(ErrType)
        assert model[0].weight.grad.shape == (5, 3)
        assert model[1].num_batches_tracked == 1


def test_graphs_are_freed_before_the_next_one() -> None:
    """Strict holds one layer's graph at a time, besides that of layer 1, which it needs again."""
    alive = 0
    most = 0

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            ctx.token = Token()
            return 2 * x

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * g

    class Token:
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    class Marks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Marked.apply(x)

    blocks = [nn.Sequential(nn.Linear(3, 3), Marks()) for _ in range(6)]
    case = Case(nn.Sequential(*blocks), nn.MSELoss(), torch.randn(2, 3), torch.randn(2, 3))
    # The first call holds what it records against another evaluation.
    case.infer("Strict", n=8)
    most = 0
    case.infer("Strict", n=8)
    assert alive == 0
    assert most == 2
    # Nothing needs layer 1's gradient any more.
    case.model[0].requires_grad_(False)
    most = 0
    case.infer("Strict", n=8)
    assert alive == 0
    assert most == 1


def test_layers_are_named_in_errors() -> None:
    network = Network(nn.Sequential(nn.Linear(2, 2)), nn.MSELoss(), torch.ones(1, 2), None)
    assert [layer.name for layer in [*network.layers, network.loss]] == [
        "model[0] (Linear)",
        "LossFun (MSELoss)",
    ]
    assert Layer(torch.tanh, "LossFun", set()).name == "LossFun (tanh)"
