"""Who may import whom, and how large a module may be. CONTRIBUTING.md says why."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAPPING: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
MAX_LINES = 600
LAZY = {"chunkc", "chunkc.cli"}  # these may import our own modules inside functions, so that they start fast
TARGETS = ("chunkc.backends.triton", "chunkc.backends.torch", "chunkc.backends.dist")
JOINS_TARGETS = {"chunkc.backends.package"}
# What is copied into packages beside PyTorch's run time stands on it.
ON_RUN_TIME = {"chunkc.backends.dist.segments", "chunkc.backends.dist.ring"}
RUN_TIME = ("chunkc.backends.torch.runtime", "chunkc.backends.torch.attend")
HEAVY = {"torch", "triton"}


@dataclass(frozen=True)
class Import:
    """One imported name: `module` as written, made absolute; `name` is what `from` takes from it."""

    module: str
    name: str | None
    line: int
    local: bool

    def within(self, package: str) -> bool:
        """Whether this reaches into the package, itself included; `from chunkc import ir` reaches into chunkc.ir."""
        whole = f"{self.module}.{self.name}" if self.name else self.module
        return whole == package or whole.startswith(package + ".")

    @property
    def ours(self) -> bool:
        return self.within("chunkc")


def modules() -> dict[str, Path]:
    """Every module of chunkc by its dotted name."""
    found = {}
    for package, folder in MAPPING.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(module: str, source: str, is_package: bool) -> Iterator[Import]:
    def visit(node: ast.AST, local: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, None, node.lineno, local)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*up, base] if base else up)
            for alias in node.names:
                yield Import(base, alias.name, node.lineno, local)
        inside = local or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(source), local=False)


def imports_of(module: str) -> list[Import]:
    path = MODULES[module]
    return list(imports(module, path.read_text(), path.name == "__init__.py"))


def below(*packages: str) -> list[str]:
    return [m for m in MODULES if any(m == p or m.startswith(p + ".") for p in packages)]


def strays(module: str, *allowed: str) -> list[str]:
    """Imports of our own modules outside the allowed packages."""
    return [
        f"{module}:{i.line}: {i.module}.{i.name or ''}"
        for i in imports_of(module)
        if i.ours and not any(i.within(a) for a in allowed)
    ]


def test_the_reader_of_imports() -> None:
    source = "import chunkc.dsl.tree\nfrom . import axes\nfrom ..dsl import tree\ndef f():\n    from chunkc import ir\n"
    found = list(imports("chunkc.ir.nodes", source, is_package=False))
    assert [(i.module, i.name, i.local) for i in found] == [
        ("chunkc.dsl.tree", None, False),
        ("chunkc.ir", "axes", False),
        ("chunkc.dsl", "tree", False),
        ("chunkc", "ir", True),
    ]
    assert found[1].within("chunkc.ir") and found[3].within("chunkc.ir") and not found[2].within("chunkc.ir")
    (inner,) = imports("chunkc.ir", "from .axes import Axis", is_package=True)
    assert inner.module == "chunkc.ir.axes"


def test_the_tree_is_there() -> None:
    assert {"chunkc", "chunkc.driver", "chunkc.dsl.parser", "chunkc.ir.nodes", "chunkc.backends"} <= set(MODULES)


@pytest.mark.parametrize("module", below("chunkc.ir"))
def test_ir_sees_only_itself(module: str) -> None:
    assert not strays(module, "chunkc.ir")


@pytest.mark.parametrize("module", below("chunkc.dsl"))
def test_dsl_sees_only_itself_and_ir(module: str) -> None:
    assert not strays(module, "chunkc.dsl", "chunkc.ir")


@pytest.mark.parametrize("module", below("chunkc.backends"))
def test_back_ends_do_not_see_each_other(module: str) -> None:
    assert not strays(module, "chunkc.ir", "chunkc.backends")
    if module in JOINS_TARGETS:
        return
    own = next((t for t in TARGETS if module in below(t)), None)
    others = [t for t in TARGETS if t != own]
    found = [i for i in imports_of(module) if any(i.within(t) for t in others)]
    assert not [i for i in found if module not in ON_RUN_TIME or i.module not in RUN_TIME]


@pytest.mark.parametrize("module", MODULES)
def test_our_own_modules_are_imported_at_the_top(module: str) -> None:
    if module not in LAZY:
        assert not [i for i in imports_of(module) if i.local and i.ours]


@pytest.mark.parametrize("module", MODULES)
def test_our_own_modules_are_imported_by_their_full_names(module: str) -> None:
    """`import ir` works from the root of the tree, and makes a second copy of everything in it."""
    folders = {Path(folder).parts[0] for folder in MAPPING.values()}
    assert not [i for i in imports_of(module) if i.module.split(".")[0] in folders]


@pytest.mark.parametrize("module", MODULES)
def test_modules_stay_readable(module: str) -> None:
    assert len(MODULES[module].read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_are_held_to_the_same(path: Path) -> None:
    """They see the driver, what `chunkc bench` is made of, and nothing of how kernels come about."""
    source = path.read_text()
    found = list(imports(path.stem, source, is_package=False))
    assert len(source.splitlines()) <= MAX_LINES
    assert not [i for i in found if i.local and i.ours]
    assert not [i for i in found if i.module.split(".")[0] in {Path(folder).parts[0] for folder in MAPPING.values()}]
    allowed = ("chunkc.bench", "chunkc.driver", "chunkc.ir.diagnostics")
    assert not [i for i in found if i.ours and i.module != "chunkc" and not any(i.within(a) for a in allowed)]


@pytest.mark.parametrize(
    "module", below("chunkc.dsl", "chunkc.ir", "chunkc.driver", "chunkc.pipeline", "chunkc.passes")
)
def test_the_front_half_never_imports_torch(module: str) -> None:
    assert not [i for i in imports_of(module) if any(i.within(heavy) for heavy in HEAVY)]


def test_importing_the_driver_does_not_import_torch() -> None:
    code = "import sys, chunkc.driver; print(*sorted(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "chunkc.driver" in loaded
    assert not loaded & HEAVY
