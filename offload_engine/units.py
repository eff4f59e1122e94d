"""Sizes as people write them: "8GiB" to bytes and back."""

from __future__ import annotations

import re

from .errors import OffloadError

_FACTORS = {
    "": 1, "b": 1,
    "k": 2**10, "kb": 10**3, "kib": 2**10,
    "m": 2**20, "mb": 10**6, "mib": 2**20,
    "g": 2**30, "gb": 10**9, "gib": 2**30,
    "t": 2**40, "tb": 10**12, "tib": 2**40,
}  # fmt: skip


def parse_nbytes(text: str | int | float, what: str = "size") -> int:
    """Bytes in ``text``: a number, or a number with a unit ("8GiB", "500 MB").

    Raises OffloadError for anything else, zero and below included.
    """
    if isinstance(text, bool) or not isinstance(text, (str, int, float)):
        raise OffloadError(f"{what}={text!r} is not a size; give bytes or text such as '8GiB'.")
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", str(text))
    factor = _FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None or float(match[1]) * factor < 1:
        raise OffloadError(f"{what}={text!r} is not a size; give bytes or text such as '8GiB'.")
    return int(float(match[1]) * factor)


def format_nbytes(nbytes: float) -> str:
    """``nbytes`` for a person: "648.0 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024 or unit == "GiB":
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    raise AssertionError("unreachable")
