"""The rule table: for each kind of node at the normal level, how it is differentiated, cut into tiles, streamed, and
shared by ranks.

A rule either derives a graph, or names a convention that holds of the emitted code. What a node means, what must hold
of it and how it prints are further rules that every kind has: in `compiler/interp.py`, `ir/verify.py`, `ir/text.py`.
`tests/test_rules.py` demands a row for each kind in use, and compares each rule with the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from chunkc.ir import nodes as N
from chunkc.ir.graph import Graph
from chunkc.passes.chunk import Chunk
from chunkc.passes.differentiate import vjp
from chunkc.passes.pairs import derived
from chunkc.passes.stream import step


@dataclass(frozen=True)
class Rule:
    """A rule by name, what it says, and what it derives from a node, by the name of the node's field."""

    name: str
    says: str
    derive: Callable[[Graph, Any], dict[str, Any]] | None = None


@dataclass(frozen=True)
class Row:
    """The rules of one kind."""

    vjp: Rule
    chunk: Rule
    stream: Rule
    shard: Rule


AUTOGRAD = Rule("autograd", "it is emitted as statements that torch.autograd differentiates")
CONSTANT = Rule("constant", "no gradient goes through it")
LEAF = Rule("leaf", "it receives the gradient")
ADJOINT = Rule("adjoint", "the reversed scan, and the scan with other queries",
               lambda graph, scan: {"backward": vjp(graph, scan)})  # fmt: skip

PAIRS = Rule("pairs", "weights again from their sums; each source's gradients, added up over tiles",
             lambda graph, attend: {"sources": derived(attend).sources})  # fmt: skip

WHOLE = Rule("whole", "all tokens at once, in memory in proportion to them")
TOKENS = Rule("tokens", "a token at a time, for the reason that it carries")
TILES = Rule("tiles", "in tiles, forward and backward", Chunk().derive)

SEEN = Rule("seen", "in pairs of tiles, of queries and of rows, those that the mask lets be seen")

SAME = Rule("same", "the same statement on one token; along the sequence itself it looks ahead, and there is no step")
HISTORY = Rule("history", "the state keeps the last tokens that it reads")
POSITION = Rule("position", "the state keeps how many tokens there were")
NONE = Rule("none", "it needs the whole sequence: there is no step")
BODY = Rule("body", "its body once; the state keeps what it carries")
ROWS = Rule("rows", "the state keeps the rows, and each token adds its own")
STEP = Rule("step", "the reads, then the update", lambda graph, scan: {"step": step(graph, scan)})

LOCAL = Rule("local", "each rank has its own tokens; along the sequence itself a layout refuses it")
HALO = Rule("halo", "the last tokens of each rank go to the others")
SUMMARY = Rule("state_allgather", "what each rank keeps of a state and what it adds go to all")
RING = Rule("ring", "queries stay, rows go from rank to rank")
REFUSED = Rule(
    "refused", "it needs all tokens, or its steps are one by one; chunks that only count positions are local"
)

TABLE: dict[type[N.Node], Row] = {
    N.Input: Row(LEAF, WHOLE, SAME, LOCAL),
    N.Param: Row(LEAF, WHOLE, SAME, LOCAL),
    N.Const: Row(CONSTANT, WHOLE, SAME, LOCAL),
    N.Length: Row(CONSTANT, WHOLE, NONE, REFUSED),
    N.Coord: Row(CONSTANT, WHOLE, POSITION, LOCAL),
    N.Segment: Row(CONSTANT, WHOLE, POSITION, REFUSED),
    N.Bounds: Row(CONSTANT, WHOLE, POSITION, LOCAL),
    N.Map: Row(AUTOGRAD, WHOLE, SAME, LOCAL),
    N.Reduce: Row(AUTOGRAD, WHOLE, SAME, LOCAL),
    N.Normalize: Row(AUTOGRAD, WHOLE, SAME, LOCAL),
    N.Expand: Row(AUTOGRAD, WHOLE, SAME, LOCAL),
    N.Rename: Row(AUTOGRAD, WHOLE, SAME, LOCAL),
    N.Shift: Row(AUTOGRAD, WHOLE, HISTORY, HALO),
    N.Slice: Row(AUTOGRAD, WHOLE, SAME, LOCAL),
    N.Gather: Row(AUTOGRAD, WHOLE, SAME, LOCAL),
    N.Linear: Row(AUTOGRAD, WHOLE, SAME, LOCAL),
    N.Conv: Row(AUTOGRAD, WHOLE, HISTORY, HALO),
    N.Recur: Row(AUTOGRAD, TOKENS, BODY, REFUSED),
    N.Scan: Row(ADJOINT, TILES, STEP, SUMMARY),
    N.Attend: Row(PAIRS, SEEN, ROWS, RING),
    N.Out: Row(AUTOGRAD, WHOLE, SAME, LOCAL),
}
