"""The documents: every spec in them is checked and built, every Python block is run, every table is kept in step."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from chunkc.backends.package import emit_files
from chunkc.driver import compile_source
from chunkc.dsl import prelude
from chunkc.dsl.parser import RESERVED
from chunkc.dsl.tables import grammar
from chunkc.ir import nodes as N
from chunkc.ir.diagnostics import CompileError, SourceFile

ROOT = Path(__file__).resolve().parent.parent
LANGUAGE, README = ROOT / "docs" / "language.md", ROOT / "README.md"
PAGES = (LANGUAGE, README)
DOCS = ROOT / "docs"
WRITTEN = (*PAGES, DOCS / "architecture.md", DOCS / "derivation.md", *sorted((DOCS / "adr").glob("*.md")))


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: what stands behind the fence, and its text."""

    place: str
    kind: str
    text: str

    def says(self, key: str) -> str | None:
        """What a comment at the top says: `# key: value`."""
        found = re.match(rf"(?:# .*\n)*?# {key}: (.*)\n", self.text)
        return found[1] if found else None


def blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\S[^\n]*)\n(.*?)^```$", text, re.M | re.S)
    return [Block(f"{path.name}:{text[: m.start()].count(chr(10)) + 1}", m[1], m[2]) for m in found]


BLOCKS = [b for page in PAGES for b in blocks(page)]
SPECS = [b for b in BLOCKS if b.kind == "spec"]
RUN = [b for b in BLOCKS if b.kind == "python run"]


def named(block: Block) -> str:
    return block.says("file") or "page.spec"


def files(block: Block) -> dict[str, str]:
    source = SourceFile(named(block), block.text)
    return emit_files(source, compile_source(source).units, {})


@pytest.mark.parametrize("block", SPECS, ids=lambda b: b.place)
def test_a_spec_is_what_the_page_says(block: Block) -> None:
    source = SourceFile(named(block), block.text)
    wanted = block.says("error")
    if wanted is not None:
        with pytest.raises(CompileError) as caught:
            compile_source(source)
        assert [f"[{d.code}]" for d in caught.value.diagnostics] == [wanted]
        return
    compiled = compile_source(source)
    grows = "may grow" in (block.says("sequential") or "")
    assert [d.code for d in compiled.checked.warnings] == ["gate-may-grow"] * grows
    reasons = [n.reason for u in compiled.units for n in u.graph.of_kind(N.Recur)]
    if (reason := block.says("sequential")) is not None:
        assert len(reasons) == 1 and reason in reasons[0]
    else:
        assert not reasons
    for name, text in emit_files(source, compiled.units, {}).items():
        compile(text, name, "exec")


@pytest.mark.parametrize("block", RUN, ids=lambda b: b.place)
def test_python_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = f"layers_{block.place.replace('.', '_').replace(':', '_')}".lower()  # imported once a process
    for spec in SPECS:
        if spec.says("file"):
            package = tmp_path / folder / named(spec).removesuffix(".spec")
            package.mkdir(parents=True, exist_ok=True)
            for name, text in files(spec).items():
                (package / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    exec(compile(block.text.replace("from layers.", f"from {folder}."), block.place, "exec"), {"__name__": "page"})


def test_there_are_enough() -> None:
    assert len(SPECS) >= 12 and len(RUN) >= 3
    assert {"gated.spec", "mixer.spec"} <= {named(b) for b in SPECS}


def rows(*tables: dict[str, prelude.Function]) -> list[str]:
    out = []
    for table in tables:
        for f in table.values():
            count = str(f.least) if f.least == f.most else f"{f.least} to {f.most}"
            out.append(f"| `{f.name}` | {count} | {f.doc} |")
    return out


def section(title: str) -> str:
    """The part of the language's page under a heading of the second level."""
    text = LANGUAGE.read_text(encoding="utf-8")
    return text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_the_prelude_is_whole() -> None:
    """Were a row to differ, this shows what the page should say."""
    text = section("Prelude")
    have = [line for line in text.splitlines() if re.match(r"\| `\w+` \| ", line)]
    assert have == rows(prelude.ELEMENTWISE, prelude.REDUCERS, prelude.NORMALISERS, prelude.POSITIONED,
                        prelude.WEIGHTED, prelude.INITIAL, prelude.SIZES)  # fmt: skip
    assert "Constants: " + ", ".join(f"`{c}`" for c in prelude.CONSTANTS) + "." in text
    later = re.search(r"^\| prelude \| (.*) \|$", section("Not built yet"), re.M)
    assert later is not None and later[1].replace("`", "").split() == list(prelude.LATER)


