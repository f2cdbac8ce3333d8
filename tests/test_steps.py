"""Step rules against naive ones, and what a call may do with a rule."""

from __future__ import annotations

import itertools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import reference
from tests.cases import Case, assert_close, cases, squared_error, tanh_chain
from torch2pc import PCGraph, PCInfer, PCInferLatent, follow, follow_latent, steps


def adam(x: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(x, lr=0.05)


# For each rule, the naive one.
RULES: dict[str, tuple[Callable[[str], steps.Rule], Callable[[], reference.Step]]] = {
    "descent": (lambda s: steps.Descent(0.2, s), lambda: reference.Step(0.2)),
    "momentum": (
        lambda s: steps.Momentum(0.1, 0.7, sweep=s),
        lambda: reference.MomentumStep(0.1, 0.7, False),
    ),
    "nesterov": (
        lambda s: steps.Momentum(0.1, 0.7, nesterov=True, sweep=s),
        lambda: reference.MomentumStep(0.1, 0.7, True),
    ),
    "halving": (
        lambda s: steps.Halving(3.0, 0.6, sweep=s),
        lambda: reference.HalvingStep(3.0, 0.6),
    ),
    "adam": (lambda s: steps.Optim(adam, sweep=s), lambda: reference.AdamStep(0.05)),
}

# Steps that are too long enlarge the round-off of the naive ones. Adam's first one is as long as eta
# whatever the gradient is, if only it is round-off.
TOLERANCE = {"halving": 1e-6, "adam": 1e-5}


@pytest.mark.parametrize(
    "text",
    [
        "Descent(eta=0.5)",
        'Descent(eta=0.5, sweep="down")',
        'Momentum(eta=0.1, mu=0.9, nesterov=True, sweep="down")',
        "Halving(eta=1.0, factor=0.5)",
        "Langevin(eta=0.1, temperature=2.0)",
    ],
)
def test_a_rule_shows_how_it_was_made(text: str) -> None:
    assert repr(eval(text, vars(steps))) == text


@pytest.mark.parametrize("name", RULES)
@given(case=cases(max_layers=4, smooth=True), n=st.integers(1, 6), down=st.booleans())
def test_strict_equals_the_naive_rule(name: str, case: Case, n: int, down: bool) -> None:
    make, naive = RULES[name]
    tolerance = TOLERANCE.get(name, 1e-8)
    v, epsilon = reference.strict_by(*case, naive(), n, down)
    result = case.infer("Strict", eta=make("down" if down else "together"), n=n)
    if not all([v_l.isfinite().all() and v_l.abs().max() < 1e3 for v_l in v]):
        return
    assert_close(result.v, v, tolerance)
    assert_close(result.epsilon[1:], epsilon[1:], tolerance)
    updates = reference.parameter_updates(case.model, v, epsilon)
    found = {p: p.grad for p in case.model.parameters() if p.grad is not None}
    assert_close(found, updates, tolerance)


@pytest.mark.parametrize("name", RULES)
@given(case=cases(max_layers=4, smooth=True), n=st.integers(1, 6))
def test_error_based_equals_the_naive_rule(name: str, case: Case, n: int) -> None:
    make, naive = RULES[name]
    tolerance = TOLERANCE.get(name, 1e-8)
    expected = reference.error_based_by(*case, naive(), n)
    result = case.infer("ErrorBased", eta=make("together"), n=n)
    if not all([v_l.isfinite().all() and v_l.abs().max() < 1e3 for v_l in expected.v]):
        return
    assert_close(result.v, expected.v, tolerance)
    assert_close(result.epsilon[1:], expected.epsilon[1:], tolerance)


@pytest.mark.parametrize("name", RULES)
@given(case=cases(max_layers=4, smooth=True), n=st.integers(1, 5), down=st.booleans())
def test_latents_follow_the_naive_rule(name: str, case: Case, n: int, down: bool) -> None:
    """With the input's belief as a layer's that nothing predicts."""
    make, naive = RULES[name]
    v, step = reference.feed_forward(case.model, case.X)[:-1], naive()

    def prior(v: list[Tensor]) -> Tensor:
        return 0.1 * v[0].square().sum()

    def F(v: list[Tensor]) -> Tensor:
        pi = [2.0] * (len(case.model) - 1)
        return reference.latent_energy(case.model, case.LossFun, case.Y, v, pi, prior)

    def gradients(v: list[Tensor]) -> tuple[Tensor, ...]:
        free = [x.detach().requires_grad_() for x in v]
        return torch.autograd.grad(F(free), free)

    step.end(F(v).detach())
    for _ in range(n):
        if down:
            before = v  # the prior's gradient is taken first, at the beliefs before the sweep
            for l in range(len(v) - 1, -1, -1):
                late = 0.2 * (before[0] - v[0]) if l == 0 else 0.0
                v = [*v[:l], step(l, v[l], gradients(v)[l] + late), *v[l + 1 :]]
        else:
            v = [step(l, x, g) for l, (x, g) in enumerate(zip(v, gradients(v), strict=True))]
        step.end(F(v).detach())
    result = PCInferLatent(
        case.model,
        case.LossFun,
        case.Y,
        case.X,
        make("down" if down else "together"),
        n,
        precision=2.0,
        prior=prior,
    )
    if all([v_l.isfinite().all() and v_l.abs().max() < 1e3 for v_l in v]):
        assert_close(result.v[:-1], v, TOLERANCE.get(name, 1e-8))


def test_one_sweep_down_with_eta_1_is_backpropagation() -> None:
    """Nothing below has moved when an error is taken."""
    case = tanh_chain()
    exact, gradients = case.infer("Exact").epsilon[1:], case.gradients()
    found = case.infer("Strict", eta=steps.Descent(1.0, sweep="down"), n=1, update_at="vhat")
    # A belief moves to the error that arrives; what is left there is minus its move.
    assert_close(found.epsilon[1:], exact)
    assert_close(case.gradients(), gradients)


@pytest.mark.parametrize("eta", [0.1, 0.5])
def test_an_error_gets_through_m_layers_at_a_share_of_eta_to_the_m(eta: float) -> None:
    """In the first sweep, in float32, down to layers where it is tiny."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Tanh(), nn.Linear(8, 8)) for _ in range(12)])
    case = Case(model, squared_error, torch.randn(4, 8), torch.randn(4, 8))
    g = case.infer("Exact").epsilon
    found = case.infer("Strict", eta=steps.Descent(eta, sweep="down"), n=1).epsilon
    for l in range(1, 13):
        assert_close(found[l] / eta ** (12 - l), g[l], 1e-5)


@pytest.mark.parametrize("name", [*RULES, "langevin"])
@pytest.mark.parametrize("ErrType", ["Strict", "ErrorBased"])
def test_a_rule_is_the_same_after_a_call(name: str, ErrType: str) -> None:
    case = tanh_chain()
    rule = (
        steps.Langevin(0.1, 0.1, torch.Generator().manual_seed(3))
        if name == "langevin"
        else RULES[name][0]("together")
    )
    before = dict(vars(rule))
    first = case.infer(ErrType, eta=rule, n=5)
    assert vars(rule) == before
    if name != "langevin":  # whose generator has been drawn from
        assert_close(list(case.infer(ErrType, eta=rule, n=5)), list(first), 0)


@pytest.mark.parametrize("sweep", ["together", "down"])
def test_plain_descent_is_the_number(sweep: str) -> None:
    case = tanh_chain()
    found = case.infer("Strict", eta=steps.Descent(0.2, sweep=sweep), n=7)
    expected = case.infer("Strict", eta=0.2, n=7)
    same = all([torch.equal(a, b) for a, b in zip(found.v, expected.v, strict=True)])
    assert same == (sweep == "together")
    case.infer("FixedPred", eta=steps.Descent(0.2), n=7)
    with pytest.raises(ValueError, match=r"eta must be .* for FixedPred"):
        case.infer("FixedPred", eta=steps.Descent(0.2, sweep="down"))


def test_a_step_that_raises_the_energy_is_kept_and_the_next_is_shorter() -> None:
    case = tanh_chain()
    record = follow(*case, "Strict", steps.Halving(4.0), n=40)
    assert record.rises_at == 1
    assert record.F[-1] < record.F[0]
    plain = follow(*case, "Strict", 4.0, n=1)
    assert record.F[1] == plain.F[1]  # kept
    assert record.converged


def test_round_off_does_not_shorten_the_steps_at_equilibrium() -> None:
    case = tanh_chain(torch.float32)
    taken: list[Any] = []

    class Watched(steps.Halving):
        def end(self) -> None:
            super().end()
            taken.append(float(self.eta))

    case.infer("Strict", eta=Watched(0.2), n=400)
    assert taken[-1] == pytest.approx(0.2)


# Samples.


def linear(batch: int) -> Case:
    """One hidden unit: F = (v - x)^2 / 2 + (2 v - y)^2 / 2 has the curvature 5 in v."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[1].weight.fill_(2.0)
    return Case(model, squared_error, torch.ones(batch, 1).double(), torch.ones(batch, 1).double())


@pytest.mark.parametrize("ErrType", ["Strict", "ErrorBased"])
@pytest.mark.parametrize("sweep", ["together", "down"])
def test_langevin_samples_the_energy(ErrType: str, sweep: str) -> None:
    if (ErrType, sweep) == ("ErrorBased", "down"):
        return
    eta, T, h = 0.1, 0.3, 5.0
    case = linear(40_000)
    rule = steps.Langevin(eta, T, torch.Generator().manual_seed(0), sweep)
    v = case.infer(ErrType, eta=rule, n=60).v[1]
    # The variance of v <- v - eta h (v - m) + sqrt(2 eta T) xi, with m = 3/5 at the minimum.
    assert float(v.mean()) == pytest.approx(0.6, abs=0.01)
    assert float(v.var()) == pytest.approx(T / (h * (1 - eta * h / 2)), rel=0.03)


def test_without_temperature_langevin_is_descent() -> None:
    case = tanh_chain()
    found = case.infer("Strict", eta=steps.Langevin(0.1, 0.0), n=9)
    assert_close(list(found), list(case.infer("Strict", eta=0.1, n=9)), 1e-12)


def test_noise_comes_of_one_number_of_the_generator() -> None:
    case = tanh_chain()
    rule = steps.Langevin(0.1, 0.5)
    torch.manual_seed(5)
    first = case.infer("Strict", eta=rule, n=4)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    torch.randint(2**62, ())
    assert torch.equal(after, torch.get_rng_state())
    torch.manual_seed(5)
    assert_close(list(case.infer("Strict", eta=rule, n=4)), list(first), 0)
    assert not torch.equal(case.infer("Strict", eta=rule, n=4).v[1], first.v[1])
    generator = torch.Generator().manual_seed(5)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    found = case.infer("Strict", eta=steps.Langevin(0.1, 0.5, generator), n=4)
    assert torch.equal(before, torch.get_rng_state())
    assert_close(list(found), list(first), 0)


def test_noise_is_new_in_each_iteration_where_layers_draw() -> None:
    """A layer that is evaluated again puts the generator back to where it was."""

    class Rough(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.dropout(x, 0.5)
            return x if x.sum().item() > 1e9 else 1.0 * x  # cannot be followed

    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(Rough(), nn.Linear(4, 4)), nn.Linear(4, 2))
    seen: list[Tensor] = []
    PCInfer(
        model,
        lambda y, Y: 0.0 * y.sum(),
        torch.randn(2, 3),
        None,
        "Strict",
        steps.Langevin(1e-6, 1e6),
        4,
        callback=lambda k, v, epsilon: seen.append(v[1].clone()),
    )
    moves = [b - a for a, b in itertools.pairwise(seen)]
    assert min([float((a - b).abs().max()) for a, b in itertools.pairwise(moves)]) > 0.1


# Elsewhere.


@pytest.mark.parametrize("name", RULES)
def test_follow_shows_the_iterations_of_the_call(name: str) -> None:
    case, rule = tanh_chain(), RULES[name][0]("together")
    record = follow(*case, "Strict", rule, 6)
    v = case.infer("Strict", eta=rule, n=6).v
    F = reference.energy(case.model, case.LossFun, case.Y, v)
    assert float(record.F[-1]) == pytest.approx(float(F), rel=1e-9)
    if name == "descent":
        assert record.rule is None
        assert record.stable_eta is not None
    else:
        assert record.rule == repr(rule)
        assert repr(rule) in str(record)
        assert record.eta is None
        assert record.stable_eta is None
        assert record.n_needed is None or record.converged
    assert str(pickle.loads(pickle.dumps(record))) == str(record)


def test_follow_draws_the_noise_of_the_call_and_puts_the_generator_back() -> None:
    case, generator = tanh_chain(), torch.Generator().manual_seed(2)
    rule = steps.Langevin(0.1, 0.5, generator)
    before = generator.get_state()
    record = follow(*case, "Strict", rule, 3)
    assert torch.equal(generator.get_state(), before)
    v = case.infer("Strict", eta=rule, n=3).v
    F = reference.energy(case.model, case.LossFun, case.Y, v)
    assert float(record.F[-1]) == pytest.approx(float(F), rel=1e-9)
    latent = follow_latent(case.model, case.LossFun, case.Y, case.X, steps.Momentum(0.1, 0.5), 3)
    assert latent.rule is not None


def test_on_a_graph_with_a_skip() -> None:
    """A sweep in sequence; and a step that begins with all is the chain's."""

    class Add(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    torch.manual_seed(0)
    model = PCGraph(
        a=(nn.Linear(3, 4), "x"),
        b=(nn.Sequential(nn.Tanh(), nn.Linear(4, 4)), "a"),
        c=(Add(), "a", "b"),
        out=(nn.Linear(4, 2), "c"),
    ).double()
    X, Y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    eta, v = 0.3, [None, *[x.detach() for x in _values(model, X)]]

    def F(v: list[Any]) -> Tensor:
        a, b, c = v[1:4]
        errors = [model.a(X) - a, model.b(a) - b, a + b - c]
        return sum([0.5 * e.square().sum() for e in errors]) + squared_error(model.out(c), Y)

    def gradient(i: int) -> Tensor:
        free = [x.detach().requires_grad_() for x in v[1:4]]
        return torch.autograd.grad(F([None, *free]), free)[i - 1]

    for _ in range(3):
        v[3] = v[3] - eta * gradient(3)
        # What the join's error hands to a is taken when c has moved and b has not.
        of_c = v[1] + v[2] - v[3]
        v[2] = v[2] - eta * gradient(2)
        v[1] = v[1] - eta * (gradient(1) - (v[1] + v[2] - v[3]) + of_c)
    found = PCInfer(model, squared_error, X, Y, "Strict", steps.Descent(eta, sweep="down"), 3)
    assert_close(found.v[1:4], v[1:4])


def _values(model: PCGraph, X: Tensor) -> list[Tensor]:
    a = model.a(X)
    b = model.b(a)
    return [a, b, a + b, model.out(a + b)]


def test_a_short_sweep_down_is_no_short_inference() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Tanh(), nn.Linear(4, 4)) for _ in range(8)])
    X, Y = torch.randn(2, 4), torch.randn(2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PCInfer(model, squared_error, X, Y, "Strict", steps.Descent(0.5, sweep="down"), 2)
    with pytest.warns(UserWarning, match="hardly reaches .* with eta=Momentum.* and n=2"):
        PCInfer(model, squared_error, X, Y, "Strict", steps.Momentum(0.5, 0.5), 2)


def test_half_precision() -> None:
    """Beliefs are float32 there, and so is what a rule keeps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 3)))
    X, Y = torch.randn(8, 4), torch.randn(8, 3)
    for make, _ in RULES.values():
        rule = make("together")
        results = []
        for enabled in (True, False):
            torch.manual_seed(3)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                results.append(PCInfer(model, squared_error, X, Y, "Strict", rule, 6).v[1])
        assert results[0].dtype == torch.float32
        assert_close(results[0], results[1], 0.1)


def test_a_rule_of_ones_own() -> None:
    class Clipped(steps.Rule):
        def move(self, i: int, parts: Any) -> None:
            gradient = sum([c * part for part, c in parts])
            self.x[i].sub_(gradient.clamp(-0.01, 0.01))

    class ClippedStep(reference.Step):
        def __call__(self, l: int, x: Tensor, gradient: Tensor) -> Tensor:
            return x - gradient.clamp(-0.01, 0.01)

    case = tanh_chain()
    v, epsilon = reference.strict_by(*case, ClippedStep(0.0), 5)
    found = case.infer("Strict", eta=Clipped(), n=5)
    assert_close(found.v, v)
    assert_close(found.epsilon[1:], epsilon[1:])


class Own(steps.Rule):
    def move(self, i: int, parts: Any) -> None: ...


def test_a_rule_of_ones_own_says_how_to_move_and_need_say_no_more() -> None:
    case = tanh_chain()
    with pytest.raises(NotImplementedError):
        case.infer("Strict", eta=steps.Rule(), n=1)
    with pytest.raises(NotImplementedError):
        steps.Rule().noise(case.X)
    still = case.infer("Strict", eta=Own(), n=3)
    assert_close(still.v, still.vhat, tolerance=0)
    assert repr(Own()) == "Own()" and Own().eta is None


BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: steps.Descent("auto"), TypeError, "eta must be a finite number, got str"),  # type: ignore[arg-type]
    (lambda: steps.Descent(float("inf")), ValueError, "eta must be a finite number, got inf"),
    (lambda: steps.Descent(0.1, "up"), ValueError, 'sweep must be "together" or "down", got'),
    (lambda: steps.Momentum(0.1, 1.0), ValueError, "mu must be a number >= 0 and < 1, got 1.0"),
    (lambda: steps.Momentum(0.1, -0.1), ValueError, "mu must be a number >= 0 and < 1"),
    (lambda: steps.Momentum(0.1, True), TypeError, "mu must be a number .* got bool"),
    (lambda: steps.Momentum(0.1, 0.5, 1), TypeError, "nesterov must be True or False, got int"),  # type: ignore[arg-type]
    (lambda: steps.Halving(0.1, 1.0), ValueError, "factor must be a number > 0 and < 1, got 1.0"),
    (lambda: steps.Halving(0.1, 0), ValueError, "factor must be a number > 0 and < 1, got 0"),
    (lambda: steps.Optim(0.1), TypeError, "make must be a callable .* got float"),  # type: ignore[arg-type]
    (lambda: steps.Langevin(-0.1, 1.0), ValueError, "eta must be a number >= 0, got -0.1"),
    (lambda: steps.Langevin(0.1, -1), ValueError, "temperature must be a number >= 0, got -1"),
    (
        lambda: steps.Langevin(0.1, 1.0, 0),  # type: ignore[arg-type]
        TypeError,
        "generator must be None or a torch.Generator, got int",
    ),
]


@pytest.mark.parametrize(("make", "kind", "message"), BAD)
def test_bad_numbers_are_named(
    make: Callable[[], object], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        make()


IN_CALLS: list[tuple[str, Any, type[Exception], str]] = [
    ("Strict", steps.Descent, TypeError, "eta must be a rule, got the class Descent"),
    ("FixedPred", steps.Momentum(0.1, 0.5), ValueError, "eta must be .* for FixedPred.* Momentum"),
    (
        "ErrorBased",
        steps.Descent(0.1, "down"),
        ValueError,
        'eta must have sweep="together" for ErrorBased',
    ),
    ("Strict", steps.Optim(lambda x: None), TypeError, "make must return a torch.optim.Optimizer"),  # type: ignore[arg-type,return-value]
    ("Strict", steps.Optim(torch.optim.LBFGS), ValueError, "make must return .* without a closure"),
    (
        "Strict",
        steps.Optim(lambda x: torch.optim.SGD(x[:1], lr=0.1)),
        ValueError,
        "make must return an optimizer of the very tensors",
    ),
]


@pytest.mark.parametrize(("ErrType", "rule", "kind", "message"), IN_CALLS)
def test_bad_rules_are_named(ErrType: str, rule: Any, kind: type[Exception], message: str) -> None:
    case = tanh_chain()
    grads = [torch.ones_like(p) for p in case.model.parameters()]
    for p, g in zip(case.model.parameters(), grads, strict=True):
        p.grad = g
    state = torch.get_rng_state()
    with pytest.raises(kind, match=message):
        case.infer(ErrType, eta=rule)
    assert all([p.grad is g for p, g in zip(case.model.parameters(), grads, strict=True)])
    assert torch.equal(torch.get_rng_state(), state)
