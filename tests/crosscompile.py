"""Compile an emitted package's kernels for GPUs that need not be present, and read what they use."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from chunkc.backends.triton.schedule import SUMS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


PLACES = ("tile_start", "tile_stop", "sequence_start", "sequence_tile", "is_mild", "rounded")
TABLES = ("tile_start_ptr", "tile_stop_ptr", "offsets_ptr", "first_tile_ptr")  # a dense batch has none
REAL = ("initial", "last", "state_ptr", "next", "totals", "reached", "passed", "a_ptr", "b_ptr", "out_ptr")
KEPT = [f"{n}_{s}_ptr" for n in SUMS for s in "ij"]  # a walk over whole sequences has none


def sources(kernels: ModuleType) -> dict[str, Any]:
    """The jitted functions of a kernels module by name."""
    found = {n: f for n, f in vars(kernels).items() if isinstance(f, triton.runtime.jit.JITFunction)}
    helpers = {"masked_sum", "exp", "join", "join_max", "walk", "walk_max", "times", "product", *PLACES}
    return {n: f for n, f in found.items() if n not in helpers}


def compile_kernel(kernel: Any, target: str, warps: int, size: int = 128, stages: int = 1, **blocks: int) -> Any:
    """The compiled kernel for bfloat16 operands and I = J = `size`, in a dense batch."""
    known = {
        "H": 4, "I": size, "J": size, "D": size, "C": 64, "LEVELS": 6, "BI": 64, "BJ": 64, "BD": 64, "AFTER": 1,
        "AI": size, "AJ": size, "DOT": tl.bfloat16, "PRECISION": "ieee", "PARTS": 2, "GATE_PARTS": 2,
        "LIMIT": 80.0, "STAGES": 1,
        **dict.fromkeys((*TABLES, *KEPT)), **blocks,
    }  # fmt: skip
    signature, constants = {}, {}
    for name in kernel.arg_names:
        if name in known:
            signature[name], constants[name] = "constexpr", known[name]
        elif not name.endswith("_ptr"):
            signature[name] = "fp32" if name.startswith("scale_") else "i32"
        else:
            integer = name.startswith(("tile_", "first_tile", "bounds"))
            real = name.startswith(REAL)
            short = "*i32" if name.startswith("alive") else "*fp32" if real else "*bf16"
            signature[name] = "*i64" if integer else short
    pointers = [(k, n) for k, n in enumerate(kernel.arg_names) if n not in known and n.endswith("_ptr")]
    attrs = {(k,): [["tt.divisibility", 16]] for k, _ in pointers}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=TARGETS[target], options={"num_warps": warps, "num_stages": stages})


def usage(compiled: Any) -> dict[str, int]:
    """Registers, bytes of stack (spills) and of shared memory of an NVIDIA binary."""
    tool = next((Path(triton.__file__).parent / "backends" / "nvidia" / "bin").glob("cuobjdump*"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return {"registers": int(found[1]), "stack": int(found[2]), "shared": compiled.metadata.shared}


def overwritten(ttgir: str) -> set[str]:
    """Buffers that a copy may overwrite while an asynchronous product still reads them.

    Triton (3.6 to 3.7.1) gives a pipelined load one buffer more if a product reads it, so that the product need not be
    waited for; but not if registers are loaded from it, too."""
    if not any(int(n) for n in re.findall(r"warp_group_dot_wait.*?pendings = (\d+)", ttgir)):
        return set()
    base: dict[str, str] = {}
    for name, of in re.findall(r"(%[\w#]+) = ttg\.memdesc_(?:index|trans|subslice) (%[\w#]+)", ttgir):
        base[name] = base.get(of, of)
    copied = re.findall(r"async_copy_global_to_local %[\w#]+, (%[\w#]+)", ttgir)
    loaded = re.findall(r"ttg\.local_load (%[\w#]+)", ttgir)
    factors = re.findall(r"warp_group_dot (%[\w#]+), (%[\w#]+),.*isAsync", ttgir)
    found = [{base.get(x, x) for x in names} for names in (copied, loaded, [x for pair in factors for x in pair])]
    return found[0] & found[1] & found[2]


def compile_attention(kernel: Any, target: str, size: int = 64) -> Any:
    """The compiled kernel of an attention for bfloat16 operands, all fixed axes of one size."""
    tile = {"BQ": 64, "BR": 64, "DOT": tl.bfloat16, "PRECISION": "ieee", "number": size**-0.5}
    annotated = {p.name for p in kernel.params if p.is_constexpr}
    constants = {n: tile.get(n, size) for n in kernel.arg_names if n in annotated}
    types = {"lengths_ptr": "*i64", "begins_ptr": "*i64", "ptr": "*fp32"}
    signature = {}
    for name in kernel.arg_names:
        kind = next((t for end, t in types.items() if name.endswith(end)), "i32")
        signature[name] = "constexpr" if name in constants else kind
    attrs = {(k,): [["tt.divisibility", 16]] for k, n in enumerate(kernel.arg_names) if n not in constants}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=TARGETS[target], options={"num_warps": 4, "num_stages": 1})
