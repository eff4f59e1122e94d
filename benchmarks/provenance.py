"""Where a number comes from: machine, versions, commit, command."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from offload_engine.host_store import machine_nbytes

_ROOT = Path(__file__).parent.parent
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "numpy")


def provenance() -> dict[str, Any]:
    """Everything that a result file says about how it was made."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "host_nbytes": machine_nbytes(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def commit() -> str:
    """The commit that is checked out, with "-dirty" where files differ from it."""
    short = run_text("git", "-C", str(_ROOT), "rev-parse", "--short", "HEAD")
    if short is None:
        return "unknown"
    changed = run_text("git", "-C", str(_ROOT), "status", "--porcelain", "--untracked-files=no")
    return f"{short}-dirty" if changed else short


def run_text(*command: str) -> str | None:
    """What ``command`` prints, stripped; None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")
