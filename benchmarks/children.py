"""Measurements in processes of their own: what one leaves behind does not weigh on the next."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parent.parent


class ChildFailed(RuntimeError):
    """A child ended without a result; the text has the end of what it printed."""


def run_child(module: str, *arguments: str, timeout: float | None = None) -> Any:
    """What ``python -m module arguments --out FILE`` wrote to the file, as JSON.

    A child that is over its ``timeout`` in seconds is ended; what it wrote by then counts.
    Raises ChildFailed where there is nothing.
    """
    with tempfile.TemporaryDirectory() as room:
        out = Path(room) / "result.json"
        command = [sys.executable, "-m", module, *arguments, "--out", str(out)]
        said = _run(command, timeout)
        if not out.exists():
            raise ChildFailed(f"{' '.join(command)}\n{said}")
        return json.loads(out.read_text())


def _run(command: list[str], timeout: float | None) -> str:
    """Runs ``command`` from the root of the repository; the last lines that it printed."""
    with tempfile.TemporaryFile("w+") as output:
        try:
            done = subprocess.run(
                command, cwd=_ROOT, stdout=output, stderr=output, timeout=timeout, check=False
            )
            ended = f"status {done.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"ended after {timeout:.0f} s"
        output.seek(0)
        return "\n".join([*output.read().splitlines()[-30:], ended])


def write_result(path: str | Path, result: Any) -> None:
    """Writes ``result`` as JSON in one step, so that a reader never sees half of it."""
    fresh = Path(f"{path}.part")
    fresh.write_text(json.dumps(result, indent=1))
    os.replace(fresh, path)
