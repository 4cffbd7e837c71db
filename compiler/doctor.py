"""What `chunkc doctor` says: versions, the GPU, and the cache."""

from __future__ import annotations

import platform
from importlib import metadata

from chunkc import __version__, cache


def rows(clean: bool) -> list[tuple[str, str]]:
    """Names and values; with `clean` the cache is emptied first."""
    out = [("chunkc", __version__), ("python", platform.python_version()), ("system", platform.platform())]
    out += [(name, _version(name)) for name in ("torch", "triton", "numpy", "lark", "pydantic", "networkx")]
    out += [("gpu", text) for text in _gpus()]
    if clean:
        out.append(("removed", _packages(cache.clean())))
    used = cache.usage()
    out.append(("cache", f"{used.folder} ({_packages(used.entries)}, {used.size / 1024:.0f} KiB)"))
    return out


def _packages(n: int) -> str:
    return f"{n} package{'' if n == 1 else 's'}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> list[str]:
    try:
        import torch

        if not torch.cuda.is_available():
            return ["none that torch can use"]
        props = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except (ImportError, OSError, RuntimeError) as reason:
        return [f"unknown: {str(reason).splitlines()[0]}"]
    return [f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB" for p in props]
