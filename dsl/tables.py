"""The parser, and its tables in `__pycache__`: like Python's own, they are made anew when the grammar changes.

Building them takes a tenth of a second, which every call of the command would wait for."""

from __future__ import annotations

import contextlib
import hashlib
import marshal
import os
import sys
from functools import lru_cache
from pathlib import Path

import lark
from lark import Lark
from lark.grammar import Rule
from lark.lexer import TerminalDef

GRAMMAR = Path(__file__).parent / "grammar.lark"


@lru_cache(maxsize=1)
def grammar() -> Lark:
    """The LALR parser, made once a process."""
    text = GRAMMAR.read_text(encoding="utf-8")
    key = hashlib.sha256(f"{lark.__version__} {sys.version} {text}".encode()).hexdigest()
    path = GRAMMAR.parent / "__pycache__" / f"grammar.{key[:16]}.tables"
    return _read(path) or _build(text, path)


def _read(path: Path) -> Lark | None:
    """The parser from its tables; None where there are none, or a torn file."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    digest, data = stored[:32], stored[32:]
    if hashlib.sha256(data).digest() != digest:
        return None
    parser: Lark = Lark.__new__(Lark)._load(marshal.loads(data))
    return parser


def _build(text: str, path: Path) -> Lark:
    """The parser from the grammar; its tables are kept where that is allowed."""
    parser = Lark(text, parser="lalr", lexer="basic", propagate_positions=False, maybe_placeholders=True)
    if sys.dont_write_bytecode:
        return parser
    data, memo = parser.memo_serialize([TerminalDef, Rule])
    stored = marshal.dumps({"data": data, "memo": memo})
    new = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):  # as with Python's own: a folder that may not be written is no error
        path.parent.mkdir(exist_ok=True)
        new.write_bytes(hashlib.sha256(stored).digest() + stored)
        new.replace(path)
    return parser
