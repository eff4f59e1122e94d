"""Compiles the simulator on first use and keeps it in a cache.

The cache is ``$OFFLOAD_ENGINE_CACHE`` or ``~/.cache/offload_engine``. The library's name holds a
hash of all it depends on, and it is moved into place in one step: processes may build at once.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path

_SOURCES = Path(__file__).parent / "csrc"


class SimUnavailable(RuntimeError):
    """The simulator cannot be built here; the text says why, with the compiler's output."""


def why_unavailable() -> str | None:
    """What is missing to build the simulator, or None. Quick: it looks, and builds nothing."""
    if not sys.platform.startswith("linux"):
        return f"the simulated device is built on Linux only, this is {sys.platform}"
    torch_spec = importlib.util.find_spec("torch")
    if torch_spec is None or torch_spec.origin is None:
        return "torch is not installed"
    if _compiler() is None:
        return "no C++ compiler: install g++, or set CXX"
    if not (_torch_root() / "include" / "torch" / "library.h").exists():
        return "torch is installed without its C++ headers"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "no Python.h: install the development files of Python"
    return None


def library() -> Path:
    """The path of the compiled simulator, built if need be. Raises SimUnavailable."""
    reason = why_unavailable()
    if reason is not None:
        raise SimUnavailable(f"The simulated device is not available: {reason}.")
    path = _cache() / f"sim-{_key()}.so"
    if not path.exists():
        _build(path)
    return path


def _cache() -> Path:
    chosen = os.environ.get("OFFLOAD_ENGINE_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "offload_engine"


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "g++")


@functools.cache
def _torch_root() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _key() -> str:
    parts = [
        metadata.version("torch"),
        str(_torch_root()),
        sys.implementation.cache_tag or sys.version,
        _run([_compiler_or_fail(), "--version"]),
        *_flags(),
    ]
    digest = hashlib.sha256("\0".join(parts).encode())
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:20]


def _flags() -> list[str]:
    include = _torch_root() / "include"
    lib = _torch_root() / "lib"
    return [
        *("-std=c++20", "-O1", "-fPIC", "-shared"),
        *(f"-isystem{include}", f"-isystem{include / 'torch/csrc/api/include'}"),
        f"-isystem{sysconfig.get_path('include')}",
        *(f"-L{lib}", f"-Wl,-rpath,{lib}", "-lc10", "-ltorch_cpu", "-ltorch_python"),
    ]


def _compiler_or_fail() -> str:
    compiler = _compiler()
    assert compiler is not None, "why_unavailable() was not asked"
    return compiler


def _build(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="building-") as room:
        fresh = Path(room) / path.name
        # The sources come before the libraries, which the linker takes only for what it needs.
        source = str(_SOURCES / "all.cpp")
        _run([_compiler_or_fail(), source, "-o", str(fresh), *_flags()])
        os.replace(fresh, path)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SimUnavailable(
            f"The simulated device could not be built: {command[0]} failed with status "
            f"{done.returncode}.\n{done.stderr}"
        )
    return done.stdout
