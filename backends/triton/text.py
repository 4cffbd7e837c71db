"""Reads the text of a kernel back to the value that prints it: the text of the level `tiled` is the emitted text."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from functools import cache

from chunkc.backends.triton.kernel import (
    CONSTANTS,
    RANKS,
    Expr,
    If,
    Kernel,
    Let,
    Loop,
    Note,
    Statement,
    Store,
    lift,
    over,
)

OPERATORS = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.FloorDiv: "//", ast.Mod: "%", ast.RShift: ">>", ast.LShift: "<<",
    ast.BitAnd: "&", ast.BitOr: "|", ast.BitXor: "^", ast.Lt: "<", ast.LtE: "<=", ast.Eq: "==", ast.Gt: ">",
    ast.GtE: ">=", ast.NotEq: "!=", ast.Div: "/", ast.IsNot: "is not",
}  # fmt: skip
assert set(OPERATORS.values()) == set(RANKS)


def parse_kernels(text: str) -> dict[str, Kernel]:
    """The kernels of a module's text by name; helpers, which return something, are left out.

    Raises:
        ValueError: a kernel's text is none that a kernel prints; the number of the line first.
    """
    functions = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)]
    jitted = [f for f in functions if any(ast.unparse(d).startswith("triton.jit") for d in f.decorator_list)]
    kernels = [f for f in jitted if not any(isinstance(n, ast.Return) for n in ast.walk(f))]
    reader = _Reader(text)
    return {f.name: reader.kernel(f) for f in kernels}


@cache
def parse_expr(text: str) -> Expr:
    """An expression by its text."""
    return _Reader(text).expr(ast.parse(text, mode="eval").body)


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.sizes: tuple[str, ...] = ()
        self.comments = {
            token.start[0]: (token.string.removeprefix("#").strip(), not token.line[: token.start[1]].strip())
            for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type == tokenize.COMMENT
        }

    def kernel(self, node: ast.FunctionDef) -> Kernel:
        arguments = tuple(a.arg for a in node.args.args if a.annotation is None)
        constants = (a.arg for a in node.args.args if a.annotation is not None)
        self.sizes = tuple(c for c in constants if c not in CONSTANTS)
        last = self.body(node.body[1:], node.body[0].end_lineno or 0)
        doc = ast.get_docstring(node, clean=False) or ""
        return Kernel(node.name, doc, arguments, last, sizes=self.sizes)

    def body(self, nodes: list[ast.stmt], line: int) -> tuple[Statement, ...]:
        """Statements, with the comments on lines of their own before them."""
        out: list[Statement] = []
        for node in nodes:
            for between in range(line + 1, node.lineno):
                if between in self.comments:
                    out.append(Note(self.comments[between][0]))
            out.append(self.statement(node))
            line = node.end_lineno or node.lineno
        return tuple(out)

    def statement(self, node: ast.stmt) -> Statement:
        note, alone = self.comments.get(node.end_lineno or 0, ("", True))
        note = "" if alone else note
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            return Let(node.targets[0].id, self.expr(node.value), note=note)
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name) and isinstance(node.op, ast.Add):
            return Let(node.target.id, self.expr(node.value), add=True, note=note)
        if isinstance(node, ast.For) and isinstance(node.target, ast.Name) and isinstance(node.iter, ast.Call):
            stop = self.expr(node.iter.args[0])
            if not (what := over(stop.text(), self.sizes)):
                raise ValueError(f"line {node.lineno}: a loop over {stop.text()}")
            stages = next((self.source(k.value) for k in node.iter.keywords), "")
            return Loop(node.target.id, stop, what, self.body(node.body, node.lineno), stages)
        if isinstance(node, ast.If):
            orelse = self.body(node.orelse, node.orelse[0].lineno) if node.orelse else ()
            return If(self.expr(node.test), self.body(node.body, node.lineno), orelse)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            call = node.value
            if ast.unparse(call.func) == "tl.store":
                mask = next((self.expr(k.value) for k in call.keywords), None)
                return Store(self.expr(call.args[0]), self.expr(call.args[1]), mask)
        raise ValueError(f"line {node.lineno}: no statement of a kernel")

    def source(self, node: ast.expr) -> str:
        return ast.get_source_segment(self.text, node) or ast.unparse(node)

    def expr(self, node: ast.expr) -> Expr:
        if isinstance(node, ast.BinOp):
            return Expr(OPERATORS[type(node.op)], (self.expr(node.left), self.expr(node.right)))
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            return Expr(OPERATORS[type(node.ops[0])], (self.expr(node.left), self.expr(node.comparators[0])))
        if isinstance(node, ast.Subscript):
            return Expr("index", (self.expr(node.value),), (("at", ast.unparse(node.slice).strip("()")),))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "to":
            return Expr(".to", (self.expr(node.func.value), self.expr(node.args[0])))
        if isinstance(node, ast.Call) and ast.unparse(node.func) != "float":
            keywords = tuple((k.arg or "", self.source(k.value)) for k in node.keywords)
            return Expr(ast.unparse(node.func), tuple(self.expr(a) for a in node.args), keywords)
        if isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant):  # a number below 0
            return lift(self.source(node))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return Expr("neg", (self.expr(node.operand),))
        if isinstance(node, ast.Constant | ast.Name | ast.Attribute | ast.Tuple | ast.Call):
            return lift(re.sub(r"\s+", " ", self.source(node)))
        raise ValueError(f"line {node.lineno}: no expression of a kernel")
