"""Compiled calls against plain ones; when it compiles, when it does not, what it keeps."""

from __future__ import annotations

import copy
import functools
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx

from tests.cases import (
    Case,
    assert_close,
    needs_compiler,
    random_beliefs,
    run_as_traced,
    squared_error,
)
from torch2pc import PCInferLatent, PCResult, displacement_rule, energies, steps
from torch2pc.compiled import calls as compiled

# PyTorch's compiler uses deprecated parts of PyTorch.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def traced_unless_compiled(request: pytest.FixtureRequest) -> None:
    """Graphs run as they were traced, without the seconds that compiling them takes, where that is enough."""
    if request.node.get_closest_marker("skipif") is None:
        request.getfixturevalue("traced")


def small_case() -> Case:
    model = nn.Sequential(
        nn.Sequential(nn.Linear(4, 5), nn.Tanh()),
        nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 5), nn.BatchNorm1d(5).eval()),
        nn.Linear(5, 3),
    ).double()
    return Case(model, nn.MSELoss(), torch.randn(6, 4).double(), torch.randn(6, 3).double())


def infer_compiled(
    case: Case, again: bool = False, ErrType: str = "Strict", **options: Any
) -> PCResult:
    """Compiled for certain. The call that compiles runs plainly itself; ``again``: none does here."""
    if not again:
        twin, random = copy.deepcopy(case.model.state_dict()), torch.get_rng_state()
        case.infer(ErrType, compile=True, **options)
        case.model.load_state_dict(twin)
        torch.set_rng_state(random)
    runs: list[object] = []
    run = compiled.Relaxing.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled.Relaxing, "run", lambda *args: runs.append(1) or run(*args))
        found = case.infer(ErrType, compile=True, **options)
    assert runs
    return found


@needs_compiler
@pytest.mark.filterwarnings("error:compile=True", "ignore:The error hardly reaches")
def test_equals_the_plain_relaxation_and_compiles_once_for_any_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step may begin below the layers that errors have reached: there nothing moves, to the bit."""
    monkeypatch.setattr("torch2pc.compiled.program.levels", lambda count, L: [L - 1])
    case = small_case()
    case.model[1].append(nn.Softmax(-1))
    with monkeypatch.context() as patch:  # for this size alone; the next one is compiled for any
        run_as_traced(patch)
        infer_compiled(case, n=1)
    graphs = counters["stats"]["unique_graphs"]
    settings = [dict(n=n) for n in (1, 2, 3, 9)] + [dict(n=9, eta=0.3)]
    settings += [dict(n=6, vinit=True)]
    for batch, options in enumerate(settings, start=7):
        X, Y = torch.randn(batch, 4).double(), torch.randn(batch, 3).double()
        # Another loss object of the same kind is nothing new either.
        case = case._replace(LossFun=nn.MSELoss(), X=X, Y=Y)
        if "vinit" in options:
            options["vinit"] = random_beliefs(case)
        plain, gradients = case.infer("Strict", **options), case.gradients()
        found = infer_compiled(case, options is not settings[0], **options)
        assert_close(list(found), list(plain))
        assert_close(case.gradients(), gradients)
        for one, other in zip(found.epsilon[1:], plain.epsilon[1:], strict=True):
            assert one is not None and other is not None
            assert bool(one.any()) == bool(other.any())
        with torch.no_grad():
            for parameter in case.model.parameters():
                parameter.add_(0.1)
    assert counters["stats"]["unique_graphs"] == graphs + 1


@pytest.mark.filterwarnings("error:compile=True", "ignore:The error hardly reaches")
def test_steps_that_begin_at_several_layers() -> None:
    """Above them all errors are, and below them none."""
    items = [nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(5)]
    case = small_case()._replace(model=nn.Sequential(nn.Linear(4, 3), *items).double())
    for n in (1, 3, 9):
        plain, gradients = case.infer("Strict", n=n), case.gradients()
        found = infer_compiled(case, again=n > 1, n=n)
        assert_close(list(found), list(plain))
        assert_close(case.gradients(), gradients)


@pytest.mark.filterwarnings("error:compile=True")
@pytest.mark.parametrize("update_at", ["vhat", "before"])
def test_where_the_updates_are_taken(update_at: str) -> None:
    case = small_case()
    for k, n in enumerate((6, 1, 2, 9)):
        vinit = random_beliefs(case) if n < 3 else None
        options: dict[str, Any] = dict(n=n, vinit=vinit, update_at=update_at)
        plain, gradients = case.infer("Strict", **options), case.gradients()
        found = infer_compiled(case, k > 0, **options)
        assert_close(list(found), list(plain))
        assert_close(case.gradients(), gradients)


@pytest.mark.filterwarnings("error:compile=True")
def test_errors_relax_as_without_compilation() -> None:
    case = small_case()
    graphs = counters["stats"]["unique_graphs"]
    settings = [dict(n=1), dict(n=7), dict(n=7, eta=0.4), dict(n=3, vinit=random_beliefs(case))]
    settings += [dict(n=3, update_at="before"), dict(n=3, update_at="vhat")]
    for options in settings:
        plain = case.infer("ErrorBased", **options)
        gradients = case.gradients()
        again = options not in (settings[0], settings[-1])
        found = infer_compiled(case, again, "ErrorBased", **options)
        assert_close(list(found), list(plain))
        assert_close(case.gradients(), gradients)
    assert counters["stats"]["unique_graphs"] == graphs + 2


class Prompt(nn.Module):
    """Has no use for its input."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(5).double())

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.expand(len(x), 5).sin()


