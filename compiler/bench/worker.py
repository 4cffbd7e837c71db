"""The process of one candidate: `python -m chunkc.bench.worker REQUEST RESULT`, two JSON files.

What is known is written as it is found, so that a candidate that dies later has what it reached."""

from __future__ import annotations

import inspect
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from chunkc.artifact import load_package, pack, replace_folder
from chunkc.backends.package import emit_files
from chunkc.backends.writer import public
from chunkc.bench.draws import Operand, operands, weights
from chunkc.bench.masks import causal, mask_of
from chunkc.bench.parts import Part, parts_of
from chunkc.bench.peers import PEERS, Extra
from chunkc.bench.roles import roles_of
from chunkc.bench.sizes import Sizes
from chunkc.bench.timing import DTYPES, Call, Results, median_ms, peak_mib, rates, seconds
from chunkc.driver import compile_source
from chunkc.interp import Interpreter, Run
from chunkc.ir import nodes as N
from chunkc.ir.diagnostics import SourceFile

SHORT = 70  # tokens of the check: more than a tile, and not a multiple of one
TOLERANCE = {torch.bfloat16: 5e-2, torch.float32: 4e-3}  # ‖x − exact‖ over ‖exact‖; products may be in TF32
ROUNDINGS = 8.0  # it may also be off by what so many roundings of the inputs do to it
LEAST = 1e-2  # a tensor counts as at least this part of the largest

Say = Callable[..., None]


class Candidate(Protocol):
    """Something that is timed."""

    def prepare(self) -> None:
        """Import what is called."""

    def call(self, sizes: Sizes) -> Call:
        """The function on random tensors of these sizes."""

    def exact(self, sizes: Sizes, seed: int, nudge: float = 0.0) -> Results:
        """Its outputs and gradients in float64, by definition; of inputs that are changed by up to this part."""


def request_part(request: Mapping[str, Any]) -> Part:
    path = Path(request["file"])
    compiled = compile_source(SourceFile.read(path, path.name), tuned=request.get("tuned", True))
    unit = next(u for u in compiled.checked.module.units if u.name == request["unit"])
    index: int = request["part"]
    return parts_of(compiled, unit)[index]


class Emitted:
    """The package that chunkc emits for a part."""

    def __init__(self, request: Mapping[str, Any], folder: Path, built: bool = False) -> None:
        """`built`: the folder holds it already, perhaps with the file's other units."""
        self.part, self.folder = request_part(request), folder
        self.unit = self.part.unit
        self.seed, self.device, self.dtype = request["seed"], request["device"], DTYPES[request["dtype"]]
        if not built:
            replace_folder(pack(self.part.compiled, emit_files, {}), folder)
        self.layer: torch.nn.Module | None = None

    def prepare(self) -> None:
        self.module = load_package(self.folder)

    def tensors(self, given: Sequence[Operand]) -> dict[str, Tensor]:
        drawn = {o.name: o.draw(self.seed, self.device, self.dtype) for o in given}
        return {n: x.requires_grad_() if x.is_floating_point() or x.is_complex() else x for n, x in drawn.items()}

    def call(self, sizes: Sizes) -> Call:
        function = getattr(self.module, public(self.unit.name))
        inputs = self.tensors(operands(self.unit, sizes))
        if self.unit.kind == "layer":
            torch.manual_seed(self.seed)
            self.layer = function(**self.own(function, sizes), device=self.device, dtype=self.dtype)
            run = self.layer
            leaves = [*inputs.values(), *self.layer.parameters()]
            return self.of(lambda: run(*inputs.values()), leaves)
        more = self.tensors(weights(self.unit, sizes))
        named = {public(n): x for n, x in {**inputs, **more}.items()}
        own = self.own(function, sizes)
        return self.of(lambda: function(**named, **own), list(named.values()))

    def own(self, function: Callable[..., Any], sizes: Sizes) -> dict[str, Any]:
        """The parameters that the function takes."""
        takes = inspect.signature(function).parameters
        return {public(name): value for name, value in sizes.settings.items() if public(name) in takes}

    def of(self, run: Callable[[], Any], given: Sequence[Tensor]) -> Call:
        count = len(self.unit.graph.outputs)

        def forward() -> tuple[Tensor, ...]:
            out = run()
            return tuple(out)[:count] if isinstance(out, tuple) else (out,)

        return Call(forward, [x for x in given if x.requires_grad])

    def exact(self, sizes: Sizes, seed: int, nudge: float = 0.0) -> Results:
        """The interpreter's, on the very tensors of the call."""
        unit = self.part.semantic
        inputs = self.tensors(operands(unit, sizes))
        exactly = {n: _double(x[0], nudge) for n, x in inputs.items()}
        if self.layer is not None:
            known = {n.rstrip("_"): _double(p, nudge) for n, p in self.layer.named_parameters()}
            exactly |= {n.name: known[n.name.rstrip("_")] for n in unit.graph.of_kind(N.Param)}
        else:
            exactly |= {n: _double(x, nudge) for n, x in self.tensors(weights(unit, sizes)).items()}

        def forward() -> tuple[Tensor, ...]:
            machine = Interpreter(unit.graph, Run(sizes.settings, exactly, sizes.lengths))
            return tuple(self.batched(machine, id_) for _, id_ in unit.graph.outputs)

        order = list(exactly.values())
        if self.layer is not None:  # as the layer lists its parameters
            order = [*order[: len(inputs)], *known.values()]
        return Call(forward, [x for x in order if x.requires_grad]).results(seed, self.dtype)

    def batched(self, machine: Interpreter, id_: str) -> Tensor:
        """A value as a call gives it: [B, T, ...], with the batch that it is alone in."""
        axes, x = machine.graph[id_].axes, machine.value(id_)
        timed = [k for k, a in enumerate(axes) if machine.graph.axis[a].is_sequence]
        return x.movedim(timed[0], 0)[None] if timed else x


