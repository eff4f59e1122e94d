"""The language of ``seq=``, the trace of a call, and learning one from the other. No torch.

A sequence is a row of stages. A stage names the components that must be resident together:
mostly one; several where they alternate in one loop (``a+b``). A declared sequence is a first
guess. What a call really did, its trace, is compressed into the next one by ``learn``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from .errors import SequenceError

_HOW_TO_GIVE_ONE = (
    "Give one as seq='text_encoder->unet->vae' or as a list of names; '+' joins components "
    "that alternate in one loop ('text_encoder->controlnet+unet->vae')."
)
_NAME = re.compile(r"[\w.]+")
_LONGEST_LOOP = 16  # switches in one round of a loop; longer ones are left as they are


@dataclass(frozen=True)
class Sequence:
    """The order in which components run, stage by stage."""

    stages: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        return "->".join("+".join(stage) for stage in self.stages)

    @property
    def names(self) -> tuple[str, ...]:
        """Every component once, in order of first appearance."""
        return tuple(dict.fromkeys(name for stage in self.stages for name in stage))

    def only(self, known: Iterable[str]) -> Sequence:
        """The same order without the names that are not in ``known``."""
        known = set(known)
        kept = (tuple(name for name in stage if name in known) for stage in self.stages)
        return Sequence(tuple(stage for stage in kept if stage))

    def check_names(self, known: Iterable[str]) -> None:
        """Raises SequenceError that lists every name missing from ``known``, with near matches."""
        known = list(known)
        unknown = [name for name in self.names if name not in known]
        if not unknown:
            return
        near = {name: difflib.get_close_matches(name, known, n=1) for name in unknown}
        said = [f"{n!r} (did you mean {near[n][0]!r}?)" if near[n] else repr(n) for n in unknown]
        raise SequenceError(
            f"seq names components that the pipeline does not have: {', '.join(said)}. "
            f"It has: {', '.join(known) or 'none'}.",
            names=unknown,
        )


def parse(seq: str | Seq[str]) -> Sequence:
    """Reads ``seq``: text with ``->`` and ``+``, or a list whose items may hold ``+``.

    Raises SequenceError that points at the place where reading stopped.
    """
    if isinstance(seq, str):
        return Sequence(_parse_text(seq))
    if not isinstance(seq, Seq) or not all(isinstance(item, str) for item in seq):
        raise SequenceError(f"seq must be text or a list of names, not {seq!r}. {_HOW_TO_GIVE_ONE}")
    if not seq:
        raise SequenceError(f"seq is empty. {_HOW_TO_GIVE_ONE}")
    return Sequence(tuple(_parse_stage(item, item, 0) for item in seq))


def declared(text: str, known: Iterable[str]) -> Sequence:
    """A pipeline's own ``model_cpu_offload_seq``, read as diffusers does: what is not known is
    passed over, and so is a name that comes again."""
    known = set(known)
    names = dict.fromkeys(name for name in text.split("->") if name in known)
    return Sequence(tuple((name,) for name in names))


def missing(what: str) -> SequenceError:
    """The error for a pipeline without any sequence."""
    return SequenceError(f"{what} has no model_cpu_offload_seq. {_HOW_TO_GIVE_ONE}")


def _parse_text(text: str) -> tuple[tuple[str, ...], ...]:
    stages, start = [], 0
    for part in text.split("->"):
        stages.append(_parse_stage(part, text, start))
        start += len(part) + 2
    return tuple(stages)


def _parse_stage(part: str, text: str, start: int) -> tuple[str, ...]:
    names = []
    for piece in part.split("+"):
        name = piece.strip()
        if not _NAME.fullmatch(name):
            column = start + len(piece) - len(piece.lstrip())
            found = f"{name!r} is not a component name" if name else "a name is missing"
            raise SequenceError(
                f"seq cannot be read: {found}\n  {text}\n  {' ' * column}^\n{_HOW_TO_GIVE_ONE}",
                names=[name] if name else [],
                position=column,
            )
        names.append(name)
        start += len(piece) + 1
    return tuple(dict.fromkeys(names))


def learn(trace: Seq[str], nbytes: Mapping[str, int] | None = None) -> Sequence:
    """The stages behind ``trace``, the components in the order they were switched to.

    A stretch that repeats itself (a b a b) becomes one stage, see `_joins`; the rest stays as it
    ran. ``nbytes``: the weights of each component, if known.
    """
    stages: list[tuple[str, ...]] = []
    start = 0
    while start < len(trace):
        end, stage = _loop_at(trace, start, nbytes or {})
        if not stages or stages[-1] != stage:
            stages.append(stage)
        start = end
    return Sequence(tuple(stages))


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