@pytest.mark.filterwarnings("error:compile=True")
@pytest.mark.parametrize(
    ("ErrType", "ignores"), [("Strict", False), ("Strict", True), ("ErrorBased", False)]
)
def test_the_error_that_arrives_at_the_input(ErrType: str, ignores: bool) -> None:
    case = small_case()
    if ignores:
        case.model[0] = Prompt()
    case = case._replace(X=case.X.requires_grad_())
    plain, gradients, of_X = case.infer(ErrType), case.gradients(), case.X.grad
    found = infer_compiled(case, ErrType=ErrType)
    assert_close(list(found), list(plain))
    assert_close(case.gradients(), gradients)
    assert of_X is not None
    assert_close(case.X.grad, of_X)


@pytest.mark.filterwarnings("error:compile=True")
def test_a_loss_may_write_into_what_it_is_given() -> None:
    case = small_case()._replace(LossFun=lambda y, Y: y.sub_(Y).square().sum())
    plain, gradients = case.infer("Strict", n=3), case.gradients()
    found = infer_compiled(case, n=3)
    assert_close(list(found), list(plain))
    assert_close(case.gradients(), gradients)


@pytest.mark.filterwarnings("error:compile=True")
def test_latent_equals_the_plain_relaxation() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    Y, Xinit = torch.randn(5, 3).double(), torch.zeros(5, 2).double()

    def prior(v: list[Tensor]) -> Tensor:
        return 0.2 * v[1].abs().sum() + 0.1 * (v[0].sum(1) - v[2].sum(1)).square().sum()

    arguments = (model, squared_error, Y, Xinit, 0.1, 12)
    plain = PCInferLatent(*arguments, precision=[0.5, 2.0], prior=prior)
    gradients = [p.grad for p in model.parameters()]
    for _ in range(2):
        found = PCInferLatent(*arguments, precision=[0.5, 2.0], prior=prior, compile=True)
    assert_close(list(found), list(plain))
    assert_close([p.grad for p in model.parameters()], gradients)


class Signs(steps.Rule):
    """A rule of one's own."""

    numbers = ("size",)

    def __init__(self, size: float) -> None:
        self.size = size

    def move(self, i: int, parts: Any) -> None:
        self.x[i] -= self.size * sum(c * part for part, c in parts).sign()


class Decaying(steps.Descent):
    """One whose number changes from step to step."""

    def end(self) -> None:
        self.eta = 0.8 * self.eta


class Lagging(steps.Descent):
    """Moves by the gradient of the step before, which it keeps in a list."""

    def begin(self, energy: Any) -> None:
        super().begin(energy)
        self.last = [None if x is None else torch.zeros_like(x) for x in self.x]

    def move(self, i: int, parts: Any) -> None:
        self.x[i] -= self.eta * self.last[i]
        self.last[i] = sum(c * part for part, c in parts)