class Peer:
    """A function of another library."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        self.request, self.peer = request, PEERS[request["peer"]]
        self.seed, self.device, self.dtype = request["seed"], request["device"], DTYPES[request["dtype"]]
        self.given = [_read_operand(o) for o in request["operands"]]

    def extra(self, sizes: Sizes) -> Extra:
        part = request_part(self.request)
        roles = roles_of(part.unit.graph)
        masked = self.request["masked"] and roles is not None and roles.kind == "attention"
        tokens = max(sizes.lengths.values(), default=1)
        return Extra(self.request["scale"], mask_of(part.unit, roles, sizes) if masked and roles else causal(tokens))

    def prepare(self) -> None:
        import_module(self.peer.module)

    def tensors(self, sizes: Sizes, dtype: torch.dtype) -> dict[str, Tensor]:
        out = {}
        for o in self.given:
            tokens = max(sizes.lengths.values(), default=1)
            shape = o.shape if o.along is None else (sizes.batch, min(o.shape[1], tokens), *o.shape[2:])
            x = replace(o, shape=shape).draw(self.seed, self.device, dtype)
            out[o.name] = x if o.values is not None else x.requires_grad_()
        return out

    def call(self, sizes: Sizes) -> Call:
        x, function = self.tensors(sizes, self.dtype), self.peer.make(self.extra(sizes))
        return Call(lambda: (function(x),), [t for t in x.values() if t.requires_grad])

    def exact(self, sizes: Sizes, seed: int, nudge: float = 0.0) -> Results:
        rounded = self.tensors(sizes, self.dtype)
        x = {n: _double(t, nudge) for n, t in rounded.items()}
        extra = self.extra(sizes)
        leaves = [t for t in x.values() if t.requires_grad]
        return Call(lambda: (self.peer.definition(x, extra),), leaves).results(seed, self.dtype)


def _double(x: Tensor, nudge: float) -> Tensor:
    """The same numbers in float64 on the CPU, as a leaf; each made larger or smaller by a part of it."""
    if not (x.is_floating_point() or x.is_complex()):
        return x.detach().cpu()
    exactly = x.detach().cpu().to(torch.complex128 if x.is_complex() else torch.float64)
    if nudge:
        source = torch.Generator().manual_seed(x.numel())
        exactly = exactly * (1 + nudge * (2 * torch.rand(x.shape, generator=source) - 1))
    return exactly.requires_grad_(x.requires_grad)


def _read_operand(data: Mapping[str, Any]) -> Operand:
    values = data["values"]
    return Operand(**{**data, "shape": tuple(data["shape"]), "values": None if values is None else tuple(values)})


# -- one candidate -----------------------------------------------------------------------------------------------------


def measure(candidate: Candidate, sizes: Sizes, request: Mapping[str, Any], say: Say) -> None:
    """The first call, the check, then the times."""
    device, seed, dtype = request["device"], request["seed"], DTYPES[request["dtype"]]
    imported, _ = seconds(candidate.prepare, device)
    call = candidate.call(sizes)

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return call.forward()

    first, outs = seconds(forward, device)
    both = call.both(outs, seed, dtype) if call.leaves else None
    if both is not None:
        try:
            first += seconds(both, device)[0]
        except Exception as reason:  # a candidate may refuse its gradient and have its forward pass timed
            say(reason=f"backward: {said(reason)}")
            both = None
    say(first_s=imported + first)
    error, allowed = compared(candidate, sizes.short(SHORT), seed, dtype, both is not None)
    say(error=error)
    if not error <= allowed:
        say(reason=f"wrong: {error:.1e} from float64 on {SHORT} tokens")
        return
    say(forward_ms=median_ms(forward, device))
    if both is not None:
        if device == "cuda":
            say(peak_mib=peak_mib(both))
        say(both_ms=median_ms(both, device))


def compared(candidate: Candidate, sizes: Sizes, seed: int, dtype: torch.dtype, backward: bool) -> tuple[float, float]:
    """The largest error of an output or a gradient, in parts of its norm, and the largest that roundings explain: where
    inputs changed by one rounding change a result more than usual, so may those inside."""
    have = candidate.call(sizes).results(seed, dtype, backward)
    wanted = candidate.exact(sizes, seed)
    nudged = candidate.exact(sizes, seed, torch.finfo(dtype).eps)
    return worst(have, wanted), max(TOLERANCE[dtype], ROUNDINGS * worst(nudged, wanted))


def worst(have: Results, wanted: Results) -> float:
    return max((_error(a, b) for a, b in zip(have, wanted)), default=0.0)


def _error(have: Sequence[Tensor | None], wanted: Sequence[Tensor | None]) -> float:
    plain = [(_plain(a, b), _plain(b, a)) for a, b in zip(have, wanted) if a is not None or b is not None]
    shaped = [(a.reshape(b.shape), b) for a, b in plain]  # one sequence, with its batch or without
    pairs = [(a[torch.isfinite(b)], b[torch.isfinite(b)]) for a, b in shaped]  # infinity and nan have no error
    return apart(pairs)


def apart(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The largest difference of a tensor from what it should be, in parts of that one's norm; nan is infinite."""
    norms = [float(b.norm()) for _, b in pairs]
    floor = LEAST * max(norms, default=0.0)
    found = [float((a - b).norm()) / (max(n, floor) or 1.0) for (a, b), n in zip(pairs, norms)]
    return max((float("inf") if e != e else e for e in found), default=0.0)