def test_the_reserved_words_are_whole() -> None:
    text = re.search(r"reserved everywhere: `(.*?)`, and for later use `(.*?)`", section("Files"), re.S)
    assert text is not None
    keywords = {t.pattern.value for t in grammar().terminals if t.pattern.value.isalpha()}
    assert set(text[1].split()) == keywords
    assert set(text[2].split()) == RESERVED


@pytest.mark.parametrize(
    ("what", "body"),
    [
        ("'ulysses'", "parallel { mesh { a }\n shard t over a\n attention via ulysses }"),
        ("over several axes", "parallel { mesh { a, b }\n shard t over (a, b) }"),
        ("chunks by 'windows'", "chunk c of t = windows(4, 2)"),
        ("chunks by 'cut'", "chunk c of t = cut(x, max = 3)"),
        ("chunks by 'powers'", "chunk c of t = powers"),
        ("'in' with a list", "y = x in x"),
        ("across calls", "state s[e]"),
        ("over two sequence axes", "k[s, e] = x\n output y = x * k"),
        ("what the recurrence computes", "recurrence over t { state z[e]\n z = z + (z + x)[t = t - 1] }"),
        ("'grad'", "y = grad(x)"),
    ],
)
def test_what_is_not_built_says_so(what: str, body: str) -> None:
    outside = body.startswith("parallel")
    text = "op a(flag: bool = true) {\n  axes { t: time, s = t, e = 4 }\n  input x[t, e]\n"
    text += ("" if outside else body) + "\n  output x\n}\n" + (body if outside else "")
    with pytest.raises(CompileError) as caught:
        compile_source(SourceFile("page.spec", text))
    first = caught.value.diagnostics[0]
    assert first.code == "not-yet" and what in first.message


def reasons() -> list[tuple[str, str]]:
    """The rows of the table of recurrences that run a token at a time: statements, and the reason given."""
    rows = re.findall(r"^\| (`.*`) \| (.*) \|$", section("Recurrences"), re.M)
    return [("\n".join(re.findall(r"`(.*?)`", code)), reason) for code, reason in rows]


@pytest.mark.parametrize(("statements", "reason"), reasons())
def test_why_a_recurrence_runs_a_token_at_a_time(statements: str, reason: str) -> None:
    states = [line.split(" = ")[0] for line in statements.splitlines()]
    matrix = states == ["S"]
    text = f"""op a(n: int, m: int) {{
      axes {{ t: time, i = n, j = m }}
      input x[t, i], k[t, i], v[t, j], b[t]
      recurrence over t {{
        {"state S[i, j]" if matrix else "state " + ", ".join(f"{s}[i]" for s in states)}
        {statements}
        o = {"sum[i](S)" if matrix else " + ".join(states)}
      }}
      output o
    }}
    """
    (unit,) = compile_source(SourceFile("page.spec", text)).units
    found = [n.reason for n in unit.graph.of_kind(N.Recur)]
    assert found == [reason]


def test_the_readme_shows_what_is_emitted() -> None:
    """The kernel's lines stand in this order in what is built from the spec above it; comments may be left out."""
    (spec,) = (b for b in blocks(README) if b.kind == "spec")
    (kernel,) = (b for b in blocks(README) if b.kind == "python")
    made = iter(line.split("  #")[0].strip() for line in files(spec)["_kernels.py"].splitlines())
    for line in kernel.text.splitlines():
        wanted = line.split("  #")[0].strip()
        assert wanted in made, f"the emitted kernel has no line '{wanted}' here"


@pytest.mark.parametrize("path", WRITTEN, ids=lambda p: p.name)
def test_links_and_file_names_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose):
        assert "://" in target or (path.parent / target).exists(), target
    for name in re.findall(r"`((?:[a-z]+/)+[\w.]+\.(?:py|md|lark|spec))`", text):
        assert (ROOT / name).exists(), name


def test_the_editors_grammar_knows_the_words() -> None:
    """Each keyword, kept word, function and constant is colored, and nothing else is taken for one."""
    rules = json.loads((ROOT / "docs" / "editors" / "chunkc.tmLanguage.json").read_text())["patterns"]
    worded = [r for r in rules if "name" in r and r.get("match", "").startswith("\\b(")]
    listed = {r["name"]: set(re.findall(r"[a-z_0-9]{2,}", r["match"])) for r in worded}
    keywords = {t.name.lower() for t in grammar().terminals if t.pattern.value.isalpha() and t.name.isupper()}
    assert listed["keyword.control.chunkc"] | listed["keyword.operator.logical.chunkc"] == keywords
    assert listed["invalid.deprecated.chunkc"] == set(RESERVED)
    assert listed["support.function.chunkc"] | listed["constant.language.chunkc"] == set(prelude.NAMES)
    for rule in rules:
        re.compile(rule.get("match", rule.get("begin", "")))
