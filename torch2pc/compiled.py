"""Compiled calls, kept for as long as their model lives.

``torch.compile`` captures the layers and the loss and says, by its guards, when what was captured holds
no more: the mode of a module, a hook, an attribute, a shape have changed. ``tracing.py`` makes the
graphs of the call from that. Here they are run: the feed-forward pass, ``n`` steps, the updates; for
Exact and FixedPred one graph that does it all.

The call that compiles runs plainly itself, so that layers are held against their rules as always. So
does, with a warning, a call that cannot be compiled.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from functools import lru_cache, partial
from platform import machine
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from torch2pc.checks import check_vinit_entries, warn_caller
from torch2pc.graph import in_belief_dtype, outside_autocast, own
from torch2pc.layers import GLOBAL_HOOKS, HOOKS, Inference, Layer, Network, detached

_warned: WeakSet[nn.Module] = WeakSet()
# What holds a number that is compiled in, and its name there.
Number = tuple[str, int, str]
# For each model, the numbers that its layers and losses held.
_numbers: WeakKeyDictionary[nn.Module, dict[tuple[Number, ...], list[dict[Number, float]]]] = (
    WeakKeyDictionary()
)
MOST_VALUES = 2


class _Model:
    """What is kept for one model: its captures, by what was asked, and why there can be none."""

    def __init__(self) -> None:
        self.captures: dict[Any, Any] = {}
        self.error: object = None
        self.has_reason = False

    def capture(self, asked: Any, *arguments: Any) -> Any:
        """Run a call that is captured, or was before."""
        from torch2pc.tracing import capture

        if asked not in self.captures:
            # Its own code object: what is compiled for a model is kept with the code, so it goes
            # when the model does, and one model's shapes do not count against another's
            # recompilations.
            code: CodeType = capture.__code__.replace(co_name=f"capture_{id(self)}")
            own_code = FunctionType(code, capture.__globals__, closure=capture.__closure__)
            self.captures[asked] = torch.compile(own_code, fullgraph=True, backend=_Captured)
        return self.captures[asked](*arguments)


_models: WeakKeyDictionary[nn.Module, _Model] = WeakKeyDictionary()
_local = threading.local()


class _PlainlyError(Exception):
    """Raised in a captured call that is to be run plainly, before it has done anything."""


class _Captured:
    """What is run in the place of the captured graph: the whole of a call."""

    def __init__(self, graph: Any, inputs: Sequence[Any]) -> None:
        from torch2pc.tracing import Program

        self.reason: object = None
        self.is_new = True
        try:
            call = _local.call
            self.program = Program(graph, call.asked, _options(call.network.X.device))
        except torch._dynamo.exc.RestartAnalysis:
            raise
        except Exception as error:
            self.reason = error

    def __call__(self, *inputs: Any) -> list[Tensor]:
        call = _local.call
        call.captured = self
        if self.reason is not None or self.is_new:
            self.is_new = False
            raise _PlainlyError
        if any([inputs[k]._backward_hooks or not inputs[k].is_leaf for k in self.program.leaves]):
            call.reason = "a parameter has a hook, or a graph of its own"
            raise _PlainlyError
        call.has_begun = True
        with torch.no_grad(), outside_autocast(call.network.X.device):
            return call.run(self.program, inputs)


class Call:
    """One call of Strict or ErrorBased, to be run by compiled graphs."""

    backpropagates = False

    def __init__(
        self,
        network: Network,
        eta: float | Tensor | str,
        n: int,
        vinit: Sequence[Any] | None = None,
        update_at: str = "v",
        *,
        free_input: bool = False,
        precision: Sequence[float] | None = None,
        prior: Layer | None = None,
        relaxes_errors: bool = False,
    ) -> None:
        self.relaxes_errors = relaxes_errors
        self.network, self.eta, self.n, self.vinit = network, eta, n, vinit
        self.update_at, self.free_input = update_at, free_input
        self.precision, self.prior = precision, prior
        self.captured: _Captured | None = None
        self.inference: Inference | None = None
        self.reason: object = None
        self.has_begun = False

    @property
    def _lowest(self) -> int:
        return 1 if self.free_input else 2

    def infer(self) -> Inference | None:
        """The result; None if the call is to be run plainly, and nothing has happened yet."""
        network, model = self.network, self.network.model
        L = len(network.layers)
        losses = [network.loss, *([] if self.prior is None else [self.prior])]
        functions = [loss.function for loss in losses]
        self.reason = _hooked(network)
        compiles = False
        if self.reason is None:
            self.reason, compiles = changing_number(model, network.modules, functions)
        if isinstance(self.eta, str):
            self.reason = f'eta="{self.eta}" finds its step size as it runs'
        if self.reason is not None or self._lowest > L:
            return None
        try:
            from torch2pc.tracing import Asked
        except ImportError as error:  # another PyTorch may lack what is imported there
            self.reason = error
            return None
        kept = _models.get(model)
        if kept is None:
            kept = _models[model] = _Model()
        if kept.error is not None:
            self.reason = kept.error
            return None
        self.asked = Asked(
            L,
            self._lowest,
            self.update_at,
            self.precision is not None,
            self.prior is not None,
            self.free_input or self.relaxes_errors,
            self.relaxes_errors,
            self.backpropagates,
        )
        before, _local.call = getattr(_local, "call", None), self
        try:
            with torch._dynamo.config.patch(specialize_float=True) if compiles else nullcontext():
                kept.capture(
                    self.asked,
                    tuple([layer.function for layer in network.layers]),
                    (*[layer.copies_input or layer.is_apart for layer in network.layers], True),
                    *(network.loss.function, None if self.prior is None else self.prior.function),
                    *(network.X, network.Y),
                )
        except _PlainlyError:
            assert self.captured is not None
            self.reason = self.reason or self.captured.reason
        except Exception as error:
            if self.has_begun:
                raise
            self.reason = kept.error = error
        finally:
            _local.call = before
        return self.inference

    def explain(self, uncovered: Sequence[str]) -> None:
        """After a plain run: warn if it was none of the call's own choice, and learn from it.

        ``uncovered`` are the reasons that the plain run has found.
        """
        model = self.network.model
        kept = _models.get(model)
        if uncovered and self.captured is not None:
            self.captured.reason = uncovered[0]
        if kept is not None and kept.error is not None:
            if kept.has_reason and not uncovered:
                kept.error = None  # what was in the way is gone
            kept.has_reason = bool(uncovered)
        reason = next(iter(uncovered), self.reason)
        if reason is not None:
            run_plainly(model, reason)

    def run(self, program: Any, inputs: Sequence[Any]) -> list[Tensor]:
        """Feed forward, ``n`` steps, and the updates; returns what was to be captured."""
        from torch2pc.tracing import find

        network, L, lowest = self.network, program.asked.L, program.asked.lowest
        _begin(network.X.device)
        held = [*inputs, *program.feed_forward(inputs)]
        vhat = [find(held, place) for place in program.vhat]
        dLdy = find(held, program.dLdy)
        delta = [torch.zeros_like(in_belief_dtype(x)) for x in vhat[:L]]
        epsilon = [*[torch.zeros_like(x) for x in delta], in_belief_dtype(dLdy).clone()]
        if self.vinit is not None:
            check_vinit_entries(self.vinit, vhat)
            for l in range(1, L):
                torch.sub(self.vinit[l].detach(), vhat[l], out=delta[l])
        like = epsilon[L]
        eta = self.eta if isinstance(self.eta, Tensor) else like.new_full((), self.eta)
        pi: Sequence[Any] = [None] * (L + 1)
        if self.precision is not None:
            # Filled where they are: to copy numbers to a GPU waits for it.
            pi = [like.new_full((), weight) for weight in (1.0, *self.precision, 1.0)]
        known = [*held, eta.to(like), *pi]
        relax = self._relax_errors if self.relaxes_errors else self._relax_beliefs
        reached = _reached_layers(L, like.device)
        state = relax(program, known, reached, delta, epsilon)
        found = list(program.updates([*known, *reached[0], *state]))
        v = found[: L + 2 - lowest]
        if lowest == 2:
            v.insert(0, detached(network.X))
        del found[: L + 2 - lowest]
        if program.asked.takes_errors:
            epsilon[1:] = found[:L]
            del found[:L]
        input_error = found.pop(0) if program.asks_input else None
        return self._end(program, inputs, held, v, input_error, [*epsilon[1:], *found])

    def _end(
        self,
        program: Any,
        inputs: Sequence[Any],
        held: Sequence[Any],
        v: list[Tensor],
        input_error: Tensor | None,
        found: list[Tensor],
    ) -> list[Tensor]:
        """Set ``inference``; ``found`` are the layers' errors, and then the updates."""
        from torch2pc.tracing import find

        L, found = program.asked.L, own(found)
        vhat = [find(held, place) for place in program.vhat]
        Loss, dLdy = find(held, program.Loss), find(held, program.dLdy)
        results = [find(held, place) for place in program.results]
        vhat[0] = vhat[0].clone()
        if _is_graphed(self.network.X.device):
            # The next call's graphs write where these are.
            vhat, v, found = _copies(vhat), [v[0], *_copies(v[1:])], _copies(found)
            Loss, dLdy = _copies([Loss, dLdy])
            results = [x if any(x is y for y in inputs) else x.clone() for x in results]
            input_error = None if input_error is None else input_error.clone()
        leaves = [inputs[k] for k in program.leaves]
        errors: list[Tensor | None] = [input_error, *found[:L]]
        updates = list(zip(leaves, found[L:], strict=True))
        self.inference = Inference(vhat, Loss, dLdy, v, errors, updates)
        return results

    def _relax_beliefs(
        self,
        program: Any,
        known: list[Any],
        reached: Sequence[Sequence[Tensor]],
        delta: list[Tensor],
        epsilon: list[Tensor],
    ) -> list[Tensor]:
        """The state after ``n`` steps: how far the beliefs have moved, and the errors."""
        L, lowest = program.asked.L, program.asked.lowest
        at = lowest if self.prior is not None or self.vinit is not None else L
        before: list[Tensor] = []
        for _ in range(self.n):
            before = list(delta)
            at = max(at, lowest)
            level = program.level_of[at]
            found = program.steps[level]([*known, *reached[at], *delta[level - 1 :]])
            delta[level - 1 :], moved = found[: L - level + 1], found[L - level + 1 :]
            epsilon[L + 1 - len(moved) :] = moved
            at -= 1
        return [*delta, *epsilon[1:], *(before if self.update_at == "before" else [])]

    def _relax_errors(
        self,
        program: Any,
        known: list[Any],
        reached: Sequence[Sequence[Tensor]],
        delta: list[Tensor],
        epsilon: list[Tensor],
    ) -> list[Tensor]:
        """The state after ``n`` steps: the hidden errors."""
        known, hidden = [*known, *reached[0]], epsilon[1:-1]
        if self.vinit is not None:
            hidden = program.start([*known, *delta[1:]])
        step = program.steps[program.asked.lowest]
        for _ in range(self.n):
            hidden = step([*known, *hidden])
        return list(hidden)


