"""The process that compiles ahead: `python -m chunkc.ahead.worker FOLDER`, which holds a request and a package.

The package's own functions are called, so that there is one place that says how kernels are launched; tensors have no
values, and Triton is told that the target is there."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import build, driver

from chunkc.ahead.calls import Caller, with_kernels
from chunkc.backends.triton.ahead import divert, jitted, request_key

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


class NoCompiler(Exception):
    """Triton cannot compile for the target here."""


class CannotCompile(Exception):
    """Triton cannot compile a kernel; the message is its reason."""


class Absent:
    """A driver for a GPU that is not there: enough for Triton to compile for it."""

    def __init__(self, target: GPUTarget) -> None:
        self.target, self.utils = target, StandIn()

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class StandIn:
    """Whatever is asked of a module that is built here and cannot be loaded."""

    def __getattr__(self, name: str) -> StandIn:
        return self

    def __call__(self, *args: Any, **more: Any) -> StandIn:
        return self


class Press:
    """Compiles what the package launches, and keeps each kernel once."""

    def __init__(self, folder: Path, target: GPUTarget) -> None:
        self.folder, self.binary = folder, make_backend(target).binary_ext
        self.unit = ""  # whose calls launch
        self.kernels: dict[str, list[str]] = {}
        self.used: list[dict[str, Any]] = []
        self.compiled: list[Any] = []

    def take(self, compile_: Any, source: Any, target: Any, options: Mapping[str, Any], **more: Any) -> Any:
        try:
            kernel = compile_(source, target=target, options=options, **more)
        except Exception as reason:  # of which Triton has no common class
            raise CannotCompile(f"{source.fn.__name__}: {said(reason)}") from reason
        key = request_key(source, options)
        record = kernel.metadata._asdict() | {"hash": key, "extern_libs": {}, "target": vars(target)}
        names = {f"{key}.json": json.dumps(record, sort_keys=True, default=vars).encode(),
                 f"{key}.{self.binary}": kernel.asm[self.binary]}  # fmt: skip
        for name, data in names.items():
            (self.folder / name).write_bytes(data)
        self.kernels[key] = [f"{self.folder.name}/{name}" for name in names]
        self.compiled.append(kernel)
        self.used.append(self.usage(kernel, source))
        return kernel

    def usage(self, kernel: Any, source: Any) -> dict[str, Any]:
        registers, spilled = cuda_usage(kernel) if self.binary == "cubin" else hip_usage(kernel)
        names = source.fn.arg_names
        constants = {names[path[0]]: value for path, value in sorted(source.constants.items())}
        shown = " ".join(f"{n}={v}" for n, v in constants.items() if isinstance(v, int) and not isinstance(v, bool))
        return {"unit": self.unit, "kernel": source.fn.__name__, "constants": shown, "warps": kernel.metadata.num_warps,
                "registers": registers, "spilled": spilled, "shared": kernel.metadata.shared}  # fmt: skip


def cuda_usage(kernel: Any) -> tuple[int, int]:
    """Registers a thread, and the bytes of stack into which others spill."""
    tool = next((Path(triton.__file__).parent / "backends" / "nvidia" / "bin").glob("cuobjdump*"), None)
    if tool is None:
        raise NoCompiler("Triton's package has no cuobjdump")
    file = Path(kernel.metadata_group[f"{kernel.name}.cubin"])
    text = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def hip_usage(kernel: Any) -> tuple[int, int]:
    """Vector registers a thread, and the bytes of scratch memory into which others spill."""
    text = kernel.asm["amdgcn"]
    registers, scratch = (re.search(rf"\.{n}:\s+(\d+)", text) for n in ("vgpr_count", "private_segment_fixed_size"))
    assert registers and scratch, text[-2000:]
    return int(registers[1]), int(scratch[1])


# -- what launches -----------------------------------------------------------------------------------------------------


def launching_modules(press: Press, home: Path) -> list[dict[str, str]]:
    """The extension modules that Triton builds with a C compiler before it can launch these kernels on NVIDIA's GPUs,
    by the key under which its cache keeps them. They are built as it builds them, and not loaded: there may be no
    driver to link with, so that one is linked which holds its functions' names alone."""
    from triton.backends.nvidia import driver as nvidia  # which Triton for AMD's GPUs alone may lack

    found: dict[str, dict[str, str]] = {}
    keys: list[str] = []
    cache_of = build.get_cache_manager

    def cache(key: str) -> Any:
        keys.append(key)
        return cache_of(key)

    def load(name: str, path: str) -> StandIn:
        file = f"{keys[-1][:16]}-{name}{SUFFIX}"
        shutil.copy(path, press.folder / file)
        found[file] = {"name": name, "key": keys[-1], "file": f"{press.folder.name}/{file}"}
        return StandIn()

    build.get_cache_manager, build._load_module_from_path = cache, load
    triton.knobs.build.impl = build_module
    triton.knobs.nvidia.libcuda_path = str(hollow_driver(Path(nvidia.__file__).parent, home))
    driver.active.utils = nvidia.CudaUtils()
    for kernel in press.compiled:
        nvidia.CudaLauncher(kernel.src, kernel.metadata)
    return [found[file] for file in sorted(found)]