def rules(k: int) -> dict[str, Callable[[], Any]]:
    """Rules, with other numbers for another ``k``."""
    eta = 0.1 + 0.05 * k
    return {
        "down": lambda: steps.Descent(eta, sweep="down"),
        "momentum": lambda: steps.Momentum(eta, 0.5 + eta, nesterov=True),
        "langevin": lambda: steps.Langevin(eta, 0.5 + k),
        "halving": lambda: steps.Halving(5.0 + k, 0.3),
        "auto": lambda: "auto",
        "own": lambda: Signs(0.1 * eta),
        "own, of a whole number": lambda: Signs(1 + k),
        "decaying": lambda: Decaying(eta),
        "lagging": lambda: Lagging(eta),
    }


@pytest.mark.filterwarnings("error:compile=True", "ignore:The energy that")
@pytest.mark.parametrize("ErrType", ["Strict", "ErrorBased"])
def test_rules_move_as_without_compilation(ErrType: str) -> None:
    """Whatever n is, and their numbers are inputs."""
    case = small_case()._replace(LossFun=squared_error)
    kept = ["momentum", "langevin", "auto", "own"]  # of the errors, whose order is one
    for rule in rules(0) if ErrType == "Strict" else kept:
        graphs = counters["stats"]["unique_graphs"]
        for k, n in enumerate((8, 1, 3)):
            make = rules(k)[rule]
            torch.manual_seed(3)
            plain, gradients = case.infer(ErrType, eta=make(), n=n), case.gradients()
            torch.manual_seed(3)
            found = infer_compiled(case, k > 0, ErrType, eta=make(), n=n)
            assert_close(list(found), list(plain), 1e-10)
            assert_close(case.gradients(), gradients, 1e-10)
        assert counters["stats"]["unique_graphs"] <= graphs + 1, rule


@pytest.mark.filterwarnings("error:compile=True", "ignore:The energy that")
def test_a_step_size_that_is_found_is_made_shorter_until_the_energy_falls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[float] = []

    def too_long(curvature: float) -> float:
        found.append(40 / curvature)
        return found[-1]

    monkeypatch.setattr("torch2pc.inference.steps.safe_step", too_long)
    case = small_case()._replace(LossFun=squared_error)
    plain, gradients = case.infer("Strict", eta="auto", n=6), case.gradients()
    again = infer_compiled(case, eta="auto", n=6)
    assert len(found) == 3
    assert found[2] == pytest.approx(found[0])
    assert_close(list(again), list(plain))
    assert_close(case.gradients(), gradients)


def test_the_generator_of_the_noise_is_left_as_without_compilation() -> None:
    case, states = small_case(), []
    for options in (dict(), dict(compile=True), dict(compile=True)):
        generator = torch.Generator().manual_seed(5)
        case.infer("Strict", eta=steps.Langevin(0.1, 1.0, generator), n=2, **options)
        states.append(generator.get_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


class Counting(steps.Descent):
    """Counts in Python."""

    def begin(self, energy: Any) -> None:
        super().begin(energy)
        self.count = 0

    def end(self) -> None:
        self.count += 1


class Late(steps.Descent):
    """Makes a tensor after the first step."""

    def end(self) -> None:
        self.last = self.x[1].clone()


class Random(steps.Descent):
    """Draws elsewhere than in ``noise``."""

    def end(self) -> None:
        self.x[1].add_(torch.randn_like(self.x[1]))


class Judging(steps.Descent):
    """Branches on values."""

    def move(self, i: int, parts: Any) -> None:
        if parts[0][0].sum() > 0:
            super().move(i, parts)


class Keeping(steps.Descent):
    """Keeps something of which nothing is known."""

    def begin(self, energy: Any) -> None:
        super().begin(energy)
        self.kept = {1, 2}


class Satisfied(steps.Descent):
    """Decides by nothing."""

    def judge(self, energy: Any) -> None: ...


class Small(steps.Langevin):
    """Draws one number for each belief."""

    def noise(self, like: Tensor) -> Tensor:
        return super().noise(like[:1, :1])

    def move(self, i: int, parts: Any) -> None:
        self.x[i] += 0.1 * self.noise(self.x[i][:1, :1])


@pytest.mark.filterwarnings("ignore:The energy that")
@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (
            lambda: steps.Optim(lambda x: torch.optim.Adam(x, lr=0.1)),
            "eta is a rule that holds more",
        ),
        (lambda: Counting(0.1), "changes more in a step than tensors"),
        (lambda: Late(0.1), "changes more in a step than tensors"),
        (lambda: Random(0.1), "draws random numbers elsewhere than in noise"),
        (lambda: Judging(0.1), ""),
        (lambda: Keeping(0.1), r"Keeping\(eta=.*\) keeps a set"),
        (lambda: Satisfied(0.1), "judges by nothing"),
        (lambda: Small(0.1, 1.0), "draws noise like something else than a variable"),
    ],
)
def test_a_rule_that_cannot_be_traced_moves_plainly(rule: Callable[[], Any], reason: str) -> None:
    case = small_case()
    check_runs_plainly(case, f".*{reason}", "Strict", "Strict", eta=rule())