class Backpropagation(Call):
    """One call of Exact or FixedPred, to be run by one compiled graph.

    The factors are as in ``exact.weighted_backpropagation``.
    """

    backpropagates = True

    def __init__(self, network: Network, c_epsilon: Sequence[float], c_v: Sequence[float]) -> None:
        super().__init__(network, 0.0, 1, free_input=True)
        self._c = (*reversed(c_epsilon), *reversed(c_v))

    def run(self, program: Any, inputs: Sequence[Any]) -> list[Tensor]:
        """Forward and backward; returns what was to be captured."""
        network, L, adds = self.network, program.asked.L, program.adds
        device = network.X.device
        _begin(device)
        factors = _scalar_tensors(self._c, program.factor_dtype, device)
        found = list(program.backpropagate([*inputs, *factors]))
        held, v = [*inputs, *found[:adds]], [detached(network.X), *found[adds : adds + L]]
        del found[: adds + L]
        input_error = found.pop(L) if program.asks_input else None
        return self._end(program, inputs, held, v, input_error, found)

    def explain(self, uncovered: Sequence[str] = ()) -> None:
        """After a plain run: warn if it was none of the call's own choice."""
        if self.reason is not None:
            run_plainly(self.network.model, self.reason)


@lru_cache(maxsize=32)
def _scalar_tensors(
    c: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    # What is beyond the type is infinite. Filled where they are, as in a relaxation.
    values = torch.tensor(c, dtype=torch.float64, device="cpu").to(dtype).tolist()
    return tuple([torch.full((), c_l, dtype=dtype, device=device) for c_l in values])


def _is_graphed(device: torch.device) -> bool:
    return device.type == "cuda"


def _begin(device: torch.device) -> None:
    if _is_graphed(device):
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.clone() for x in tensors]


