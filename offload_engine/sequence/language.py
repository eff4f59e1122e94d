"""The language of ``seq=``: what a user, or a pipeline, says about the order of components.

A sequence is a row of stages. A stage names the components that must be resident together:
mostly one; several where they alternate in one loop (``a+b``). A declared sequence is a first
guess; what a call really did is learned from its trace, see `chain.learn`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from ..errors import SequenceError

_HOW_TO_GIVE_ONE = (
    "Give one as seq='text_encoder->unet->vae' or as a list of names; '+' joins components "
    "that alternate in one loop ('text_encoder->controlnet+unet->vae')."
)
_NAME = re.compile(r"[\w.]+")


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
