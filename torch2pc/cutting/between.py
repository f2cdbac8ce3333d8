"""Operations that a model's forward does between its modules, as a module of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from torch2pc.cutting.forward import writes


def held_by(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """What operations use of the model's attributes."""
    waiting, found = list(nodes), dict[fx.Node, None]()
    for node in waiting:
        for before in node.all_input_nodes:
            if not before.meta["moves"] and before not in found:
                found[before] = None
                waiting.append(before)
    return [node for node in found if node.op == "get_attr"]


class Between(nn.Module):
    """Operations that a model's forward does between its modules, as a module.

    root: what the names in ``nodes`` start from; entries: the nodes whose values are given; replaced: what
    stands for some nodes; copies: whether it is to work on copies of what it is given.

    Parameters and buffers that they use are those of the model, under the same names. Numbers and
    modes are read from the model in each call.
    """

    def __init__(
        self,
        root: nn.Module,
        nodes: Sequence[fx.Node],
        entries: Sequence[fx.Node],
        replaced: Mapping[fx.Node, Any] | None = None,
        copies: bool = False,
    ) -> None:
        super().__init__()
        graph = fx.Graph()
        # What is neither an input that moves nor computed here is held: parameters, mostly.
        made: dict[fx.Node, Any] = {}
        arguments: set[str] = set()

        def argument(name: str) -> fx.Node:
            while name in arguments:
                name += "_"
            arguments.add(name)
            return graph.placeholder(name)

        for entry in entries:
            made[entry] = argument("x" if len(entries) == 1 else entry.name)
        reads: dict[tuple[nn.Module, str], fx.Node] = {}
        for node in held_by(nodes):
            if (read := node.meta.get("read")) is not None:
                if read not in reads:
                    reads[read] = argument(read[1])
                made[node] = reads[read]
        self.reads = list(reads)  # (A list: they are not to be parts of this module.)

        for entry in entries if copies else ():
            made[entry] = graph.call_method("clone", (made[entry],))

        def copy(node: fx.Node) -> Any:
            if node not in made:
                if replaced is not None and node in replaced:
                    made[node] = map_arg(replaced[node], copy)
                else:
                    made[node] = graph.node_copy(node, copy)
            return made[node]

        # One by one, so that random numbers are drawn in the order of the model.
        results = [copy(node) for node in nodes]
        graph.output(results[-1])
        for node in graph.nodes:
            node.meta.clear()  # values on the sample
        self.run = fx.GraphModule(root, graph, "Operations")
        self.inplace = any(map(writes, nodes)) and not copies

    def forward(self, *x: Tensor) -> Tensor:
        return self.run(*x, *[getattr(module, name) for module, name in self.reads])

    def train(self, mode: bool = True) -> Between:
        """Set the mode, also of the modules whose mode the operations ask for."""
        for module, name in self.reads:
            if name == "training":
                module.training = mode
        return super().train(mode)

    def extra_repr(self) -> str:
        lines = str(self.run.code).strip().splitlines()
        return "; ".join(line.partition(";")[0].strip() for line in lines[1:-1])