@pytest.mark.parametrize("ErrType", ["Exact", "FixedPred"])
def test_a_single_backward_pass_is_not_compiled(ErrType: str) -> None:
    check_runs_plainly(small_case(), f"{ErrType} is one forward and one backward", ErrType, ErrType)


class Quartic(energies.LayerEnergy):
    def __call__(self, f: Tensor, v: Tensor) -> Tensor:
        return 0.25 * (f - v).pow(4).sum()


class Stiff(energies.LayerEnergy):
    """Knows its slopes."""

    def __init__(self, c: float) -> None:
        self.c = c

    def __call__(self, f: Tensor, v: Tensor) -> Tensor:
        return self.c * (f - v).square().sum()

    def slopes(self, vhat: Tensor, df: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * self.c * (df - dv), 2 * self.c * (dv - df)


@pytest.mark.filterwarnings("error:compile=True")
def test_terms_of_the_energy_are_compiled() -> None:
    """Precisions, energies of layers and a nudge; with them other rules go too."""
    case = small_case()._replace(LossFun=squared_error)
    own = {1: Stiff(0.3), 2: lambda f, v: 0.5 * (f - v).square().sum() + 0.1 * v.square().sum()}
    settings: list[tuple[str, dict[str, Any]]] = [
        ("Strict", dict(precision=[0.5, 2.0])),
        ("ErrorBased", dict(precision=3.0)),
        ("Strict", dict(nudge=0.1)),
        ("ErrorBased", dict(nudge=0.01, precision=0.5, eta=steps.Momentum(0.1, 0.5))),
        ("Strict", dict(energies={1: energies.Huber(0.05), 2: energies.Categorical()})),
        ("Strict", dict(energies={1: energies.Laplace(0.3), 2: Quartic()}, nudge=0.5)),
        ("Strict", dict(energies=own, precision=[0.5, 2.0], eta=steps.Halving(3.0))),
        ("Strict", dict(energies={2: energies.Huber(0.05)}, eta="auto")),
    ]
    for ErrType, options in settings:
        plain, gradients = case.infer(ErrType, n=6, **options), case.gradients()
        found = infer_compiled(case, ErrType=ErrType, n=6, **options)
        assert_close(list(found), list(plain))
        assert_close(case.gradients(), gradients)


@pytest.mark.filterwarnings("error:compile=True")
def test_a_nudge_takes_the_slope_of_the_inputs_error() -> None:
    case = small_case()
    case = case._replace(X=case.X.requires_grad_())
    for beta in (0.2, 0.4):
        plain, of_X = case.infer("Strict", n=4, nudge=beta), case.X.grad
        found = infer_compiled(case, beta == 0.4, n=4, nudge=beta)
        assert_close(list(found), list(plain))
        assert_close(case.X.grad, of_X)


def test_what_is_wrong_with_beliefs_is_said_once_it_is_compiled_too() -> None:
    case = small_case()
    infer_compiled(case, vinit=random_beliefs(case))
    grads = case.gradients()
    wrong = [b if b is None else b.float() for b in random_beliefs(case)]
    with pytest.raises(ValueError, match=r"vinit\[1\] must be a tensor of .* got .*float32"):
        case.infer("Strict", compile=True, vinit=wrong)
    assert all(a is b for a, b in zip(case.gradients().values(), grads.values(), strict=True))
    infer_compiled(case, again=True, vinit=random_beliefs(case))


@pytest.mark.filterwarnings("error:compile=True")
def test_views_whose_sizes_are_the_batchs() -> None:
    """As layers of their own, and between the operations of others."""
    model = nn.Sequential(
        nn.Linear(4, 6),
        nn.Unflatten(1, (2, 3)),
        nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Flatten()),
        nn.Identity(),
        nn.Linear(6, 3),
    ).double()
    for k, batch in enumerate((6, 4, 3)):
        X, Y = torch.randn(batch, 4).double(), torch.randn(batch, 3).double()
        case = Case(model, squared_error, X, Y)
        plain, gradients = case.infer("Strict", n=5), case.gradients()
        found = infer_compiled(case, k == 2, n=5)
        assert_close(list(found), list(plain))
        assert_close(case.gradients(), gradients)


