"""The formatter: the shipped specs are laid out already, and every layout is reached."""

from __future__ import annotations

from pathlib import Path

import pytest

from chunkc.dsl import format as formatter
from chunkc.dsl.format import FormatError, format_source
from chunkc.dsl.parser import parse
from chunkc.ir.diagnostics import CompileError, SourceFile

SPECS = sorted((Path(__file__).resolve().parent.parent / "specs").glob("*.spec"))

RAGGED = """

# top
causal  layer   A( d:int=4,e :float=-1.5 ){   # head
# first


   axes{t:time,   # time
 i=4,
     j = - d ^ -2 ,k=4 groups i}
  "a doc  #no comment"
  x=(a
# inside
   +b)*-c   -d[t=t-1 ,h]  -  (  -e )
  y[t,d]=
  linear[ i,j->d ](x,bias=true)
     + z
     <=3
  w=linear[i->](x)

  recurrence   over t{
  state S[ h ]=-inf,
    U
     # end
  }
  input g[t] in[ 0,1 ]
  foo = f(
     a,
     not b
  )
  pick p of c if  b<3 by E keep top(3)
     always x or y
}
op B{}


parallel{mesh{a,b}
shard t over(r,u)
}
"""

EVEN = """# top
causal layer A(d: int = 4, e: float = -1.5) {  # head
  # first

  axes { t: time,  # time
    i = 4,
    j = -d^-2, k = 4 groups i }
  "a doc  #no comment"
  x = (a
    # inside
    + b) * -c - d[t = t - 1, h] - (-e)
  y[t, d] =
    linear[i, j -> d](x, bias = true)
    + z
    <= 3
  w = linear[i -> ](x)

  recurrence over t {
    state S[h] = -inf,
      U
    # end
  }
  input g[t] in [0, 1]
  foo = f(
    a,
    not b
  )
  pick p of c if b < 3 by E keep top(3)
    always x or y
}
op B {}

parallel { mesh { a, b }
  shard t over (r, u)
}
"""


def laid_out(text: str) -> str:
    return format_source(SourceFile("a.spec", text))


@pytest.mark.parametrize("path", SPECS, ids=lambda p: p.stem)
def test_shipped_specs_are_laid_out(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert laid_out(text) == text


@pytest.mark.parametrize("path", SPECS, ids=lambda p: p.stem)
def test_spaces_and_blank_lines_do_not_matter(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = [line if '"' in line else line.replace(", ", " ,").replace(" = ", "=") for line in text.split("\n")]
    ragged = "\n   ".join(lines).replace(" * ", "*").replace("  ", "\t")
    assert laid_out(ragged) == text
    assert laid_out("\n\n" + text + "\n\n") == text


def test_layouts() -> None:
    assert laid_out(RAGGED) == EVEN
    assert laid_out(EVEN) == EVEN
    assert laid_out(RAGGED.replace("\n", "\r\n")) == EVEN


@pytest.mark.parametrize(
    ("text", "even"),
    [
        ("", ""),
        ("\n \n", ""),
        ("#  note", "#  note\n"),
        ("\n# a\n\n\n\n# b  ", "# a\n\n# b\n"),
        ("op A{\n}", "op A {\n}\n"),
        ("op A{\nschedule{a=true,b = 1}\n}", "op A {\n  schedule { a = true, b = 1 }\n}\n"),
        ("op A {\nschedule {\na=true  # c\nb=1 ,\n c = 2}\n}",
         "op A {\n  schedule {\n    a = true  # c\n    b = 1,\n    c = 2 }\n}\n"),
    ],
)  # fmt: skip
def test_small_texts(text: str, even: str) -> None:
    assert laid_out(text) == even


def test_a_broken_text_is_refused() -> None:
    with pytest.raises(CompileError):
        laid_out("layer A {")


def test_a_change_of_meaning_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of what the tree leaves out: comments, and statements that this version does not build."""
    text = "# note\nop A {\n  order r of s by x\n}\n"
    for changed in ("op A {\n  order r of s by x\n}\n", text.replace("by x", "by y"), text.replace("A", "B")):
        monkeypatch.setattr(formatter, "_laid_out", lambda _, changed=changed: changed)
        with pytest.raises(FormatError):
            laid_out(text)
    answers = iter([text, text + "\n"])
    monkeypatch.setattr(formatter, "_laid_out", lambda _: next(answers))
    with pytest.raises(FormatError):
        laid_out(text)


def test_trees_ignore_layout() -> None:
    assert parse(SourceFile("a", RAGGED)) == parse(SourceFile("b", EVEN))
