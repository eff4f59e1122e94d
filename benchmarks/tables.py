"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """``rows`` under ``head``: text on the left, numbers on the right, None as "-"."""
    body = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    is_text = [all(not _is_number(cell) for cell in column) for column in zip(*body, strict=True)]
    is_text = is_text or [True] * len(head)
    lines = [_line(row, widths, is_text) for row in [list(head), *body]]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:2].lstrip("-+").isdigit()


def _line(row: list[str], widths: list[int], is_text: list[bool]) -> str:
    cells = (
        cell.ljust(width) if text else cell.rjust(width)
        for cell, width, text in zip(row, widths, is_text, strict=True)
    )
    return "  ".join(cells).rstrip()