def test_a_prior_that_draws_runs_plainly() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 3)).double()
    arguments = (model, squared_error, torch.randn(5, 3).double(), torch.zeros(5, 2).double())
    drawing = lambda v: (v[0] * torch.randn_like(v[0])).sum()  # noqa: E731
    with pytest.warns(UserWarning, match="prior .*draws random numbers or changes its buffers"):
        PCInferLatent(*arguments, 0.1, 2, prior=drawing, compile=True)


def test_a_module_with_a_rule_of_its_own_runs_plainly() -> None:
    case = small_case()
    case.model.insert(1, Doubled())
    check_runs_plainly(case, "Doubled has a displacement_rule", "Strict", "Strict")


@pytest.mark.filterwarnings("error:compile=True")
def test_numbers_of_the_terms_are_inputs_and_those_of_energies_guarded() -> None:
    case = small_case()
    graphs = counters["stats"]["unique_graphs"]
    for k in range(3):
        stiff = Stiff(0.3 if k < 2 else 0.6)
        options: dict[str, Any] = dict(
            n=4, precision=[1.0 + k, 2.0], nudge=0.1 * (k + 1), energies={1: stiff}
        )
        plain = case.infer("Strict", **options)
        assert_close(list(infer_compiled(case, k == 1, **options)), list(plain))
    assert counters["stats"]["unique_graphs"] == graphs + 2


def test_what_was_compiled_goes_with_the_model() -> None:
    case = small_case()
    infer_compiled(case)
    steps = compiled._models[case.model]
    kept = [weakref.ref(steps), weakref.ref(case.model), weakref.ref(case.model[0][0].weight)]
    del case, steps
    gc.collect()
    assert [reference() for reference in kept] == [None] * 3


class Untraceable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.detach().sum() > 0)


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x / self.calls


class Written(nn.Module):
    """Draws into a tensor, and does not use what drawing returns."""

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.empty_like(x)
        noise.uniform_()
        return x * noise


class Chance(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(x.sigmoid())


@pytest.mark.filterwarnings("error:compile=True")
@pytest.mark.parametrize(
    ("ErrType", "make"),
    [
        ("Strict", lambda: nn.Sequential(nn.Linear(5, 5), nn.Dropout(), Written())),
        ("Strict", lambda: nn.BatchNorm1d(5)),
        ("Strict", Counter),
        ("ErrorBased", nn.Dropout),
        ("ErrorBased", lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Dropout())),
    ],
)
def test_masks_and_statistics_are_inputs(ErrType: str, make: Callable[[], nn.Module]) -> None:
    """What a random or a changing layer is in a call is fixed before anything is compiled."""
    case = small_case()
    case.model.insert(1, make().double())
    twin = copy.deepcopy(case)
    graphs = counters["stats"]["unique_graphs"]
    for seed in (1, 2):
        torch.manual_seed(seed)
        plain, random = twin.infer(ErrType), torch.get_rng_state()
        torch.manual_seed(seed)
        found = infer_compiled(case, seed == 2, ErrType)
        assert_close(list(found), list(plain))
        assert_close(case.gradients(), twin.gradients())
        assert torch.equal(torch.get_rng_state(), random)
        assert_close(case.model.state_dict(), twin.model.state_dict())
    assert counters["stats"]["unique_graphs"] == graphs + 1