def _plain(x: Tensor | None, like: Tensor | None) -> Tensor:
    """In float64 on the CPU; zeros for a gradient that is none."""
    if x is None:
        assert like is not None
        x = torch.zeros_like(like)
    x = x.detach().cpu()
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def said(reason: BaseException) -> str:
    """An exception on one line."""
    text = next((line.strip() for line in str(reason).splitlines() if line.strip()), "")
    return f"{type(reason).__name__}: {text}"[:200].rstrip(": ")


def answer(request_file: str, result_file: str, perform: Callable[[Mapping[str, Any], Say], None]) -> None:
    """Do what a request asks for; what it says is in the result as soon as it is said."""
    request = json.loads(Path(request_file).read_text())
    found: dict[str, Any] = {}

    def say(**more: Any) -> None:
        found.update(more)
        Path(result_file).write_text(json.dumps(found))

    try:
        perform(request, say)
    except Exception as reason:  # whatever is raised is text in the report
        say(reason=said(reason))


def perform(request: Mapping[str, Any], say: Say) -> None:
    if request["candidate"] == "rates":
        bandwidth, rate = rates(request["device"], request["dtype"])
        say(bandwidth=bandwidth, rate=rate)
        return
    sizes = Sizes(request["settings"], request["lengths"], request["batch"])
    with tempfile.TemporaryDirectory() as folder:
        own = request["candidate"] == "chunkc"
        candidate = Emitted(request, Path(folder) / "measured") if own else Peer(request)
        measure(candidate, sizes, request, say)


if __name__ == "__main__":
    answer(sys.argv[1], sys.argv[2], perform)
