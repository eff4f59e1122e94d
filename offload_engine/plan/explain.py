"""A plan as a table that a person reads: what stays, what streams, where it stalls and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ..units import format_nbytes
from .clock import Run
from .model import Plan
from .timeline import replayed

_MOST_STALLS = 5
_WHY = {
    "start": "the link is busy since the start",
    "link": "the link is busy",
    "room": "no room earlier",
    "left": "released just before",
}


@dataclass(slots=True)
class Family:
    """Segments with the same name but for the numbers in it: a component, or its blocks."""

    name: str
    segments: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)  # fetched once at most, in a cycle never
    streamed: int = 0  # fetched more often
    fetches: int = 0
    fetched_nbytes: int = 0
    stall_seconds: float = 0.0
    why: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Stall:
    """A wait of the compute lane."""

    index: int  # of the use
    segment: str  # that landed last
    seconds: float
    why: str


def explain(plan: Plan) -> str:
    """The summary, a row for each family of segments, and the longest stalls."""
    stalls = find_stalls(plan)
    rows = [_HEAD, *(_row(plan, family) for family in families(plan, stalls))]
    lines = [*_summary(plan), "", *_aligned(rows)]
    if stalls:
        lines += ["", *_longest(plan, stalls)]
    return "\n".join(lines)


def families(plan: Plan, stalls: Iterable[Stall]) -> list[Family]:
    """The families of ``plan``, in the order of ``nbytes``."""
    found: dict[str, Family] = {}
    fetches = Counter(name for step in plan.steps for name in step.fetch)
    used = {name for use in plan.uses for name in use.segments}
    for name in plan.nbytes:
        family = found.setdefault(_stem(name), Family(_stem(name)))
        family.segments.append(name)
        if fetches[name] > (0 if plan.cyclic else 1):
            family.streamed += 1
        elif name in used:
            family.kept.append(name)
        family.fetches += fetches[name]
        family.fetched_nbytes += fetches[name] * plan.nbytes[name]
    for stall in stalls:
        family = found[_stem(stall.segment)]
        family.stall_seconds += stall.seconds
        family.why[stall.why] += 1
    return [*found.values()]


def find_stalls(plan: Plan) -> list[Stall]:
    """All stalls of ``plan`` in their order, each with its reason."""
    problem, _, run = replayed(plan)
    by_use = _serving_copies(run)
    found = []
    for index, late in run.late.items():
        numbers = [by_use[index, segment] for segment in late if (index, segment) in by_use]
        seconds = run.start[index] - run.boundary[index]
        if seconds <= 1e-12 * max(1.0, plan.seconds):
            continue
        last = max(numbers, default=None)
        segment = late[0] if last is None else run.copies[last][1]
        why = "link" if last is None else _why(plan, run, last)
        found.append(Stall(index, problem.names[segment], seconds, _WHY[why]))
    return found


def _serving_copies(run: Run) -> dict[tuple[int, int], int]:
    """For each (use, segment) that waits: the number of the copy it waits for."""
    found, latest, number = {}, {}, 0
    for index in sorted(run.late):
        while number < len(run.copies) and run.copies[number][0] <= index:
            latest[run.copies[number][1]] = number
            number += 1
        found.update({(index, s): latest[s] for s in run.late[index] if s in latest})
    return found


def _why(plan: Plan, run: Run, number: int) -> str:
    """Why copy ``number`` did not land earlier."""
    first = number
    while first and run.copies[first - 1][3] >= run.copies[first][2]:
        first -= 1  # it went on the link right after the one before
    boundary, segment, start, _ = run.copies[first]
    if boundary == 0 and not plan.cyclic:
        return "start"
    if first < number or start > run.boundary[boundary]:
        return "link"
    taken = plan.held_nbytes[boundary - 1] + plan.uses[boundary - 1].workspace_nbytes
    is_full = taken + [*plan.nbytes.values()][segment] > plan.budget_nbytes
    return "room" if is_full else "left"


def _summary(plan: Plan) -> Iterator[str]:
    compute = plan.seconds - plan.stall_seconds
    above = plan.seconds / plan.bound_seconds - 1 if plan.bound_seconds else 0.0
    copying = plan.fetched_nbytes / plan.bandwidth
    kind = "Steady cycle of" if plan.cyclic else "Plan for"
    yield (
        f"{kind} {len(plan.uses)} uses in {format_nbytes(plan.budget_nbytes)}, "
        f"link {plan.bandwidth / 1e9:.3g} GB/s"
    )
    yield (
        f"predicted {plan.seconds:.3f} s = compute {compute:.3f} s + stall "
        f"{plan.stall_seconds:.3f} s; at most {above:.1%} above the best possible "
        f"(bound {plan.bound_seconds:.3f} s)"
    )
    share = copying / plan.seconds if plan.seconds else 0.0
    yield (
        f"peak {format_nbytes(plan.peak_nbytes)}; fetched {format_nbytes(plan.fetched_nbytes)}, "
        f"link busy {share:.0%}"
    )


_HEAD = ("segments", "count", "bytes", "stay", "stream", "fetches", "fetched", "stall s", "why")


def _row(plan: Plan, family: Family) -> tuple[str, ...]:
    total, kept = (
        format_nbytes(sum(plan.nbytes[name] for name in names))
        for names in (family.segments, family.kept)
    )
    why = ", ".join(f"{reason} ({times}x)" for reason, times in family.why.most_common())
    return (
        family.name if len(family.segments) > 1 else family.segments[0],
        str(len(family.segments)),
        total,
        f"{len(family.kept)} ({kept})" if family.kept else "-",
        str(family.streamed or "-"),
        str(family.fetches),
        format_nbytes(family.fetched_nbytes),
        f"{family.stall_seconds:.3f}",
        why or "-",
    )


def _aligned(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        yield "  ".join([*cells, row[-1]])


def _longest(plan: Plan, stalls: list[Stall]) -> Iterator[str]:
    ranked = sorted(stalls, key=lambda stall: (-stall.seconds, stall.index))
    shown = ranked[:_MOST_STALLS]
    yield f"longest stalls ({len(shown)} of {len(stalls)}):"
    for stall in shown:
        names = "+".join(plan.uses[stall.index].segments)
        yield (
            f"  use {stall.index} ({names}) waits {stall.seconds:.3f} s "
            f"for {stall.segment}: {stall.why}"
        )


def _stem(name: str) -> str:
    """``name`` without its part, with its numbers out; but text_encoder_2 and text_encoder_3 are
    two components."""
    return re.sub(r"(?<![\d_])\d+", "#", re.sub(r"/\d+$", "", name))
