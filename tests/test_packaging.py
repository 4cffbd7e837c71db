"""What pyproject.toml says is what the tree holds: packages, data files, versions and the imports of runtime files."""

from __future__ import annotations

import ast
import fnmatch
import importlib.metadata
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import chunkc

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
FOLDERS: dict[str, Path] = {name: ROOT / folder for name, folder in SETUPTOOLS["package-dir"].items()}


def files() -> list[tuple[str, Path]]:
    """Every file below a mapped folder, and its path inside an installed chunkc."""
    return [
        (f"{package.replace('.', '/')}/{path.relative_to(folder).as_posix()}", path)
        for package, folder in FOLDERS.items()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    ]


def test_packages_are_the_folders_with_an_init() -> None:
    found = {name.removesuffix("/__init__.py").replace("/", ".") for name, _ in files() if name.endswith("__init__.py")}
    assert sorted(SETUPTOOLS["packages"]) == sorted(found)


def test_every_module_is_in_a_package() -> None:
    outside = [name for name, path in files() if path.suffix == ".py" and not (path.parent / "__init__.py").exists()]
    assert not outside


def test_data_files_are_package_data() -> None:
    patterns = SETUPTOOLS["package-data"]["*"]
    data = [(name, path) for name, path in files() if path.suffix != ".py"]
    names = [name for name, _ in data]
    assert "chunkc/dsl/grammar.lark" in names
    assert "chunkc/py.typed" in names
    assert "chunkc/specs/gated_linear_attention.spec" in names
    missed = [name for name, path in data if not any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)]
    assert not missed, "no pattern of package-data covers these"
    assert not [name for name, path in data if not (path.parent / "__init__.py").exists()]


def test_a_wheel_holds_the_tree_and_nothing_else(tmp_path: Path) -> None:
    setuptools = pytest.importorskip("setuptools")
    if Version(setuptools.__version__) < Version("77"):
        pytest.skip("setuptools is older than the build needs")
    copy = tmp_path / "tree"
    copy.mkdir()
    for path in (ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE")):
        if path.exists():
            shutil.copy(path, copy)
    for _, path in files():
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    code = "from setuptools.build_meta import build_wheel; print(build_wheel('dist'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (copy / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == {name for name, _ in files()}


def test_versions_agree() -> None:
    version = PROJECT["project"]["version"]
    assert chunkc.__version__ == version
    try:
        installed = importlib.metadata.version("chunkc")
    except importlib.metadata.PackageNotFoundError:
        return  # run from build/links
    assert installed == version


def test_python_versions_agree() -> None:
    oldest = PROJECT["project"]["requires-python"].split(",")[0].removeprefix(">=")
    assert PROJECT["tool"]["mypy"]["python_version"] == oldest
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")


def test_constraints_are_within_what_pyproject_asks_for() -> None:
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = {pin.name: pin for pin in (Requirement(line) for line in lines if line)}
    asked = list(PROJECT["project"]["dependencies"])
    asked += [line for extra in PROJECT["project"]["optional-dependencies"].values() for line in extra]
    for wanted in map(Requirement, asked):
        pin = pins.get(wanted.name)
        if pin is None:
            assert wanted.name == "pre-commit", f"{wanted.name} is not pinned"
            continue
        (exact,) = pin.specifier
        assert exact.operator == "==", pin
        assert wanted.specifier.contains(exact.version), f"{pin} is not within {wanted}"


COPIED = ("attend", "checks", "chunks", "elementwise", "functions", "runtime")


def test_runtime_modules_import_only_torch_triton_and_the_standard_library() -> None:
    """They are copied into emitted packages, which must not need chunkc."""
    allowed = {"torch", "triton"} | sys.stdlib_module_names
    for name, path in files():
        run_time = path.parent.name == "torch" and path.stem in COPIED
        if not run_time and path != ROOT / "backends" / "triton" / "ahead.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                roots = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}:{node.lineno}: a relative import"
                if node.module in [f"chunkc.backends.torch.{n}" for n in COPIED]:
                    continue  # copying makes these relative
                roots = {(node.module or "").split(".")[0]}
            else:
                continue
            assert roots <= allowed, f"{name}:{node.lineno}: imports {sorted(roots - allowed)}"