def run_plainly(model: nn.Module, reason: object) -> None:
    """Say, the first time, that a model's calls run without compilation."""
    if model not in _warned:
        _warned.add(model)
        first_line = str(reason).strip().partition("\n")[0]
        warn_caller(
            f"compile=True: {type(model).__name__} runs without compilation, because {first_line}"
        )


@lru_cache(maxsize=32)
def _reached_layers(L: int, device: torch.device) -> list[tuple[Tensor, ...]]:
    """For each l, which of 0..L are at least l."""
    layers = torch.arange(L + 1, device="cpu")
    return [row.unbind() for row in (layers >= layers[:, None]).to(device)]


def _options(device: torch.device) -> dict[str, Any]:
    # Graphs from the disk may have been compiled with another choice of products.
    options = {"fallback_random": True, "size_asserts": False, "fx_graph_cache": False}
    if device.type == "cuda":
        # Each graph is launched at once, as torch.compile(mode="reduce-overhead") does it.
        return {**options, "triton.cudagraphs": True}
    # With the channels last, what lies between convolutions of few channels took twice as long.
    options["layout_optimization"] = False
    try:
        # Not at the top, as they import parts of the compiler that another PyTorch may lack.
        from torch._inductor.config import cpp

        from torch2pc.products import fast_products
    except ImportError:
        return options
    if getattr(cpp, "vec_isa_ok", True) is None and machine() in ("x86_64", "AMD64"):
        # Take the processor's word for its vector instructions. To try them takes 3 s of compilation.
        options["cpp.vec_isa_ok"] = True
    return {**options, **fast_products()}