class ChanceLoss(nn.Module):
    def forward(self, yhat: Tensor, Y: Tensor) -> Tensor:
        return (nn.functional.dropout(yhat, 0.5) - Y).square().sum()


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


displacement_rule(Doubled)(lambda module, a, d: 2 * d)


class Coin(nn.Module):
    """Draws what does not depend on its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(torch.full_like(x.detach(), 0.5))


class CountingLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, yhat: Tensor, Y: Tensor) -> Tensor:
        self.calls += 1
        return (yhat - Y).square().sum()


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (Chance(), r"model\[1\] \(Chance\): aten.bernoulli.default draws random numbers"),
        (nn.Dropout(1.0), r"aten.native_dropout.default draws other random numbers"),
        (Coin(), r"aten.bernoulli.default draws other random numbers"),
        (Untraceable(), r"model\[1\] \(Untraceable\): a Python number is taken"),
        (ChanceLoss(), r"LossFun \(ChanceLoss\) draws random numbers or changes its buffers"),
        (CountingLoss(), r"LossFun \(CountingLoss\) draws random numbers or changes its buffers"),
    ],
)
def test_runs_plainly_where_it_cannot_compile_and_says_so_once(
    part: nn.Module, reason: str
) -> None:
    case = small_case()
    if isinstance(part, ChanceLoss | CountingLoss):
        case = case._replace(LossFun=part)
    else:
        case.model.insert(1, part)
    check_runs_plainly(case, reason, "Strict", "Strict")


def check_runs_plainly(
    case: Case, reason: str, ErrType: str, next_ErrType: str, **options: Any
) -> None:
    """As without ``compile``, and with a warning, the first time."""
    torch.manual_seed(1)
    plain, random = case.infer(ErrType, **options), torch.get_rng_state()
    gradients = case.gradients()
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match=f"Sequential runs without compilation, because {reason}"):
        found = case.infer(ErrType, compile=True, **options)
    assert_close(list(found), list(plain))
    assert_close(case.gradients(), gradients)
    assert torch.equal(torch.get_rng_state(), random)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case.infer(next_ErrType, compile=True, **options)


def test_compiles_once_nothing_is_in_the_way_any_more() -> None:
    case = small_case()
    case.model.insert(1, Chance())
    with pytest.warns(UserWarning, match="draws random numbers"):
        case.infer("Strict", compile=True)
    del case.model[1]
    plain, graphs = case.infer("Strict"), counters["stats"]["unique_graphs"]
    assert_close(list(infer_compiled(case)), list(plain))
    assert counters["stats"]["unique_graphs"] == graphs + 1


class Scaled(nn.Module):
    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta, self.other = beta, beta

    def forward(self, yhat: Tensor, Y: Tensor) -> Tensor:
        return self.beta * (yhat - Y).square().mean()


def scaled_error(yhat: Tensor, Y: Tensor, beta: float) -> Tensor:
    return beta * (yhat - Y).square().mean()


@pytest.mark.parametrize(
    "hold",
    [
        lambda beta: lambda yhat, Y: beta * (yhat - Y).square().mean(),
        lambda beta: functools.partial(scaled_error, beta=beta),
        Scaled,
    ],
)
def test_a_number_that_changes_is_compiled_a_few_times(
    hold: Callable[[float], Callable[..., Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "MOST_CAPTURES", 2)
    monkeypatch.setattr(compiled, "_local", compiled._OfThread())
    case = small_case()
    graphs = counters["stats"]["unique_graphs"]
    for beta in (0.5, 0.7, 0.5):
        case._replace(LossFun=hold(beta)).infer("Strict", n=4, compile=True)
    compiled_so_far = counters["stats"]["unique_graphs"] - graphs
    assert compiled_so_far <= 2
    case = case._replace(LossFun=hold(0.25))
    plain = case.infer("Strict", n=4)
    with pytest.warns(UserWarning, match="captured 2 times .* a number that changes from call"):
        assert_close(list(case.infer("Strict", n=4, compile=True)), list(plain))
    # The values that were compiled are still there.
    case = case._replace(LossFun=hold(0.7))
    plain = case.infer("Strict", n=4)
    assert_close(list(case.infer("Strict", n=4, compile=True)), list(plain))
    assert counters["stats"]["unique_graphs"] - graphs == compiled_so_far


class Warm(nn.Module):
    """Its forward pass uses one of its numbers, by way of a method of its own."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta, self.other = beta, beta

    def forward(self, x: Tensor) -> Tensor:
        return self.cooled(x)

    def cooled(self, x: Tensor) -> Tensor:
        return torch.tanh(x / self.beta)


