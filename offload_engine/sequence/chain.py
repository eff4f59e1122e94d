"""Learning the stages of a sequence from the trace of a call, and walking them in the next.

The trace of a call is compressed into the sequence of the next one by ``learn``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from collections.abc import Sequence as Seq

from .language import Sequence

_LONGEST_LOOP = 16  # switches in one round of a loop; longer ones are left as they are


def learn(trace: Seq[str], nbytes: Mapping[str, int] | None = None) -> Sequence:
    """The stages behind ``trace``, the components in the order they were switched to.

    A stretch that repeats itself (a b a b) becomes one stage, see `_joins`; the rest stays as it
    ran. ``nbytes``: the weights of each component, if known.
    """
    return Sequence(tuple(stage for stage, _ in _stretches(trace, nbytes or {})))


def stages_of(trace: Seq[str], nbytes: Mapping[str, int] | None = None) -> list[int]:
    """For each use in ``trace``, the number of its stage in ``learn(trace, nbytes)``."""
    stretches = enumerate(_stretches(trace, nbytes or {}))
    return [number for number, (_, count) in stretches for _ in range(count)]


def _stretches(trace: Seq[str], nbytes: Mapping[str, int]) -> list[tuple[tuple[str, ...], int]]:
    """Each stage with the number of its uses."""
    found: list[tuple[tuple[str, ...], int]] = []
    start = 0
    while start < len(trace):
        end, stage = _loop_at(trace, start, nbytes)
        if found and found[-1][0] == stage:
            found[-1] = (stage, found[-1][1] + end - start)
        else:
            found.append((stage, end - start))
        start = end
    return found


def _joins(members: Collection[str], rounds: int, nbytes: Mapping[str, int]) -> bool:
    """Whether a loop is worth having all its members resident together.

    A pair always is, and so is any loop of three rounds. Two rounds of more components are mostly
    the text encoders of a pipeline that encodes the prompt and then the negative prompt: they are
    joined only if together they take no more than the largest component does anyway.
    """
    room = max(nbytes.values(), default=0)
    together = sum(nbytes.get(name, 0) for name in members)
    return len(members) == 2 or rounds > 2 or together <= room


def _loop_at(trace: Seq[str], start: int, nbytes: Mapping[str, int]) -> tuple[int, tuple[str, ...]]:
    """End and members of the shortest loop from ``start`` on; of one use if there is none."""
    for period in range(2, min(_LONGEST_LOOP, (len(trace) - start) // 2) + 1):
        end = start + period
        while end < len(trace) and trace[end] == trace[end - period]:
            end += 1
        rounds = (end - start) // period
        members = tuple(dict.fromkeys(trace[start : start + period]))
        if rounds >= 2 and _joins(members, rounds, nbytes):
            return end, members
    return start + 1, (trace[start],)


class Cursor:
    """Follows one call through a sequence and says, at each switch, what stays resident.

    It finds its place again after any deviation, and joins components into a loop as soon as
    a switch between them repeats, so that an unforeseen loop costs a few extra fetches once.
    """

    def __init__(
        self, sequence: Sequence, nbytes: Mapping[str, int] | None = None, *, solo: bool = False
    ) -> None:
        """``nbytes``: the weights of each component, if known. ``solo``: never keep more than the
        component that runs."""
        self.sequence = sequence
        self.solo = solo
        self._nbytes = nbytes or {}
        self.trace: list[str] = []
        self._place = -1
        self._loop: frozenset[str] = frozenset()
        self._switches: dict[tuple[str, str], list[int]] = {}  # switch -> where in the trace

    def enter(self, name: str) -> frozenset[str]:
        """The components that may be resident while ``name`` runs; records the switch to it."""
        if not self.trace or self.trace[-1] != name:
            self._find_loop(name)
            self.trace.append(name)
            self._find_place(name)
        if self.solo:
            return frozenset((name,))
        stage = self.sequence.stages[self._place] if self._place >= 0 else ()
        keep = frozenset((name,))
        keep |= self._loop if name in self._loop else frozenset()
        return keep | frozenset(stage if name in stage else ())

    def wraps(self, name: str) -> bool:
        """True where ``name`` begins the sequence anew and the last use ended it.

        It tells one round from the next where no call does: components run by hand.
        """
        stages = self.sequence.stages
        return (
            len(stages) > 1
            and bool(self.trace)
            and self.trace[-1] in stages[-1]
            and name in stages[0]
            and name not in stages[-1]
        )

    def _find_loop(self, name: str) -> None:
        switch = (self.trace[-1] if self.trace else "", name)
        if switch in self._switches:
            seen = self._switches[switch]
            members = frozenset(self.trace[seen[-1] :])
            if _joins(members, len(seen) + 1, self._nbytes):
                self._loop |= members
        elif name not in self._loop and self._loop:
            self._loop, self._switches = frozenset(), {}
        self._switches.setdefault(switch, []).append(len(self.trace))

    def _find_place(self, name: str) -> None:
        stages = self.sequence.stages
        here = self._place
        ahead = [*range(max(here, 0), len(stages)), *range(max(here, 0))]
        self._place = next((i for i in ahead if name in stages[i]), here)
