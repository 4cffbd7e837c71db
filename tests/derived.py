"""The scans of all specs and cases, with operands drawn for them: what tests of derived graphs run on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import cases
import torch
from shipped import RECURRENCES
from torch import Tensor

from chunkc.driver import check_source
from chunkc.interp import Interpreter, Run
from chunkc.ir import nodes as N
from chunkc.ir.axes import Axis
from chunkc.ir.diagnostics import SourceFile
from chunkc.ir.graph import Graph
from chunkc.passes.regions import Slot, renumbered, result_names, slots, state_axes
from chunkc.pipeline import run

TEXTS = {**RECURRENCES, **cases.OPS}
SIZES = (2, 3, 4, 5, 6, 7)
TOKENS = 21


@dataclass(frozen=True)
class Scan:
    """A scan, the graph that it stands in, and the operands' slots."""

    graph: Graph
    node: N.Scan
    slots: tuple[Slot, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(s.name for s in self.slots)

    def axes(self) -> tuple[Axis, ...]:
        """The axes, with small sizes of their own."""
        sized = [a for a in self.graph.axes if a.kind == "size"]
        sizes = {a.name: SIZES[n % len(SIZES)] for n, a in enumerate(sized)}
        return tuple(a.evolve(size={"op": "const", "value": sizes[a.name]}) if a.name in sizes else a
                     for a in self.graph.axes)  # fmt: skip

    def shape(self, axes: tuple[str, ...], tokens: int) -> list[int]:
        sizes = {a.name: int(a.size.evaluate({})) if a.size is not None else tokens for a in self.axes()}
        return [sizes[a] for a in axes]

    def alone(self) -> Graph:
        """The scan by itself over inputs, one a slot, and `initial`: its results by name."""
        state = state_axes(self.node)
        nodes: list[N.AnyNode] = [N.Input(id=s.name, name=s.name, axes=s.axes) for s in self.slots]
        nodes.append(N.Input(id="initial", name="initial", axes=state))
        scan = renumbered(self.node, self.names, "initial").evolve(id="scan")
        names = result_names(self.node, self.names)
        outs = [N.Out(id=f"result_{n}", arg="scan", index=n, axes=scan.result_axes(n)) for n in range(len(names))]
        outputs = tuple((name, out.id) for name, out in zip(names, outs))
        return Graph(level="normal", nodes=(*nodes, scan, *outs), outputs=outputs, axes=self.axes())

    def draw(self, tokens: int, seed: int = 0) -> dict[str, Tensor]:
        """Values for the operands and `initial`: a tenth of log-gates -100, a fifth of the others' gates 0."""
        torch.manual_seed(seed)
        values = {}
        for n, s in enumerate(self.slots):
            shape = self.shape(s.axes, tokens)
            x = torch.randn(shape)
            if self.node.algebra == "sum-product" and n < len(self.node.gates):
                x = cases.mixed(shape) if self.node.gates[n].log else cases.with_zeros(shape)
            values[s.name] = x.double().requires_grad_()
        state = torch.randn(self.shape(state_axes(self.node), tokens)).double()
        return {**values, "initial": state.requires_grad_()}


def outputs(graph: Graph, tensors: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """The graph's outputs by name; of parameters, numbers may be of `dk`."""
    lengths = {a.name: tokens for a in graph.axes if a.kind == "time"}
    machine = Interpreter(graph, Run(tensors=tensors, lengths=lengths, settings={"dk": 4.0}))
    return {name: machine.value(id_) for name, id_ in graph.outputs}


@cache
def scans(name: str) -> tuple[Scan, ...]:
    """The scans of a text with all that the passes derive."""
    units = check_source(SourceFile(f"{name}.spec", TEXTS[name])).module.units
    graphs = [run(u.graph) for u in units]
    return tuple(Scan(g, s, slots(g, s)) for g in graphs for s in g.of_kind(N.Scan))


ALL = [(name, n) for name in TEXTS for n in range(len(scans(name)))]
IDS = [f"{name}-{scans(name)[n].node.name}" for name, n in ALL]


def close(got: Tensor, want: Tensor, tolerance: float = 1e-11) -> bool:
    """Whether the norm of the difference is within the tolerance of the norm."""
    if got.shape != want.shape:
        return False
    return bool((got - want).norm() <= tolerance * want.norm() + 1e-30)