def test_so_is_a_number_of_a_layer() -> None:
    layer = Warm(1.0)
    case = small_case()
    case.model.insert(1, layer)
    graphs = counters["stats"]["unique_graphs"]
    for k, layer.beta in enumerate((1.0, 0.9, 1.0, 0.9)):
        layer.other = float(k)
        plain = case.infer("Strict", n=4)
        assert_close(list(infer_compiled(case, n=4)), list(plain))
    assert counters["stats"]["unique_graphs"] == graphs + 2


@pytest.mark.filterwarnings("error:compile=True")
def test_a_tensor_that_changes_is_an_input() -> None:
    case = small_case()
    graphs = counters["stats"]["unique_graphs"]
    for beta in torch.tensor([0.5, 0.7, 0.25, 0.1]).double():
        case = case._replace(LossFun=lambda yhat, Y, beta=beta: beta * (yhat - Y).square().mean())
        plain = case.infer("Strict", n=4)
        assert_close(list(infer_compiled(case, n=4)), list(plain))
    assert counters["stats"]["unique_graphs"] == graphs + 1


@pytest.mark.filterwarnings("error:compile=True")
def test_another_batch_size_compiles_once_more_and_then_any_does() -> None:
    case = small_case()
    graphs = counters["stats"]["unique_graphs"]
    found = []
    for batch in (6, 4, 5, 9, 2, 6, 1, 1):
        X, Y = torch.randn(batch, 4).double(), torch.randn(batch, 3).double()
        case = case._replace(X=X, Y=Y)
        plain = case.infer("Strict", n=4)
        assert_close(list(infer_compiled(case, n=4)), list(plain))
        found.append(counters["stats"]["unique_graphs"] - graphs)
    assert found == [1, 2, 2, 2, 2, 2, 3, 3]


class LearnedLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7).double())

    def forward(self, yhat: Tensor, Y: Tensor) -> Tensor:
        return (self.scale * nn.functional.dropout(yhat, 0.3, self.training) - Y).square().mean()


@pytest.mark.filterwarnings("error:compile=True")
def test_a_learned_loss_learns_in_a_relaxation() -> None:
    case = small_case()
    case = case._replace(LossFun=LearnedLoss().eval())
    plain, gradients, of_loss = case.infer("Strict"), case.gradients(), case.LossFun.scale.grad
    assert_close(list(infer_compiled(case)), list(plain))
    assert_close(case.gradients(), gradients)
    assert_close(case.LossFun.scale.grad, of_loss)


@pytest.mark.parametrize(
    ("L", "expected"),
    [
        (2, [1]),
        (3, [2, 0]),
        (8, [7, 5, 4, 3, 2, 1, 0]),
        (11, [10, 7, 5, 3, 1]),
        (20, [19, 13, 8, 3]),
        (100, [99, 48]),
    ],
)
def test_where_compiled_steps_begin(L: int, expected: list[int]) -> None:
    program = pytest.importorskip("torch2pc.compiled.program", reason="no compiler")
    assert program.levels(L, L) == expected


@pytest.mark.filterwarnings("error:compile=True")
def test_what_changes_in_the_model_is_noticed() -> None:
    case = small_case()
    case.model.insert(1, nn.BatchNorm1d(5).double())
    infer_compiled(case)
    changes: list[Callable[[], object]] = [
        case.model.eval,
        lambda: case.model.load_state_dict({k: v + 1 for k, v in case.model.state_dict().items()}),
        lambda: case.model[-1].weight.requires_grad_(False),
    ]
    for change in changes:
        change()
        case.model.zero_grad()
        twin = copy.deepcopy(case)
        plain, gradients = twin.infer("Strict"), twin.gradients()
        found = infer_compiled(case)
        assert_close(list(found), list(plain))
        assert_close(case.gradients(), gradients)


