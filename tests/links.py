"""Make build/links/chunkc: the package tree as symlinks, for tools that cannot follow the mapping in pyproject.toml."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def make() -> Path:
    """Create or refresh the farm; the folder to put on a search path."""
    farm = ROOT / "build" / "links"
    top = farm / "chunkc"
    top.mkdir(parents=True, exist_ok=True)
    mapping = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    wanted = {name.name: name for name in (ROOT / mapping["chunkc"]).iterdir() if name.name != "__pycache__"}
    for package, folder in mapping.items():
        if package != "chunkc":
            wanted[package.removeprefix("chunkc.")] = ROOT / folder
    for old in top.iterdir():
        if old.name not in wanted or not old.exists():
            old.unlink()
    for name, target in wanted.items():
        link = top / name
        if not link.is_symlink():
            link.symlink_to(target)
    return farm


if __name__ == "__main__":
    print(make())
