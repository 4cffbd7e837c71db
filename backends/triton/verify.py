"""What holds of a kernel: names, shapes, masks and loops, found by walking over it once.

A shape is a tuple of sizes by name ("C", "BI", "1"); a scalar's is empty. Loads and stores are of pointers: a pointer
has the shape of its offsets. Of each value it is known which ranges (`tl.arange` and what is made of it) it depends on;
what a pointer depends on its mask must bound, since tiles and sides are ragged.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from chunkc.backends.triton.kernel import CONSTANTS, RANKS, Expr, If, Kernel, Let, Loop, Note, Statement, Store, over
from chunkc.backends.triton.text import parse_expr

Shape = tuple[str, ...]
ELEMENTWISE = (
    "tl.where", "tl.maximum", "tl.minimum", "tl.exp", "tl.log", "tl.sqrt", "tl.abs", "tl.floor", "tl.sigmoid", "tl.sin",
    "tl.cos", "tl.erf", "neg", "exp",
)  # fmt: skip
# Arguments that are numbers: places of a sequence, its tiles; what a result is multiplied by.
NUMBERS = (
    "queries",
    "rows",
    "sequences",
    "tiles",
    "tokens",
    "each",
    "segment",
    "parts",
    "levels",
    "upper_levels",
    "scale_",
)
PLACES = (
    "tile_start",
    "tile_stop",
    "sequence_start",
    "sequence_tile",
    "is_mild",
)  # functions beside the kernels: where tiles lie
BOUNDS = {"row": "stop", "col_i": "I", "col_j": "J", "col": "D"}  # where ranges end: with a sequence, with a side


class KernelError(Exception):
    """A kernel breaks a rule: its name, the statement's text, and how."""


@dataclass(frozen=True)
class Known:
    """What is known of a value: its shape, the ranges it depends on, those that it is true inside of only, and whether
    it is a pointer."""

    shape: Shape = ()
    ranges: frozenset[str] = frozenset()
    bounded: frozenset[str] = frozenset()
    pointer: bool = False


def verify_kernel(kernel: Kernel) -> None:
    """Check a kernel.

    Raises:
        KernelError: a rule does not hold.
    """
    for name in kernel.arguments:
        if not name.endswith("_ptr") and not name.startswith(NUMBERS):
            raise KernelError(f"{kernel.name}: argument '{name}' is no pointer")
    names = (*kernel.arguments, *kernel.sizes, *CONSTANTS)
    known = {name: Known(pointer=name.endswith("_ptr")) for name in names}
    _Walk(kernel.name, kernel.sizes, {**BOUNDS, **dict(kernel.ends)}).body(kernel.body, known)