@needs_compiler
@pytest.mark.filterwarnings("error:compile=True")
def test_autocast_is_taken_as_it_is_in_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    # (Blocks of steps are the same code several times, and take as long to compile.)
    monkeypatch.setattr("torch2pc.compiled.program.most_steps", lambda L: 1)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 4)),
    )
    case = Case(model, nn.CrossEntropyLoss(), torch.randn(16, 1, 8, 8), torch.randint(4, (16,)))
    graphs = counters["stats"]["unique_graphs"]
    for count, is_on in enumerate([True, False, True, False]):
        for options in (dict(n=7), dict(n=3, eta=0.3)):
            with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
                plain, gradients = case.infer("Strict", **options), case.gradients()
                with monkeypatch.context() as patch:
                    if not is_on:
                        run_as_traced(patch)
                    found = infer_compiled(case, again=count > 1 or "eta" in options, **options)
            one_round_off = 2**-8 if is_on else 2**-20
            assert [x.dtype for x in found.vhat] == [x.dtype for x in plain.vhat]
            assert found.vhat[-1].dtype == (torch.bfloat16 if is_on else torch.float32)
            for x in (*found.v, *found.epsilon[1:], *case.gradients().values()):
                assert x is not None and x.dtype == torch.float32
            assert_close(list(found), list(plain), 4 * one_round_off)
            assert_close(case.gradients(), gradients, 4 * one_round_off)
    assert counters["stats"]["unique_graphs"] == graphs + 2


def test_a_hook_on_a_parameter_sees_its_gradients() -> None:
    case = small_case()
    infer_compiled(case)
    seen: list[Tensor] = []
    case.model[0][0].weight.register_hook(seen.append)
    plain = case.infer("Strict")
    count = len(seen)
    with pytest.warns(UserWarning, match="because a parameter has a hook"):
        found = case.infer("Strict", compile=True)
    assert_close(list(found), list(plain))
    assert len(seen) == 2 * count > 0


@pytest.mark.parametrize("is_late", [False, True])
def test_forward_hooks_fire_as_without_compilation(is_late: bool) -> None:
    """Also one that is registered after the model was compiled, which its guards do not notice."""
    case = small_case()
    if is_late:
        infer_compiled(case)
    seen: list[int] = []

    def double(module: nn.Module, args: object, output: Tensor) -> Tensor:
        seen.append(1)
        return 2 * output

    case.model[0].register_forward_hook(double)
    plain = case.infer("Strict")
    count = len(seen)
    with pytest.warns(UserWarning, match="a forward hook is registered on Sequential"):
        found = case.infer("Strict", compile=True)
    assert_close(list(found), list(plain))
    assert len(seen) == 2 * count > 0


def test_a_hook_on_all_modules_is_run() -> None:
    """Its table is in no module of the model."""
    case, seen = small_case(), []
    infer_compiled(case)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    try:
        case.infer("Strict")
        count = len(seen)
        with pytest.warns(UserWarning, match="because the model itself has a hook"):
            case.infer("Strict", compile=True)
    finally:
        handle.remove()
    assert len(seen) == 2 * count > 0


def test_hooks_that_cannot_be_captured_are_named() -> None:
    case = small_case()
    case.model[2].register_full_backward_hook(lambda *args: None)
    plain = case.infer("Strict")
    with pytest.warns(UserWarning, match=r"model\[2\] .*: a module has a backward hook"):
        found = case.infer("Strict", compile=True)
    assert_close(list(found), list(plain))


@needs_compiler
@pytest.mark.parametrize(("writes", "version"), [(True, 1), (False, 0)])
def test_what_a_graph_writes_into_its_inputs_is_counted(writes: bool, version: int) -> None:
    graphs = pytest.importorskip("torch2pc.compiled.graphs", reason="no compiler")

    def function(x: Tensor) -> list[Tensor]:
        return [3 * (x.add_(1) if writes else x + 1)]

    graph = make_fx(function)(torch.ones(2))
    with torch.no_grad():
        run = graphs.compiled_graph(graph, [torch.ones(2)], {"fx_graph_cache": False})
        x = torch.ones(2)
        (found,) = run([x])
    assert found.tolist() == [6, 6]
    assert x.tolist() == [1 + version] * 2
    assert x._version == version
