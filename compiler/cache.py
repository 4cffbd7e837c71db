"""The store behind `chunkc.load`: packages by the fingerprint of all that shapes them.

An entry is trusted only if its manifest is whole and every file has the hash that it names; anything else is built
again. Entries appear by a rename, so that processes which build the same entry at once do not see half of it."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from chunkc import __version__
from chunkc.artifact import MANIFEST, Files, read_manifest, replace_folder, sha256

ENTRY = re.compile(r"[A-Za-z_]\w*-[0-9a-f]{32}|\.[A-Za-z_]\w*-[0-9a-f]{32}\.(new|old|gone)-[0-9a-f]+")


def place() -> Path:
    """The folder of the store: CHUNKC_CACHE_DIR, or chunkc in XDG_CACHE_HOME, or in ~/.cache."""
    chosen = os.environ.get("CHUNKC_CACHE_DIR")
    if chosen:
        return Path(chosen).absolute()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg):  # the convention is to ignore a relative one
        return Path(xdg) / "chunkc"
    try:
        return Path.home() / ".cache" / "chunkc"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"chunkc-{os.getuid() if hasattr(os, 'getuid') else 'user'}"


def entry(key: str, name: str) -> Path:
    """Where the package of a fingerprint lies, or would lie."""
    return place() / "packages" / __version__ / f"{name}-{key[:32]}"


def is_valid(folder: Path, key: str) -> bool:
    """Whether the folder holds the whole package of this fingerprint."""
    manifest = read_manifest(folder)
    if manifest is None or manifest.fingerprint != key or "__init__.py" not in manifest.files:
        return False
    try:
        return all(sha256((folder / name).read_bytes()) == hashed for name, hashed in manifest.files.items())
    except (OSError, ValueError):
        return False


def fetch(key: str, name: str, make: Callable[[], Files]) -> Path:
    """The folder of the package with this fingerprint; `make` gives its files if the store has no whole one.

    Where the store cannot be written, the package lies in a folder that goes with the process."""
    folder = entry(key, name)
    if is_valid(folder, key):
        return folder
    files = make()
    try:
        place().mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_folder(files, folder)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="chunkc-")) / name
        atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
        replace_folder(files, folder)
    return folder


@dataclass(frozen=True)
class Usage:
    """How much the store holds."""

    folder: Path
    entries: int
    size: int


def _entries() -> Iterator[Path]:
    """The store's own folders and no other: the place may be one that the user keeps other things in."""
    for folder in sorted((place() / "packages").glob("*/*")):
        if ENTRY.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
            yield folder


def usage() -> Usage:
    """The number of whole-looking entries, and the bytes of all files."""
    found = list(_entries())
    size = 0
    for path in (p for folder in found for p in folder.rglob("*")):
        with contextlib.suppress(OSError):
            size += path.lstat().st_size if path.is_file() else 0
    return Usage(place(), sum((f / MANIFEST).is_file() for f in found), size)


def clean() -> int:
    """Remove every entry; how many there were."""
    count = 0
    for folder in _entries():
        gone = folder
        if not folder.name.startswith("."):
            # Renamed first: who looks the entry up meanwhile finds it whole or not at all.
            gone = folder.with_name(f".{folder.name}.gone-{os.urandom(6).hex()}")
            try:
                os.rename(folder, gone)
            except OSError:
                continue
            count += 1
        shutil.rmtree(gone, ignore_errors=True)
    for folder in [*(place() / "packages").glob("*"), place() / "packages"]:
        with contextlib.suppress(OSError):
            folder.rmdir()
    return count