def _hooked(network: Network) -> str | None:
    """Why a model cannot be captured: hooks on it that see more than a feed-forward pass."""
    if any(getattr(network.model, name) for name in HOOKS) or any(GLOBAL_HOOKS):
        return "the model itself has a hook"
    for module in network.modules:
        if module._backward_hooks or module._backward_pre_hooks:
            return "a module has a backward hook"
        # torch.compile has no guards for these, and may lose what they write into lists.
        if module._forward_hooks or module._forward_pre_hooks:
            return f"a forward hook is registered on {type(module).__name__}"
        if hasattr(type(module).forward, "displacement_rule"):
            return f"{type(module).__name__} has a displacement_rule"
    return None


def changing_number(
    model: nn.Module, modules: Iterable[nn.Module], functions: Iterable[object]
) -> tuple[str | None, bool]:
    """Why not to compile again, and else whether a number is new.

    A Python number that a layer or a loss computes with is compiled in. The first ``MOST_VALUES``
    values that a model meets are compiled; a number that changes on would be again and again.
    """
    now: dict[Number, float] = {
        ("the loss", -1, name): value
        for function in functions
        for name, value in _numbers_of(function)
    }
    for k, module in enumerate(modules):
        held, kind = vars(module), cast("Any", type(module))
        for name in _names_used(kind):
            value = held.get(name)
            if isinstance(value, float):
                now[type(module).__name__, k, name] = value
    met = _numbers.setdefault(model, {}).setdefault(tuple(now), [])
    if now in met:
        return None, False
    if len(met) < MOST_VALUES:
        met.append(now)
        return None, True
    number = next(number for number, value in now.items() if value != met[-1][number])
    holder, _, name = number
    reason = (
        f"{holder} holds a Python number {name}, now {now[number]:g}, that changes from call to "
        "call, and each value would have to be compiled: hold it in a tensor, which would not"
    )
    return reason, False


@lru_cache(maxsize=1000)
def _names_used(kind: type, first: tuple[str, ...] = ("forward",)) -> tuple[str, ...]:
    """``first``, and the names that the methods of a class refer to which have names among these."""
    names = dict.fromkeys(first)
    waiting = list(names)
    while waiting:
        code = getattr(getattr(kind, waiting.pop(), None), "__code__", None)
        new = [name for name in getattr(code, "co_names", ()) if name not in names]
        names.update(dict.fromkeys(new))
        waiting += [name for name in new if not hasattr(nn.Module, name)]
    return tuple(names)


def _numbers_of(function: Any, depth: int = 3) -> Iterator[tuple[str, float]]:
    """The floats that a function computes with, by name: those that compiled code is specific to.

    What a module holds is found with the modules of the call.
    """
    if not isinstance(function, FunctionType | MethodType | partial | nn.Module):
        function = getattr(function, "__call__", None)  # noqa: B004 (what is run)
    named: dict[str, Any] = {}
    code: Any = getattr(function, "__code__", None)
    if isinstance(function, partial):
        named = {"of a partial": function.func, **function.keywords}
        named.update((f"argument {k}", value) for k, value in enumerate(function.args))
    elif isinstance(function, MethodType):
        named = {"of a method": function.__func__, "self": function.__self__}
    elif isinstance(function, FunctionType):
        held = function.__globals__
        named = {name: held[name] for name in code.co_names if name in held}
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            with suppress(ValueError):  # an empty cell
                named[name] = cell.cell_contents
        defaults = function.__defaults__ or ()
        names = code.co_varnames[: code.co_argcount]
        named.update(zip(names[len(names) - len(defaults) :], defaults, strict=True))
        named.update(function.__kwdefaults__ or {})
    for name, value in named.items():
        if isinstance(value, float):
            yield name, value
        elif isinstance(value, FunctionType | MethodType | partial):
            if depth:
                yield from _numbers_of(value, depth - 1)
        elif code is not None and not isinstance(value, type | ModuleType):
            # A table of settings, or an object that has them.
            is_table = isinstance(value, dict)
            found = value if is_table else getattr(value, "__dict__", {})
            kind = cast("Any", type(value))
            keys = code.co_consts if is_table else _names_used(kind, code.co_names)
            of_value = [(key, found.get(key)) for key in keys if isinstance(key, str)]
            yield from [(f"{name}.{key}", x) for key, x in of_value if isinstance(x, float)]