def build_module(name: str, source: str, folder: str, library_dirs: list[str], include_dirs: list[str],
                 libraries: list[str]) -> str:  # fmt: skip
    """What Triton does, without the names of folders that assertions would keep."""
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    include = sysconfig.get_path("include", scheme)
    out = str(Path(folder) / f"{name}{SUFFIX}")
    command = [c_compiler(), source, "-O3", "-shared", "-fPIC", "-w", "-o", out]
    command += [f"-ffile-prefix-map={path}={short}" for path, short in ((folder, "."), (include, "python"))]
    command += [f"-l:{library}" for library in libraries]
    command += [f"-L{path}" for path in library_dirs] + [f"-I{path}" for path in (*include_dirs, folder, include)]
    subprocess.run(command, check=True, capture_output=True)
    return out


def hollow_driver(sources: Path, home: Path) -> Path:
    """The folder of a library that is called as CUDA's driver, and has every function that Triton's code names."""
    text = "".join((sources / name).read_text() for name in ("driver.c", "driver.py"))
    folder = home / "driver"
    folder.mkdir()
    code = folder / "names.c"
    code.write_text("".join(f"void {name}(void) {{}}\n" for name in sorted(set(re.findall(r"\bcu[A-Z]\w*", text)))))
    library = folder / "libcuda.so.1"
    command = [c_compiler(), "-shared", "-fPIC", "-w", f"-Wl,-soname,{library.name}", "-o", str(library), str(code)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def c_compiler() -> str:
    """The one that Triton takes; empty if there is none."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or ""


# -- running -----------------------------------------------------------------------------------------------------------


def import_package(home: Path) -> ModuleType:
    """The package, without a word that nothing was compiled ahead yet."""
    sys.path.insert(0, str(home))
    warnings.simplefilter("ignore")
    return importlib.import_module("package")


def work(home: Path) -> dict[str, Any]:
    request = json.loads((home / "request.json").read_text())
    target = GPUTarget(*request["target"])
    driver.set_active(Absent(target))
    folder = home / "package" / "_compiled"
    folder.mkdir()
    try:
        press = Press(folder, target)
    except RuntimeError as reason:  # no back end of Triton's supports the target
        return {"failed": "no-compiler", "reason": str(reason)}
    module = import_package(home)
    kernels = jitted(vars(with_kernels(module)))
    for kernel in kernels:
        divert(kernel, press.take)
        kernel.run = partial(compile_kinds, kernel)
    launched = any("tl.store" in kernel.src for kernel in kernels)
    for unit in request["units"] if launched else ():
        press.unit = unit["name"]
        try:
            Caller(module, unit, getattr(torch, request["dtype"])).all()
        except NoCompiler as reason:
            return {"failed": "no-compiler", "reason": str(reason)}
        except CannotCompile as reason:
            return {"failed": "cannot-compile", "unit": unit["name"], "reason": str(reason)}
        except ValueError as reason:  # of a layer that parameters do not fit
            return {"failed": "bad-size", "unit": unit["name"], "reason": str(reason)}
    modules, missing = [], ""
    if target.backend == "cuda" and c_compiler():
        modules = launching_modules(press, home)
    elif target.backend == "cuda":
        missing = "no C compiler was found: Triton builds what launches kernels at the first call"
    return {"triton": triton.__version__, "kernels": press.kernels, "used": press.used, "modules": modules,
            "missing": missing}  # fmt: skip


def compile_kinds(kernel: Any, *args: Any, grid: Any, **more: Any) -> None:
    """Compile for a launch and for others like it. Unless a kernel says otherwise, Triton compiles anew for an integer
    that 16 divides, for another, and for 1. Where one is 1 there is a single token or sequence, which calls have; the
    others are tried here."""
    given = dict(zip(kernel.arg_names, args)) | more
    constant = {p.name for p in kernel.params if p.is_constexpr or p.do_not_specialize} | (
        more.keys() - set(kernel.arg_names)
    )
    free = {n: v for n, v in given.items() if type(v) is int and v > 1 and n not in constant}
    values = sorted(set(free.values()))  # what is equal is the same length
    for kinds in itertools.product((16, 17), repeat=len(values)):
        kind = dict(zip(values, kinds))
        compile_only(kernel, grid=grid, **given | {name: kind[value] for name, value in free.items()})


def compile_only(kernel: Any, *args: Any, grid: Any, **more: Any) -> Any:
    """A launch as far as the compiled kernel."""
    return type(kernel).run(kernel, *args, grid=grid, **more | {"warmup": True})


def said(reason: BaseException) -> str:
    """An exception on one line."""
    lines = [line.strip() for line in str(reason).splitlines() if line.strip()]
    return f"{type(reason).__name__}: {lines[-1] if lines else ''}"[:300].rstrip(": ")


if __name__ == "__main__":
    place = Path(sys.argv[1])
    (place / "result.json").write_text(json.dumps(work(place)))