@dataclass
class _Walk:
    kernel: str
    sizes: tuple[str, ...]
    ends: dict[str, str]
    where: str = ""
    loops: list[str] = field(default_factory=list)

    def fail(self, what: str) -> KernelError:
        return KernelError(f"{self.kernel}: {self.where}: {what}")

    def body(self, body: tuple[Statement, ...], known: dict[str, Known]) -> None:
        for s in body:
            if isinstance(s, Let):
                self.where = f"{s.name} {'+=' if s.add else '='} {s.value.text()}"
                self.let(s, known)
            elif isinstance(s, Store):
                self.where = f"store to {s.pointer.text()}"
                pointer = self.value(s.pointer, known)
                self.same(self.broadcast(pointer, self.value(s.value, known)).shape, pointer.shape)
                self.masked(pointer, s.mask, known)
            elif isinstance(s, Loop):
                self.loop(s, known)
            elif isinstance(s, If):
                self.where = f"if {s.cond.text()}"
                self.same(self.value(s.cond, known).shape, ())
                self.loops.append("if")  # what is first defined inside does not exist behind it
                self.body(s.body, {**known})
                self.body(s.orelse, {**known})
                self.loops.pop()
            else:
                assert isinstance(s, Note)

    def let(self, s: Let, known: dict[str, Known]) -> None:
        value = self.value(s.value, known)
        before = known.get(s.name)
        if s.add and before is None:
            raise self.fail(f"'{s.name}' is added to before it is defined")
        if before is not None and (s.add or self.loops):
            self.same(self.broadcast(before, value).shape if s.add else value.shape, before.shape)
        if s.value.op == "tl.arange":
            value = Known(value.shape, value.ranges | {s.name})
        elif any(x.op == "tl.arange" for x in s.value.walk()):  # a block of a side: its own range
            value = Known(value.shape, frozenset({s.name}))
        known[s.name] = value

    def loop(self, s: Loop, known: dict[str, Known]) -> None:
        """A loop over tiles, levels or blocks. What is first defined inside does not exist behind it."""
        self.where = f"for {s.name} in range({s.stop.text()})"
        if over(s.stop.text(), self.sizes) != s.over:
            raise self.fail(f"it runs over {s.over}")
        self.same(self.value(s.stop, known).shape, ())
        inner = {**known, s.name: Known()}
        self.loops.append(s.over)
        self.body(s.body, inner)
        self.loops.pop()

    # -- expressions -------------------------------------------------------------------------------------------------

    def same(self, have: Shape, want: Shape) -> None:
        if have != want:
            raise self.fail(f"its shape is ({', '.join(have)}), not ({', '.join(want)})")

    def broadcast(self, *values: Known) -> Known:
        """The common shape: scalars fit all, else ranks are equal and sizes equal or 1."""
        shape: Shape = ()
        for v in values:
            if shape and v.shape and len(shape) != len(v.shape):
                raise self.fail(f"({', '.join(shape)}) meets ({', '.join(v.shape)})")
            pairs = list(zip(shape or v.shape, v.shape or shape))
            if any(a != b and "1" not in (a, b) for a, b in pairs):
                raise self.fail(f"({', '.join(shape)}) meets ({', '.join(v.shape)})")
            shape = tuple(b if a == "1" else a for a, b in pairs)
        return Known(shape, frozenset().union(*(v.ranges for v in values)))

    def masked(self, pointer: Known, mask: Expr | None, known: dict[str, Known]) -> None:
        """The mask fits the pointer and bounds all that it ranges over."""
        if not pointer.pointer:
            raise self.fail("it is no pointer")
        bound = self.value(mask, known) if mask is not None else Known()
        self.same(self.broadcast(pointer, bound).shape, pointer.shape)
        open_ = pointer.ranges - bound.bounded - ({"row"} if "whole tiles" in self.loops else set())
        if open_:
            raise self.fail(f"no mask bounds {', '.join(sorted(open_))}")

    def value(self, e: Expr, known: dict[str, Known]) -> Known:
        if not e.args and not e.keywords:
            return self.name(e.op, known)
        args = [self.value(a, known) for a in e.args if not a.op.startswith(("(", "tl.float", "tl.int"))]
        if e.op == "index":
            at = e.keywords[0][1]
            if len(args[0].shape) != 1 or at not in (":, None", "None, :"):
                raise self.fail(f"[{at}] of a value of shape ({', '.join(args[0].shape)})")
            (size,) = args[0].shape
            return Known((size, "1") if at == ":, None" else ("1", size), args[0].ranges, args[0].bounded)
        if e.op in RANKS:
            return self.infix(e, args)
        if e.op in ELEMENTWISE:
            return self.broadcast(*args)
        return self.call(e, args, known)

    def infix(self, e: Expr, args: list[Known]) -> Known:
        if e.op == "is not":
            return Known()
        out = self.broadcast(*args)
        if any(a.pointer for a in args):
            if e.op != "+" or args[1].pointer:
                raise self.fail("an offset is added to a pointer, and nothing else is done with one")
            return Known(out.shape, out.ranges, pointer=True)
        if e.op == "<":
            return Known(
                out.shape, out.ranges, frozenset(r for r in args[0].ranges if self.ends.get(r) == e.args[1].op)
            )
        if e.op == "&":
            return Known(out.shape, out.ranges, args[0].bounded | args[1].bounded)
        return out

    def name(self, op: str, known: dict[str, Known]) -> Known:
        if op in known:
            return known[op]
        literals = ("True", "None", 'float("-inf")', 'float("inf")')
        if op.removeprefix("-")[0].isdigit() or op in literals or op.startswith("("):
            return Known()
        raise self.fail(f"'{op}' is not defined")

    def call(self, e: Expr, args: list[Known], known: dict[str, Known]) -> Known:
        keywords = dict(e.keywords)
        if e.op in ("tl.program_id", "tl.cdiv", *PLACES):
            return Known()
        if e.op in (".to", "tl.max_contiguous", "rounded", "tl.cumsum"):
            return args[0]
        if e.op == "tl.arange":
            return Known((e.args[1].op,))
        if e.op in ("tl.zeros", "tl.broadcast_to"):
            wanted = next(a.op for a in e.args if a.op.startswith("("))
            shape = tuple(x for x in wanted.strip("()").replace(" ", "").split(",") if x)
            if e.op == "tl.broadcast_to":
                self.same(self.broadcast(Known(shape), args[0]).shape, shape)
            return Known(shape)
        if e.op == "tl.load":
            mask = parse_expr(keywords["mask"]) if "mask" in keywords else None
            self.masked(args[0], mask, known)
            return Known(args[0].shape)
        if e.op in ("walk", "walk_max"):
            self.same(args[1].shape, args[0].shape)
            self.same(args[2].shape, args[0].shape[1:])
            return Known(args[0].shape)
        if e.op in ("walk_back", "passed"):
            self.same(args[1].shape, args[0].shape)
            if e.op == "walk_back":
                self.same(args[2].shape, args[0].shape[1:])
            return Known(args[0].shape if e.op == "walk_back" else args[0].shape[1:])
        if e.op == "product":
            return Known(args[0].shape[1:])
        if e.op in ("tl.sum", "tl.max", "tl.min"):
            return self.sum(e, args[0], keywords)
        return self.product(e, args)

    def sum(self, e: Expr, x: Known, keywords: dict[str, str]) -> Known:
        axis = int(e.args[1].op)
        if axis >= len(x.shape):
            raise self.fail(f"a sum over axis {axis} of ({', '.join(x.shape)})")
        kept = ("1",) if keywords.get("keep_dims") == "True" else ()
        return Known((*x.shape[:axis], *kept, *x.shape[axis + 1 :]))

    def product(self, e: Expr, args: list[Known]) -> Known:
        """Matrix products and transposes: operands are matrices, and what is summed over is one size."""
        if e.op not in ("tl.dot", "tl.trans", "masked_sum"):
            raise self.fail(f"'{e.op}' is no function of kernels")
        matrices = [a.shape for a in args[: 1 if e.op == "tl.trans" else 2]]
        if any(len(m) != 2 for m in matrices):
            raise self.fail(f"{e.op} of what is no matrix")
        if e.op == "tl.trans":
            return Known(matrices[0][::-1])
        self.same((matrices[0][1],), (matrices[1][0],))
        return Known((matrices[0][0], matrices[1][1]))
