"""A captured call as graphs: the feed-forward pass, the steps of a relaxation, the updates.

``Program`` runs the parts of a captured call (``parts.py``) on tensors without values, in a ``Traced``
network, through the very sweep, step rule and updates of ``energy`` and ``inference``, and writes down the
operations that come of it. So what is compiled holds no tensor: weights, beliefs, masks, targets and step
sizes are its inputs. What goes on from step to step (the variables, and whatever tensors a rule or a factor
changes) is its state, which is found by taking a step.

To import this file takes a second, as it imports the compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import tracing

from torch2pc.compiled.graphs import Graphed, collected_apart, compiled, traced
from torch2pc.compiled.parts import Held, OwnEnergy, Parts, Place, Watched, find, split
from torch2pc.compiled.rewrites import clean, inputs_of
from torch2pc.displacement.lines import Displacement
from torch2pc.displacement.recorder import Recorder, Uncovered
from torch2pc.displacement.rules import storage
from torch2pc.energy import Beliefs, Energy, Errors
from torch2pc.energy.divergences import LayerEnergy
from torch2pc.energy.factors import Terms, factors_of
from torch2pc.graph.autograd import (
    Below,
    below,
    check_loss,
    check_scalar,
    gradient,
    gradient_of_small,
    in_belief_dtype,
    output_gradient,
)
from torch2pc.graph.layer import own_output
from torch2pc.graph.network import Network
from torch2pc.graph.nodes import Node
from torch2pc.inference.relax import take_step
from torch2pc.inference.steps import Rule
from torch2pc.inference.updates import OfLayer, updates


def is_constant(value: object) -> bool:
    """Whether it is a Python number or the like, which can be compiled in."""
    return value is None or isinstance(value, bool | int | float | str)


class RuleOf(NamedTuple):
    """A step rule without its numbers: rules that are alike are one program."""

    kind: type[Rule]
    attributes: tuple[tuple[str, Any], ...]
    """What else it holds."""

    @classmethod
    def of(cls, rule: Rule) -> RuleOf:
        """That of a rule."""
        # A generator is what the noise comes of, and that is an input.
        held = {k: x for k, x in vars(rule).items() if not isinstance(x, torch.Generator)}
        held = {k: x for k, x in sorted(held.items()) if k not in rule.numbers}
        return cls(type(rule), tuple(held.items()))

    @property
    def is_constant(self) -> bool:
        """Whether what else it holds can be compiled in."""
        return all([is_constant(value) for _, value in self.attributes])

    def make(self) -> Rule:
        """Such a rule, of which the numbers are missing."""
        rule: Rule = object.__new__(self.kind)
        vars(rule).update(self.attributes)
        return rule


class Asked(NamedTuple):
    """What is compiled in, besides the layers: another value of it is another program."""

    kind: str
    """What is moved: the ``"beliefs"`` or the ``"errors"``."""
    parents: tuple[tuple[int, ...], ...]
    """Those of each layer."""
    names: tuple[str, ...]
    """What errors call the layers."""
    free: tuple[int, ...]
    """The places whose beliefs move."""
    rule: RuleOf
    update_at: str = "v"
    is_weighted: bool = False
    """Whether the layers' errors have precisions."""
    is_nudged: bool = False
    """Whether the loss is multiplied by a number."""
    is_multiplied: bool = False
    """Whether the layers have multipliers."""
    energies: tuple[OwnEnergy, ...] = ()
    """The layers' own energies."""
    has_prior: bool = False
    takes_errors: bool = False
    """Whether the errors are those at the final beliefs, not those of the last step."""

    @property
    def L(self) -> int:
        """The number of layers."""
        return len(self.parents)

    def moving(self, l: int) -> tuple[int, ...]:
        """The parents of layer l whose beliefs move."""
        return tuple([p for p in self.parents[l - 1] if p in self.free])


class _TracedLayer:
    """A layer, the loss or the prior, in a graph that is being traced: what ``Layer`` is elsewhere."""

    uncovered = own_backward = None
    is_linear = True

    def __init__(self, replay: Callable[..., Tensor], displacement: Any, has_leaves: bool) -> None:
        self.replay, self.displacement, self.has_leaves = replay, displacement, has_leaves


class _Masked:
    """A displacement that is 0 until errors have reached its layer.

    What is compiled may compute a displacement of 0 as the difference of two nearly equal numbers.
    """

    def __init__(self, displacement: Displacement, is_reached: Tensor) -> None:
        self._displacement, self._is_reached = displacement, is_reached

    def forward(self, *deltas: Tensor) -> tuple[Tensor, Any]:
        moved, saved = self._displacement.forward(*deltas)
        return torch.where(self._is_reached, moved, 0.0), saved

    def backward(self, saved: Any, e: Tensor) -> Any:
        return self._displacement.backward(saved, torch.where(self._is_reached, e, 0.0))


