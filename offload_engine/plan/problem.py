"""The question in numbers: segments and uses become indices, bytes become exact integers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from numbers import Integral
from typing import TypeVar

from ..errors import OffloadError, PlanError
from .model import Use

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Problem:
    """One planning question. Sizes and rooms share one integer unit, exact even for real sizes."""

    names: tuple[str, ...]  # of the segments
    sizes: tuple[int, ...]  # of each segment, in units
    copy_seconds: tuple[float, ...]  # of each segment
    unit_seconds: float  # to copy one unit
    needs: tuple[tuple[int, ...], ...]  # the segments of each use
    seconds: tuple[float, ...]  # of each use
    room: tuple[int, ...]  # units left for segments during each use: budget less workspace
    resident: tuple[int, ...]  # segments there at the start; empty if cyclic
    cyclic: bool
    elapsed: tuple[float, ...]  # compute seconds before each use, and of all of them

    @property
    def length(self) -> int:
        """The number of uses."""
        return len(self.needs)


def read_problem(
    nbytes: Mapping[str, int],
    uses: Sequence[Use],
    budget_nbytes: int,
    bandwidth: float,
    resident: Collection[str],
    cyclic: bool,
) -> Problem:
    """The checked question. Raises OffloadError for bad input, PlanError if a use cannot fit."""
    uses = [_as_use(use, index) for index, use in enumerate(uses)]
    _check_numbers(nbytes, uses, budget_nbytes, bandwidth)
    _check_names(nbytes, uses, resident)
    index = {name: i for i, name in enumerate(nbytes)}
    interned: dict[tuple[str, ...], tuple[int, ...]] = {}
    for use in uses:
        if use.segments not in interned:
            interned[use.segments] = tuple(dict.fromkeys(index[name] for name in use.segments))
    unit = _unit([budget_nbytes, *nbytes.values(), *(use[2] for use in uses)], budget_nbytes)
    problem = Problem(
        names=tuple(nbytes),
        sizes=tuple(_units_down(size, unit) for size in nbytes.values()),
        copy_seconds=tuple(float(value) / bandwidth for value in nbytes.values()),
        unit_seconds=(unit or 1) / bandwidth,
        needs=tuple(interned[use.segments] for use in uses),
        seconds=tuple(float(use.seconds) for use in uses),
        room=tuple(_units_up(budget_nbytes - use[2], unit) for use in uses),
        resident=() if cyclic else tuple(sorted(index[name] for name in set(resident))),
        cyclic=cyclic,
        elapsed=tuple(accumulate((float(use.seconds) for use in uses), initial=0.0)),
    )
    _check_fits(problem, nbytes, uses, budget_nbytes)
    return problem


def next_positions(needs: Sequence[tuple[int, ...]], count: int) -> list[list[int]]:
    """For each use and each of its segments: the next use of that segment, or ``len(needs)``."""
    length = len(needs)
    upcoming = [length] * count
    after: list[list[int]] = [[]] * length
    for position in range(length - 1, -1, -1):
        after[position] = [upcoming[segment] for segment in needs[position]]
        for segment in needs[position]:
            upcoming[segment] = position
    return after


def first_positions(needs: Sequence[tuple[int, ...]], count: int) -> list[int]:
    """The first use of each segment, or ``len(needs)``."""
    first = [len(needs)] * count
    for position in range(len(needs) - 1, -1, -1):
        for segment in needs[position]:
            first[segment] = position
    return first


def _as_use(use: Use, index: int) -> Use:
    """``use`` as a Use with a tuple of names; a lone name in place of a tuple is an error."""
    try:
        segments, seconds, workspace = use
    except (TypeError, ValueError):
        raise OffloadError(f"use {index} is {use!r}; give Use(segments, seconds, ...).") from None
    if isinstance(segments, str):
        raise OffloadError(f"use {index}: segments is the text {segments!r}; give ({segments!r},).")
    if type(use) is Use and type(segments) is tuple:
        return use
    return Use(tuple(segments), seconds, workspace)


def _is_number(value: object, least: float) -> bool:
    real = isinstance(value, (int, float)) or hasattr(value, "__float__")
    return real and not isinstance(value, bool) and least <= value < math.inf  # type: ignore


def _check_numbers(
    nbytes: Mapping[str, int], uses: Sequence[Use], budget_nbytes: int, bandwidth: float
) -> None:
    sizes = {name: n for name, n in nbytes.items() if not _is_number(n, 0) or n == 0}
    if sizes:
        raise OffloadError(f"segments need a positive number of bytes, got {sizes}.")
    if not _is_number(bandwidth, 0) or bandwidth == 0:
        raise OffloadError(f"bandwidth={bandwidth!r}: give a positive number of bytes per second.")
    if not _is_number(budget_nbytes, -math.inf):
        raise OffloadError(f"budget_nbytes={budget_nbytes!r}: give a number of bytes.")
    for field in ("seconds", "workspace_nbytes"):
        values = [getattr(use, field) for use in uses]
        bad = {i: value for i, value in enumerate(values) if not _is_number(value, 0)}
        if bad:
            raise OffloadError(f"{field} of a use is zero or more, got (by use): {bad}.")


def _check_names(nbytes: Mapping[str, int], uses: Sequence[Use], resident: Collection[str]) -> None:
    if isinstance(resident, str):
        raise OffloadError(f"resident is the text {resident!r}; give a collection of names.")
    unknown = {name: i for i, use in enumerate(uses) for name in use.segments if name not in nbytes}
    if unknown:
        raise OffloadError(f"unknown segments (by use): {unknown}; nbytes names {list(nbytes)}.")
    strangers = sorted(set(resident) - set(nbytes))
    if strangers:
        raise OffloadError(f"unknown residents {strangers}; nbytes names {list(nbytes)}.")


def _check_fits(
    problem: Problem, nbytes: Mapping[str, int], uses: Sequence[Use], budget_nbytes: int
) -> None:
    need = {needed: sum(problem.sizes[s] for s in needed) for needed in set(problem.needs)}
    excess = [need[needed] - room for needed, room in zip(problem.needs, problem.room, strict=True)]
    if excess and max(excess) > 0:
        worst = excess.index(max(excess))
        segments, _, workspace = uses[worst]
        needed_nbytes = sum(nbytes[name] for name in dict.fromkeys(segments)) + workspace
        raise PlanError(worst, segments, needed_nbytes, budget_nbytes)


def _unit(values: Sequence[float], budget: float) -> float:
    """Bytes in a unit, or 0 to count in whole bytes.

    Real numbers are counted in parts of 2**-44 of the budget, sizes rounded down and room up, so
    that what adds up to the budget fits, in whatever order it is added.
    """
    if all(isinstance(value, Integral) for value in values):
        return 0
    return abs(float(budget)) * 2.0**-44 or 1.0


def _units_down(size: float, unit: float) -> int:
    return max(1, math.floor(size / unit)) if unit else int(size)


def _units_up(room: float, unit: float) -> int:
    return math.ceil(room / unit) if unit else int(room)


def unrolled(problem: Problem, cycles: int) -> Problem:
    """``cycles`` rounds of a cyclic problem as one that is not cyclic and starts with nothing."""
    seconds = problem.seconds * cycles
    return replace(
        problem,
        needs=problem.needs * cycles,
        seconds=seconds,
        room=problem.room * cycles,
        cyclic=False,
        elapsed=tuple(accumulate(seconds, initial=0.0)),
    )


def rotated(problem: Problem, first: int) -> Problem:
    """The same cycle, begun at use ``first``."""
    seconds = _turn(problem.seconds, first)
    return replace(
        problem,
        needs=_turn(problem.needs, first),
        seconds=seconds,
        room=_turn(problem.room, first),
        elapsed=tuple(accumulate(seconds, initial=0.0)),
    )


def _turn(items: tuple[_T, ...], first: int) -> tuple[_T, ...]:
    return items[first:] + items[:first]
