"""What is compiled for: the GPUs that Triton compiles for anywhere, and what a program may use of each."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

from chunkc.ir.diagnostics import CompileError, SourceFile, Span, error

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Target:
    """A kind of GPU as Triton calls it, and the bytes of shared memory that a program may have."""

    backend: str
    arch: int | str
    warp_size: int
    shared: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 << 10),
    "sm_89": Target("cuda", 89, 32, 99 << 10),
    "sm_90": Target("cuda", 90, 32, 227 << 10),
    "sm_100": Target("cuda", 100, 32, 227 << 10),
    "gfx942": Target("hip", "gfx942", 64, 64 << 10),
    "gfx950": Target("hip", "gfx950", 64, 160 << 10),
}


@dataclass(frozen=True)
class Ahead:
    """What is asked of a build: the target, the dtype of inputs, and whether the package gets what is compiled."""

    target: str
    dtype: str = "bf16"
    ship: bool = True

    def check(self, source: SourceFile) -> None:
        """
        Raises:
            CompileError: `unknown-target`, or `no-compiler` where Triton is not installed.
        """
        if self.target not in TARGETS:
            known = ", ".join(TARGETS)
            raise CompileError([error("unknown-target", f"'{self.target}' is no target that kernels are compiled for",
                                      Span(source.name, 0, 0), hints=(f"the targets are {known}",))])  # fmt: skip
        if find_spec("triton") is None:
            raise no_compiler(source.name, "Triton is not installed")

    def record(self) -> dict[str, str]:
        """What shapes the compiled files, for manifests and fingerprints."""
        return {"target": self.target, "dtype": self.dtype, "triton": import_module("triton").__version__}


def no_compiler(file: str, why: str) -> CompileError:
    hint = "Triton is installed on Linux with chunkc; without --target the package is built as ever"
    return CompileError([error("no-compiler", "kernels cannot be compiled here", Span(file, 0, 0), notes=(why,),
                               hints=(hint,))])  # fmt: skip