class _TracedEnergy(LayerEnergy):
    """A layer's own energy, in a graph that is being traced."""

    def __init__(self, run: Callable[..., Tensor], is_at_rest: bool, *parts: int | None) -> None:
        self._run, self.is_at_rest, (self._own, self._slopes, self._value) = run, is_at_rest, parts

    def __call__(self, f: Tensor, v: Tensor) -> Tensor:
        """E, a scalar."""
        return self._run(self._own, f, v).reshape(())

    def slopes(self, vhat: Tensor, df: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
        """dE/df and dE/dv."""
        if self._slopes is None:
            return super().slopes(vhat, df, dv)
        of_prediction, of_belief = self._run(self._slopes, vhat, df, dv)
        return of_prediction, of_belief

    def value(self, vhat: Tensor, df: Tensor, dv: Tensor) -> Tensor:
        """E there."""
        if self._value is None:
            return super().value(vhat, df, dv)
        return self._run(self._value, vhat, df, dv).detach()


class Slot(NamedTuple):
    """Where a rule or a factor keeps a tensor that goes on from step to step."""

    owner: int
    """0 for the rule, then the factors."""
    name: str
    key: Any
    """Its place in a dict or a list, if the attribute is one."""

    def put(self, owners: Sequence[Any], x: Tensor) -> None:
        """Put a tensor there."""
        owner = owners[self.owner]
        if self.key is None:
            setattr(owner, self.name, x)
        else:
            getattr(owner, self.name)[self.key] = x


def slots(energy: Energy, owners: Sequence[Any]) -> dict[Slot, Tensor]:
    """All tensors that the owners keep, but for the variables."""
    found, variables = {}, set(map(id, energy.variables))
    for k, owner in enumerate(owners):
        for name, value in vars(owner).items():
            entries: Any = [(None, value)]
            if isinstance(value, dict):
                entries = value.items()
            elif isinstance(value, list) and value is not energy.x:
                entries = enumerate(value)
            for key, x in entries:
                if isinstance(x, Tensor) and id(x) not in variables:
                    found[Slot(k, name, key)] = x
    return found


def besides(energy: Energy, rule: Rule) -> dict[str, Any]:
    """What a rule keeps besides tensors and its numbers; ``Energy`` stands for the energy itself."""
    found: dict[str, Any] = {}
    for name, value in vars(rule).items():
        if value is energy.x or name in ("noise", *rule.numbers) or isinstance(value, Tensor):
            continue
        if isinstance(value, dict):
            value = {key: x for key, x in value.items() if not isinstance(x, Tensor)}
        elif isinstance(value, list):
            value = [None if isinstance(x, Tensor) else x for x in value]
        elif not (value is energy or is_constant(value)):
            raise Uncovered(f"{rule} keeps a {type(value).__name__}")
        found[name] = Energy if value is energy else value
    return found


class Traced(Network):
    """A recorded network, made of the tensors that a graph is given while it is traced."""

    def __init__(
        self,
        program: Program,
        given: Sequence[Any],
        is_masked: bool = False,
        size: int | None = None,
    ) -> None:
        asked, L = program.asked, program.asked.L
        known, numbers, is_reached, self.state, noise = program.divided(given, size)
        self._program, self._known = program, dict(zip(program.places, known, strict=True))
        # Without any it is only found out what is drawn.
        self._noise: Iterator[Tensor] | None = iter(noise) if noise else None
        self.others = noise
        self.drawn_like: list[int] = []
        """The variables like which the rule has drawn noise."""
        kind = asked.rule.kind
        self.numbers = dict(zip(kind.numbers, numbers, strict=False))
        rest = list(numbers[len(kind.numbers) :])
        between = {
            of.place: _TracedEnergy(self._replay, of.is_at_rest, *program.parts.of_energy[of.place])
            for of in asked.energies
        }
        alpha = rest.pop() if asked.is_multiplied else None
        beta = rest.pop() if asked.is_nudged else 1.0
        self.terms = Terms(rest if asked.is_weighted else None, beta, between, alpha)
        self.nodes = [
            Node(_no_function, *pair) for pair in zip(asked.parents, asked.names, strict=True)
        ]
        self.free = set(asked.free)
        self.asks_input, self.kept, self.arrived = program.asks_input, {}, None
        self._autocast = program.autocast
        self.vhat = list(map(self.found, program.vhat))
        self.Loss, self.dLdy = self.found(program.Loss), self.found(program.dLdy)
        self.own = program.with_leaves(list(map(self.found, program.inputs)))
        self.layers = []
        for l in range(1, L + 1):
            d: Any = self._displacement(l) if asked.moving(l) else None
            if d is not None and is_masked and l < L:
                d = _Masked(d, is_reached[l - 1])
            has_leaves = bool(program.leaves_of[l])
            self.layers.append(_TracedLayer(partial(self._replay, l), d, has_leaves))  # type: ignore[arg-type]
        loss, prior = bool(program.leaves_of[L + 1]), bool(program.leaves_of.get(L + 2))
        self.loss = _TracedLayer(partial(self._replay, L + 1), None, loss)  # type: ignore[assignment]
        self.prior = None
        if asked.has_prior:
            self.prior = _TracedLayer(self._replay_prior, None, prior)  # type: ignore[assignment]

    def found(self, place: Place) -> Any:
        """What is held at this place."""
        if place.is_fixed:
            return self._known[place]
        return find({place.k: self._known[Place(place.k, None)]}, place)

    def _displacement(self, l: int) -> Displacement:
        recorded, places = self._program.lines[l]
        lines = [
            line._replace(tensors=tuple(map(self.found, of_line)))
            for line, of_line in zip(recorded.lines, places, strict=True)
        ]
        return Displacement(lines, recorded.result, self.vhat[l], recorded.count)

    def _replay(self, part: int, *x: Tensor) -> Tensor:
        program = self._program
        drawn = list(map(self.found, program.drawn.get(part, [])))
        with torch.enable_grad(), Watched(drawn) if drawn else nullcontext():
            return program.parts.run(part, self.own, *x)

    def _replay_prior(self, beliefs: list[Tensor]) -> Tensor:
        return self._replay(self._program.asked.L + 2, *beliefs)

    def energy(self, in_errors: bool | None = None) -> Energy:
        """The energy, in the variables that are asked for or else in the program's."""
        if in_errors is None:
            in_errors = self._program.asked.kind == "errors"
        made = Errors if in_errors else Beliefs
        return made(factors_of(self, self.terms), self.vhat, self.free)

    def begun(self, energy: Energy) -> Rule:
        """The rule, at the start."""
        rule = self._rule(energy)
        rule.begin(energy)
        return rule

    def resumed(self, moved: Collection[int] | None = None) -> tuple[Energy, Rule]:
        """The energy and the rule, at the state, where these beliefs have moved or else all have."""
        energy, program = self.energy(), self._program
        rule, x = self._rule(energy), [x_i.clone() for x_i in self.state]
        if moved is not None:
            # What has not moved is known to be 0, so that nothing has to be multiplied by it.
            for k, i in enumerate(program.asked.free):
                x[k] = x[k] if i in moved else torch.zeros_like(x[k])
        rule.x = energy.x
        for name, value in program.attributes.items():
            setattr(rule, name, energy if value is Energy else copy(value))
        for slot, x_i in zip(program.slots, x[len(energy.free) :], strict=True):
            slot.put([rule, *energy.factors], x_i)
        energy.stand_at(x[: len(energy.free)])
        if moved is not None and isinstance(energy, Beliefs):
            energy.moved = set(moved)
        return energy, rule

    def _rule(self, energy: Energy) -> Rule:
        rule = self._program.asked.rule.make()

        def noise(like: Tensor) -> Tensor:
            k = [k for k, x in enumerate(energy.variables) if x is like]
            if not k:
                raise Uncovered(f"{rule} draws noise like something else than a variable")
            self.drawn_like += k
            return torch.empty_like(like) if self._noise is None else next(self._noise)

        vars(rule).update(self.numbers, noise=noise)
        return rule


def _no_function(*x: Tensor) -> Tensor:
    raise AssertionError("a traced layer is replayed")


class Step(NamedTuple):
    """Some steps as one graph, which gives anew what is at ``changed`` in the state."""

    graph: Graphed
    changed: list[int]
    steps: int = 1

    def put(self, state: list[Any], found: Sequence[Tensor]) -> None:
        """Put what it gives into the state."""
        for k, x in zip(self.changed, found, strict=True):
            state[k] = x


class _Trace(NamedTuple):
    """A graph that is not compiled yet, what it is given, and what of the state it gives anew."""

    graph: fx.GraphModule
    given: list[Any]
    changed: list[int]


class Program:
    """The graphs of one captured call, compiled.

    ``feed_forward`` is given the inputs of the captured call, and returns more to be held; ``known`` finds
    there what the other graphs are given. After that come the numbers (the rule's, the precisions, the
    factor of the loss), which layers are reached, the state, and the rule's noise.

    ``begin`` takes the variables to the state at the start, ``steps[j]`` is the step where the beliefs
    ``reach[j]`` have moved, ``block`` several steps once all have, ``judge`` what the rule decides by in
    the end, ``updates`` the end of the call. Where errors are relaxed, ``start`` takes those of beliefs.
    """

    slots: list[Slot]
    """Where the state is kept, but for the variables, which come first."""
    size: int
    """The number of tensors that the state is."""
    errors: list[int]
    """Where in it the errors of the layers are."""

    def __init__(self, captured: fx.GraphModule, asked: Asked, options: dict[str, Any]) -> None:
        self.parts = Parts(captured, asked.parents, asked.has_prior, asked.energies)
        self.asked, self._options = asked, options
        self.reach = reach(asked)
        L = asked.L
        # The layers whose updates are taken at vhat: the graph of the feed-forward pass serves.
        all_at_vhat = asked.update_at == "vhat"
        self._at_vhat = [l for l in range(1, L + 1) if all_at_vhat or not asked.moving(l)]
        self.lines: dict[int, Any] = {}
        self.drawn: dict[int, list[Place]] = {}
        # The inputs that require grad and that each layer, the loss and the prior use.
        self.leaves_of: dict[int, list[int]] = {}
        # Whether all backward passes in a layer are PyTorch's own, and whether those of its input are.
        self._is_linear: dict[int, bool] = {}
        self._is_foreign: dict[int, bool] = {}
        inputs = [node.meta["example_value"] for node in self.parts.placeholders]
        values = [mark.meta["example_value"] for mark in self.parts.marks[: L + 1]]
        self._device = values[0].device
        # As it is when the call is made: another one is captured anew.
        self.autocast: tuple[str, torch.dtype] | None = None
        kind = self._device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            self.autocast = kind, torch.get_autocast_dtype(kind)
        with (
            collected_apart(),
            torch.no_grad(),
            tracing(None),
            values[0].fake_mode,
            enable_python_dispatcher(),
        ):
            like = [torch.empty_like(x.detach()) for x in values]
            self._compile_feed_forward(inputs, like)
            self._compile_relaxation([in_belief_dtype(torch.empty_like(x)) for x in like])
        self.leaves = self.used
        self._schedules: dict[tuple[int, int, bool], list[tuple[int, Step]]] = {}
        del self.parts, self._held, self._rest

    def known(self, held: Sequence[Any]) -> list[Any]:
        """What the graphs of the relaxation are given of what is held."""
        return [find(held, place) for place in self.places]

    def schedule(self, k: int, n: int, ends_alone: bool = False) -> list[tuple[int, Step]]:
        """The graphs of ``n`` steps after k others, and at most how many others there are before each.

        ``ends_alone``: the last step is a graph of its own.
        """
        key = k, n, ends_alone
        if key not in self._schedules:
            found, last, rest = [], len(self.reach) - 1, n
            while rest > 0:
                k = min(k, last)
                step = self.steps[min([j for j in self.steps if j >= k])]
                if k == last and self.block is not None and rest - ends_alone >= self.block.steps:
                    step = self.block
                found.append((k, step))
                k, rest = k + step.steps, rest - step.steps
            self._schedules[key] = found
        return self._schedules[key]

    def divided(self, given: Sequence[Any], size: int | None = None) -> list[Sequence[Any]]:
        """What is known, the numbers, which layers are reached, the state, and what else there is."""
        found, start = [], 0
        size = self.size if size is None else size
        for count in (len(self.places), self._count_of_numbers, self.asked.L, size):
            found.append(given[start : start + count])
            start += count
        return [*found, given[start:]]

    def tell(self, rule: Rule, state: Sequence[Any]) -> None:
        """Let a rule that looks at values know its own."""
        for slot, x in zip(self.slots, state[len(self.asked.free) :], strict=True):
            if slot.owner == 0 and slot.key is None:
                slot.put([rule], x)

    @property
    def used(self) -> list[int]:
        """The inputs that have an update."""
        return sorted({k for leaves in self.leaves_of.values() for k in leaves})

    def _compile_feed_forward(self, inputs: list[Any], like: list[Tensor]) -> None:
        errors = [in_belief_dtype(torch.empty_like(like[l])) for l in self._at_vhat]
        joint = traced(self._feed_forward, [*inputs, *errors], self._options)
        count = len(self._held.tensors) - len(inputs)
        self._rest, cut = split(joint, len(inputs), len(errors), count)
        self._cut = [
            Place(inputs_of(joint).index(node), None)
            if node.op == "placeholder"
            else self._held.add(node.meta["val"])
            for node in cut
        ]
        self.feed_forward = self._compiled(joint, inputs)
        # What of all that is held the other graphs are given.
        self.inputs = [self._before.get(k, Place(k, None)) for k in range(len(inputs))]
        wanted = [*self.inputs, *self.vhat, self.Loss, self.dLdy, *self._cut]
        wanted += [place for of_layer in self.drawn.values() for place in of_layer]
        wanted += [p for _, lines in self.lines.values() for of_line in lines for p in of_line]
        # A view whose sizes change with the batch is made in the graphs.
        fixed = [place if place.is_fixed else Place(place.k, None) for place in wanted]
        self.places = list(dict.fromkeys(fixed))

    def _compile_relaxation(self, like: list[Tensor]) -> None:
        asked, L = self.asked, self.asked.L
        self._count_of_numbers = (
            len(asked.rule.kind.numbers) + asked.is_nudged + asked.is_multiplied
        )
        self._count_of_numbers += L - 1 if asked.is_weighted else 0
        # One tensor for each, and not one for all: what is done in two layers is one kernel then.
        given = [
            *self.known(self._held.tensors),
            *[like[L].new_empty(()) for _ in range(self._count_of_numbers)],
            *[like[L].new_empty((), dtype=torch.bool) for _ in range(L)],
        ]
        x = [like[i] for i in asked.free]
        state = self._find_state(given, x)

        last = len(self.reach) - 1
        levels_of = [last] if self.starts_awake else levels(last + 1, L)
        self.first = last if self.starts_awake else 0
        # Whether a step evaluates layers that no error has reached, whose errors are 0.
        skips = any(
            [
                self.reach[k] != self.reach[min([j for j in levels_of if j >= k])]
                for k in range(self.first, last)
            ]
        )
        count, noise = most_steps(L), [x[k] for k in self.noise_of_step]
        begin = self._traced(self._begin, given, x, [x[k] for k in self.noise_of_begin])
        steps = {
            j: self._traced(partial(self._step, j, 1, skips), given, state, noise)
            for j in levels_of
        }
        block = None
        if count > 1:
            of_block = partial(self._step, last, count, False)
            block = self._traced(of_block, given, state, noise * count)
        before = x if asked.update_at == "before" else []
        end = self._traced(self._updates, given, state, before)
        readers = [*steps.values(), end]
        judge = None
        if asked.rule.kind.judge is not Rule.judge:
            judge = self._traced(self._judge, given, state)
            readers.append(judge)
        # What nothing reads does not go on.
        start = len(given)
        live = set(self.errors) | {
            k
            for trace in readers
            for k, node in enumerate(inputs_of(trace.graph)[start : start + len(state)])
            if node.users
        }
        kept_by_rule = {len(x) + k for k, slot in enumerate(self.slots) if slot.owner == 0}
        self.begin = self._step_of(begin, live | kept_by_rule)
        self.steps = {j: self._step_of(step, live) for j, step in steps.items()}
        self.block = None if block is None else self._step_of(block, live)._replace(steps=count)
        self.judge = None if judge is None else self._compiled(judge.graph, judge.given)
        self.updates = self._compiled(end.graph, end.given)
        if asked.kind == "errors":
            start_of = self._traced(self._errors_of, given, x)
            self.start = self._compiled(start_of.graph, start_of.given)

    def _find_state(self, given: list[Any], x: list[Tensor]) -> list[Tensor]:
        """Take a step, to see what it changes; returns tensors like those of the state."""
        asked = self.asked
        network = Traced(self, [*given, *x], size=len(x))
        energy = network.energy()
        with Watched() as watched:
            rule = network.begun(energy)
            self.noise_of_begin = list(network.drawn_like)
            is_awake = isinstance(energy, Errors) or energy.moved == set(asked.free)  # type: ignore[attr-defined]
            self.starts_awake = is_awake or asked.has_prior or rule.down
            energy.wake()
            owners = [rule, *energy.factors]
            before = {slot: (x, x._version) for slot, x in slots(energy, owners).items()}
            self.attributes = besides(energy, rule)
            take_step(energy, rule)
            energy.settle()
        self.noise_of_step = network.drawn_like[len(self.noise_of_begin) :]
        after = slots(energy, owners)
        new = [slot for slot in after if slot.owner == 0 and slot not in before]
        if new or besides(energy, rule) != self.attributes:
            raise Uncovered(f"{rule} changes more in a step than tensors that it makes in begin")
        if watched.drawn:
            raise Uncovered(f"{rule} draws random numbers elsewhere than in noise")
        numbers = set(map(id, network.numbers.values()))
        self.slots = [
            slot
            for slot, x in after.items()
            if (slot.owner == 0 and id(x) not in numbers) or _is_new(x, before.get(slot))
        ]
        state = [*energy.variables, *[after[slot] for slot in self.slots]]
        self.size = len(state)
        self.errors = [list(map(id, state)).index(id(e)) for e in energy.epsilon[1:]]
        return state

    def _traced(
        self, function: Callable[..., list[Tensor]], given: list[Any], *others: Sequence[Tensor]
    ) -> _Trace:
        given = [*given, *[torch.empty_like(x) for of in others for x in of]]
        self._changed: list[int] = []
        graph = traced(function, given, self._options)
        clean(graph)
        return _Trace(graph, given, self._changed)

    def _step_of(self, trace: _Trace, live: Collection[int]) -> Step:
        """The step that gives anew what goes on of the state."""
        (end,) = trace.graph.graph.find_nodes(op="output")
        pairs = [(k, node) for k, node in zip(trace.changed, end.args[0], strict=True) if k in live]
        end.args = ([node for _, node in pairs],)
        return Step(self._compiled(trace.graph, trace.given), [k for k, _ in pairs])

    def _compiled(self, graph: fx.GraphModule, given: Sequence[Any]) -> Graphed:
        return compiled(graph, given, self._options, self._device)

    # What is traced.

    def _feed_forward(self, *given: Any) -> list[Tensor]:
        """Forward through all layers and the loss. Sets what the other graphs need to know."""
        asked, parts, L = self.asked, self.parts, self.asked.L
        count = len(parts.placeholders)
        inputs, errors = given[:count], dict(zip(self._at_vhat, given[count:], strict=True))
        held = self._held = Held(inputs)
        own = [_leaf(x) for x in inputs]
        # What the call may change, as it is before.
        before = {
            k: x.clone()
            for k, x in enumerate(inputs)
            if isinstance(x, Tensor) and not x.requires_grad
        }
        found: list[Tensor] = []
        written: set[int] = set()
        X = parts.run(0, own)
        self.asks_input = X.requires_grad
        vhat = [X.detach()]
        for l, parents in enumerate(asked.parents, start=1):
            x = [vhat[p].detach() for p in parents]
            moving = [a for p, a in zip(parents, x, strict=True) if p in asked.free]
            recorder = Recorder(*moving) if moving else None
            with Watched() as watched, recorder or nullcontext():
                output = self._evaluated(l, own, x)
            written |= watched.written
            if recorder is not None:
                try:
                    displacement = recorder.displacement(output)
                    if reason := recorder.own_backward(output, self._is_foreign[l]):
                        raise Uncovered(reason)
                except Uncovered as reason:
                    raise Uncovered(f"{asked.names[l - 1]}: {reason}") from reason
                places = [[held.place(x) for x in line.tensors] for line in displacement.lines]
                self.lines[l] = displacement, places
            self.drawn[l] = [held.place(numbers) for numbers in watched.drawn]
            if l in self._at_vhat:
                asked_of = [own[k] for k in self.leaves_of[l]] + self._inputs_asked(l, x)
                if self._is_linear[l]:
                    of_layer = gradient_of_small(output, asked_of, errors[l])
                else:
                    of_layer = gradient([output], asked_of, [errors[l].to(output.dtype)])
                pairs = zip(of_layer, asked_of, strict=True)
                found += [torch.zeros_like(y) if g is None else g for g, y in pairs]
            vhat.append(output.detach())
        prediction = vhat[-1].detach().requires_grad_()
        with torch.enable_grad(), Watched() as watched:
            Loss = check_loss(parts.run(L + 1, own, prediction))
        outside = {storage(x) for x in inputs if isinstance(x, Tensor)}
        if watched.drawn or watched.written & outside:
            raise Uncovered("LossFun draws random numbers or changes its buffers")
        self.leaves_of[L + 1] = _places(_captured(Loss, [prediction], "LossFun").leaves, own)
        dLdy = output_gradient(Loss, prediction)
        if asked.has_prior:
            beliefs = [in_belief_dtype(x).detach().requires_grad_() for x in vhat[:-1]]
            with torch.enable_grad(), Watched() as watched:
                energy = parts.run(L + 2, own, *beliefs)
            check_scalar("prior", energy)
            if watched.drawn or watched.written & outside:
                raise Uncovered("prior draws random numbers or changes its buffers")
            self.leaves_of[L + 2] = _places(_captured(energy, beliefs, "prior").leaves, own)
        self._before = {
            k: held.place(clone) for k, clone in before.items() if storage(inputs[k]) in written
        }
        self._hold(vhat, Loss, dLdy)
        return [*held.tensors[count:], *found]

    def _inputs_asked(self, l: int, x: Sequence[Tensor]) -> list[Tensor]:
        """Those of layer l's inputs that are the model's, if its error is asked for."""
        parents = self.asked.parents[l - 1]
        return [a for p, a in zip(parents, x, strict=True) if p == 0 and self.asks_input]

    def _begin(self, *given: Any) -> list[Tensor]:
        """The state at the start."""
        network = Traced(self, given, size=len(self.asked.free))
        energy = network.energy()
        energy.stand_at([x.clone() for x in network.state])
        rule = network.begun(energy)
        kept = slots(energy, [rule, *energy.factors])
        self._changed = list(range(self.size))
        return [*energy.variables, *[kept[slot] for slot in self.slots]]

    def _step(self, j: int, count: int, is_masked: bool, *given: Any) -> list[Tensor]:
        """What changes of the state in ``count`` steps where ``reach[j]`` have moved."""
        network = Traced(self, given, is_masked)
        energy, rule = network.resumed(self.reach[j])
        before = [(x, x._version) for x in self._state_of(energy, rule)]
        for _ in range(count):
            take_step(energy, rule)
        after = self._state_of(energy, rule)
        self._changed = [k for k, x in enumerate(after) if _is_new(x, before[k])]
        return [after[k] for k in self._changed]

    def _state_of(self, energy: Energy, rule: Rule) -> list[Tensor]:
        kept = slots(energy, [rule, *energy.factors])
        return [*energy.variables, *[kept[slot] for slot in self.slots]]

    def _errors_of(self, *given: Any) -> list[Tensor]:
        """The hidden errors of beliefs that have moved so far."""
        network = Traced(self, given, size=len(self.asked.free))
        energy = network.energy(in_errors=False)
        energy.stand_at([x.clone() for x in network.state])
        energy.retake()
        return energy.epsilon[1:-1]

    def _judge(self, *given: Any) -> list[Tensor]:
        """What the rule decides by in the end."""
        energy, rule = Traced(self, given).resumed()
        energy.settle()
        verdict = rule.judge(energy)
        if verdict is None:
            raise Uncovered(f"{rule} judges by nothing")
        return [verdict]

    def _updates(self, *given: Any) -> list[Tensor]:
        """The beliefs that move, the output's, the errors where they are taken at the end, the input's
        error, the updates."""
        asked, L = self.asked, self.asked.L
        network = Traced(self, given)
        energy, _ = network.resumed()
        if asked.takes_errors:
            energy.retake()
        v = at = energy.beliefs()
        if asked.update_at == "before":
            at, before = list(v), network.others
            for i, d in zip(asked.free, before, strict=True):
                at[i] = network.vhat[i] + d
        weighted = energy.weighted
        cut = list(map(network.found, self._cut))
        rest = list(fx.Interpreter(self._rest).run(*cut, *[weighted[l] for l in self._at_vhat]))

        def of_layer(l: int, error: Tensor) -> OfLayer | None:
            if l not in self._at_vhat:
                return None
            leaves = [network.own[k] for k in self.leaves_of[l]]
            inputs = len(self._inputs_asked(l, [network.vhat[p] for p in asked.parents[l - 1]]))
            mine = [rest.pop(0) for _ in range(len(leaves) + inputs)]
            return OfLayer(leaves, mine[: len(leaves)], mine[len(leaves) :], network.vhat[l])

        beta = energy.output.beta
        input_error, found = updates(network, at, weighted, v, of_layer, beta)
        place = {id(x): k for k, x in enumerate(network.own)}
        by_place = {place[id(leaf)]: update for leaf, update in found.items()}
        # What a layer does not depend on after all.
        of_leaves = [
            by_place[k] if k in by_place else torch.zeros_like(network.own[k]) for k in self.used
        ]
        return [
            *[v[i] for i in asked.free],
            v[L],
            *(energy.epsilon[1:] if self.retakes else []),
            *([input_error] if input_error is not None else []),
            *of_leaves,
        ]

    @property
    def retakes(self) -> bool:
        """Whether the errors are those at the final beliefs, which ``updates`` takes."""
        return self.asked.takes_errors or self.asked.kind == "errors"

    # Parts of these.

    def _evaluated(self, l: int, own: Sequence[Any], x: Sequence[Tensor]) -> Tensor:
        """The output of layer l at ``x``, with its graph."""
        for a in x:
            a.requires_grad_(a.is_floating_point())
        versions = [a._version for a in x]
        with torch.enable_grad():
            output = self.parts.run(l, own, *x)
            if versions != [a._version for a in x] or not output.dtype.is_floating_point:
                raise Uncovered(f"{self.asked.names[l - 1]} is no function of its input")
            if output.is_leaf or output._is_view():
                output = own_output(output, x)
        graph = _captured(output, x, self.asked.names[l - 1])
        self.leaves_of[l] = _places(graph.leaves, own)
        self._is_linear[l], self._is_foreign[l] = not graph.foreign, graph.is_foreign
        return output

    def _hold(self, vhat: Sequence[Tensor], Loss: Tensor, dLdy: Tensor) -> None:
        """Hold what a feed-forward pass has found, and what the captured call returns."""
        held, parts = self._held, self.parts
        self.vhat = [held.whole(x) for x in vhat]
        self.Loss, self.dLdy = held.whole(Loss.detach().clone()), held.whole(dLdy.detach())
        self.results = [
            self.Loss if result in parts.marks else held.whole(parts.kept[result])
            for result in parts.results
        ]

    def with_leaves(self, inputs: Sequence[Any]) -> list[Any]:
        """Tensors that require grad where they should, and that may be written into."""
        own = list(inputs)
        for k in self.used:
            own[k] = inputs[k].detach().requires_grad_()
        for k in self._before:
            own[k] = inputs[k].clone()
        return own


class _Alike:
    """A factor of which only it counts which beliefs it pulls at."""

    def __init__(self, parents: tuple[int, ...], target: int | None, is_awake: bool) -> None:
        self.parents, self.target, self.is_awake = parents, target, is_awake
        self.beliefs = frozenset([*parents, *([] if target is None else [target])])

    def pulls(self, x: Sequence[Any], down: bool) -> Any:
        for i in self.beliefs:
            yield i, [(_nothing, 1.0)]


_nothing = torch.zeros(())


def reach(asked: Asked) -> list[frozenset[int]]:
    """The beliefs that have moved after 0, 1, ... steps from the feed-forward pass, until all have."""
    L, awake = asked.L, {of.place for of in asked.energies if not of.is_at_rest}
    factors = [
        _Alike(asked.moving(l), None if l == L else l, l == L or l in awake)
        for l in range(L, 0, -1)
    ]
    energy = Beliefs(factors, [_nothing] * (L + 1), asked.free)
    found = [frozenset[int]()]
    while True:
        energy.sweep(lambda i, parts: None)
        if energy.moved == found[-1]:
            return found
        found.append(frozenset(energy.moved))


def reached(asked: Asked, moved: frozenset[int]) -> list[bool]:
    """Whether each layer has an error where these beliefs have moved."""
    awake = {asked.L, *[of.place for of in asked.energies if not of.is_at_rest]}
    layers = range(1, asked.L + 1)
    return [l in awake or not moved.isdisjoint([l, *asked.moving(l)]) for l in layers]


def levels(count: int, L: int) -> list[int]:
    """Of how far errors have reached, 0 to ``count - 1``, where steps are compiled for.

    All in up to 10 layers, but for the last but one, whose step is nearly the last one's; fewer in deeper
    models, as what they evaluate has to be compiled.
    """
    apart = max(1, min(round(L * L / 80), count // 2))
    last = count - 1
    return [last, *range(last - 1 - apart, -1, -apart)]


def _is_new(x: Tensor, before: tuple[Tensor, int] | None) -> bool:
    """Whether it is another tensor than before, or was written into."""
    return before is None or before[0] is not x or before[1] != x._version


def most_steps(L: int) -> int:
    """How many steps are one graph, once errors have reached all layers.

    What Python does between two of them counts where there are few layers; with many it hardly does, and to
    compile more than one step would take long.
    """
    return max(1, min(3, 12 // L))


def _captured(output: Tensor, inputs: Sequence[Tensor], name: str) -> Below:
    """What the graph of ``output`` is made of, if its backward pass can be captured.

    That of an ``autograd.Function`` was, with guards for what it uses. That of a custom operation would
    be traced as it is now, whatever it uses.
    """
    graph = below(output, inputs)
    if any([type(node).__name__.startswith("GeneratedBackward") for node in graph.foreign]):
        raise Uncovered(f"{name}: a custom operation has a backward of its own")
    return graph


def _leaf(x: Any) -> Any:
    if not isinstance(x, Tensor) or not x.requires_grad:
        return x
    return x.detach().requires_grad_()


def _places(leaves: Sequence[Tensor], own: Sequence[Any]) -> list[int]:
    return [k for k, x in enumerate(own) if any(x is leaf for leaf in leaves)]
