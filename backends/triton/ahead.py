"""Kernels that were compiled when the package was built, handed to Triton in place of its compiler.

Copied into packages that hold such kernels, as `_ahead.py`; it imports triton and the standard library alone. A file in
`_compiled` is used only if it has the hash that the package's manifest gives, and only by the Triton and on the kind of
GPU that it was made for. What is not used is said once, with the reason, and Triton compiles as it would without.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import triton
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction
from triton.runtime.cache import get_cache_manager

HOME = Path(__file__).parent
INDEX = "_compiled/index.json"
OF_MACHINE = frozenset(("extern_libs",))  # options that hold paths

Compile = Callable[..., Any]  # as triton.compile: source, target and options to a compiled kernel


def install(module: Mapping[str, Any]) -> None:
    """Let the kernels of a module, given as its globals, be taken from what was compiled ahead."""
    kernels = jitted(module)
    if not kernels:  # Triton's interpreter runs Python
        return
    shelf = Shelf(module["__name__"].rpartition(".")[0], HOME)
    if shelf.opens():
        shelf.put_modules()
        for kernel in kernels:
            divert(kernel, shelf.take)


def jitted(module: Mapping[str, Any]) -> list[Any]:
    """The jitted functions that a module defines."""
    return [f for f in module.values() if isinstance(f, JITFunction) and f.module == module["__name__"]]


def divert(kernel: Any, take: Callable[..., Any]) -> None:
    """Have a jitted function call `take(compile, source, target=..., options=...)` where it would compile."""

    def binder() -> Any:
        made = kernel.create_binder()  # which sets what the function compiles with
        kernel.compile = partial(take, kernel.compile)
        return made

    kernel.device_caches = defaultdict(binder)


def request_key(source: Any, options: Mapping[str, Any]) -> str:
    """A name for all that a compiled kernel depends on, beside the text of the module, Triton and the target."""
    constants = [(path, getattr(value, "__name__", repr(value))) for path, value in sorted(source.constants.items())]
    asked = [(name, repr(value)) for name, value in sorted(options.items()) if name not in OF_MACHINE]
    kernel = source.fn.__name__
    parts = [kernel, sorted(source.signature.items()), constants, sorted(source.attrs.items()), asked]
    return f"{kernel}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"


class Shelf:
    """What was compiled for a package that lies in a folder."""

    def __init__(self, package: str, home: Path) -> None:
        self.package, self.home = package, home
        self.hashes: dict[str, str] = {}
        self.index: dict[str, Any] = {}
        self.said: set[str] = set()

    def opens(self) -> bool:
        """Whether there is something for this Triton, and the kernels' text is still what was compiled."""
        try:
            self.hashes = json.loads((self.home / "manifest.json").read_bytes())["files"]
        except (OSError, ValueError, KeyError) as reason:
            return self.say("files", f"the package's manifest cannot be read: {reason}")
        data = self.read(INDEX)
        if data is None:
            return False
        self.index = json.loads(data)
        if self.read("_kernels.py") is None:
            return False
        if self.index["triton"] != triton.__version__:
            return self.say("triton", f"they are for Triton {self.index['triton']}, this is {triton.__version__}")
        return True

    def read(self, name: str) -> bytes | None:
        """A file's bytes, if they are what was built."""
        try:
            data = (self.home / name).read_bytes()
        except OSError as reason:
            self.say("files", f"{name} cannot be read: {reason.strerror}")
            return None
        if hashlib.sha256(data).hexdigest() != self.hashes.get(name):
            self.say("files", f"{name} is not what was built: its hash is another than in manifest.json")
            return None
        return data

    def put_modules(self) -> None:
        """Put the extension modules by which Triton launches into its cache, where it looks before it calls a C
        compiler; those of another Python are of no use."""
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        for module in self.index["modules"]:
            name = f"{module['name']}{suffix}"
            if not module["file"].endswith(name):
                continue
            cache = get_cache_manager(module["key"])
            if cache.get_file(name) is None and (data := self.read(module["file"])) is not None:
                cache.put(data, name, binary=True)

    def take(self, compile_: Compile, source: Any, target: Any, options: Mapping[str, Any], **more: Any) -> Any:
        """The kernel from the shelf, or else from the compiler."""
        key = request_key(source, options)
        if self.has(key, source, target):
            files = {name: str(self.home / name) for name in self.index["kernels"][key]}
            return CompiledKernel(source, files, key)
        return compile_(source, target=target, options=options, **more)

    def has(self, key: str, source: Any, target: Any) -> bool:
        """Whether a kernel is there, whole, and for this GPU."""
        if [target.backend, target.arch, target.warp_size] != self.index["target"]:
            made = f"{self.index['target'][0]} {self.index['target'][1]}"
            return self.say("target", f"they are for {made}, this GPU is {target.backend} {target.arch}")
        if key not in self.index["kernels"]:
            constants = {source.fn.arg_names[path[0]]: value for path, value in sorted(source.constants.items())}
            shown = ", ".join(f"{name}={value}" for name, value in constants.items() if value is not None)
            return self.say("sizes", f"'{source.fn.__name__}' with {shown} is not among them; "
                                     f"they are for {self.index['made_for']}")  # fmt: skip
        return all(self.read(name) is not None for name in self.index["kernels"][key])

    def say(self, kind: str, reason: str) -> bool:
        """Warn, once for each kind of reason; False."""
        if kind not in self.said:
            self.said.add(kind)
            warnings.warn(
                f"{self.package}: kernels that were compiled ahead are not used: {reason}. Triton compiles at the "
                "first call instead", RuntimeWarning, stacklevel=2,
            )  # fmt: skip
        return False
