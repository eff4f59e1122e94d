"""What each use in a call cost: seconds on the device, and memory beside the weights.

[Note: workspace] The peak that torch keeps is the user's and only grows; it is never reset. If it
grew during a use, it tells the use's workspace to the byte. If not, what lay below it is a safe
upper bound, often a bad one: a decoder that runs after a large denoiser stays below its peak. So
where a plan depends on it, the first forward of a use is also watched operator by operator
(`Sampler`): no operator needs more than what is allocated before it and all that it allocates.
In chain mode that is done only after a call in which the peak never grew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from . import slots
from .transfers import Link, elapsed_seconds


class Mark:
    """One use of a unit, as it is measured."""

    __slots__ = (
        "before_nbytes", "began", "ended", "forwards", "grown_nbytes", "held_nbytes",
        "peak_after_nbytes", "peak_before_nbytes", "reached", "seen_nbytes", "unit", "work",
    )  # fmt: skip

    def __init__(self, unit: str, work: int, forwards: int) -> None:
        self.unit = unit
        self.work = work  # elements in the arguments, at most: a measure of the activations
        self.forwards = forwards  # 0: not counted, since the guide lets all but the first pass
        self.reached: torch.Event | None = None  # the use before has ended
        self.began: torch.Event | None = None  # its weights have landed
        self.ended: torch.Event | None = None
        self.held_nbytes = 0  # in slots, while it ran
        self.peak_before_nbytes = 0  # of all that is allocated
        self.peak_after_nbytes = 0
        self.before_nbytes = 0  # allocated when it began
        self.grown_nbytes: int | None = None  # at most, by what was sampled; None: it was not
        self.seen_nbytes = 0  # allocated between two operators, at most: it needs no less

    @property
    def seconds(self) -> float:
        return elapsed_seconds(self.began, self.ended)

    @property
    def stall_seconds(self) -> float:
        return 0.0 if self.began is self.reached else elapsed_seconds(self.reached, self.began)

    def workspace_nbytes(self, outside_nbytes: int) -> tuple[int, bool]:
        """Bytes beside the weights, and whether they are exact and not an upper bound.

        ``outside_nbytes``: what was allocated before the call, apart from weights.
        """
        below = self.held_nbytes + outside_nbytes
        workspace = max(0, self.peak_after_nbytes - below)
        if self.peak_after_nbytes > self.peak_before_nbytes:
            return workspace, True
        if self.grown_nbytes is not None:
            workspace = min(workspace, max(0, self.before_nbytes + self.grown_nbytes - below))
        return workspace, False


class Meter:
    """Marks the uses of one call on a device."""

    def __init__(self, link: Link | None, most_marks: int = 200_000) -> None:
        self._link = link
        self.marks: deque[Mark] = deque(maxlen=most_marks)
        # Allocated apart from weights, when the call began.
        self.outside_nbytes = 0 if link is None else slots.outside_nbytes(link.device)
        self.workspaces: dict[str, tuple[int, int]] = {}  # unit -> largest work, its workspace
        self.ways: set[tuple[str, str]] = set()  # unit, method: what was entered, and how
        self.sampler: Sampler | None = None  # while it watches operators
        self.is_interrupted = False  # by a call of another pipeline within this one
        self._grown: dict[str, tuple[int, int]] = {}  # unit -> largest work sampled, its growth
        self._sampled: dict[tuple[str, str], int] = {}  # unit, method -> largest work sampled
        self._left: tuple[int, int] | None = None  # allocated, and ever, after the last forward

    @property
    def is_full(self) -> bool:
        """Whether the first marks may be gone."""
        return len(self.marks) == self.marks.maxlen

    def boundary(self) -> torch.Event | None:
        """The use that runs ends here."""
        if self._link is None:
            return None
        event = self._link.mark()
        if self.marks:
            last = self.marks[-1]
            self._take_sample(last)
            self._look_behind(last)
            last.ended = event
            last.peak_after_nbytes = slots.peak_nbytes(self._link.device)
            measured = (last.work, last.workspace_nbytes(self.outside_nbytes)[0])
            known = self.workspaces.get(last.unit, measured)
            self.workspaces[last.unit] = (max(known[0], measured[0]), max(known[1], measured[1]))
        return event

    def workspace_of(self, unit: str) -> tuple[int, int]:
        """The work of its largest use that was measured, -1 if none was, and the workspace that it
        needs now for that: what is allocated already may be more than it was then."""
        work, workspace = self.workspaces.get(unit, (-1, 0))
        known_work, grown = self._grown.get(unit, (-1, 0))
        if self._link is not None and known_work >= work >= 0:
            there = slots.outside_nbytes(self._link.device) - self.outside_nbytes
            workspace = max(workspace, there + grown)
        return work, workspace

    def run(
        self,
        unit: str,
        way: str,
        can_be_watched: Callable[[], bool],
        bare: Callable[..., Any],
        args: Any,
        kwargs: Any,
    ) -> Any:
        """Runs ``bare``, the method ``way`` of ``unit``, which was just entered, and samples what
        it allocates; unless it was sampled before with as much work, or cannot be watched."""
        link = self._link
        if link is None or self.sampler is not None or not self.marks:
            return bare(*args, **kwargs)
        self._look_behind(self.marks[-1])
        work = self.marks[-1].work
        try:
            is_known = work <= self._sampled.get((unit, way), -1)
            if is_known or not Sampler.works_on(link.device) or not can_be_watched():
                return bare(*args, **kwargs)
            self._sampled[unit, way] = work
            self.sampler = Sampler(link.device)
            with self.sampler:
                return bare(*args, **kwargs)
        finally:
            self._take_sample(self.marks[-1])
            self.sampler = None
            device = link.device
            self._left = slots.allocated_nbytes(device), slots.ever_allocated_nbytes(device)

    def _take_sample(self, mark: Mark) -> None:
        """The use that runs has grown by no more than was sampled; if this time nothing was, by no
        more than its unit did before with as much work."""
        known = self._grown.get(mark.unit, (-1, 0))
        if self.sampler is not None:
            mark.seen_nbytes = max(mark.seen_nbytes, self.sampler.seen_nbytes)
            grown = max(self.sampler.take() - mark.before_nbytes, mark.grown_nbytes or 0)
            self._grown[mark.unit] = (max(known[0], mark.work), max(known[1], grown))
        elif mark.work <= known[0]:
            grown = known[1]
        else:
            return
        mark.grown_nbytes = max(grown, mark.grown_nbytes or 0)

    def _look_behind(self, mark: Mark) -> None:
        """Between forwards, the pipeline's own code has grown it by no more than it allocated."""
        if self._left is not None and self._link is not None:
            allocated, ever = self._left
            gone = slots.ever_allocated_nbytes(self._link.device) - ever
            if mark.grown_nbytes is not None:
                mark.grown_nbytes = max(mark.grown_nbytes, allocated + gone - mark.before_nbytes)
            self._left = None

    def begin(self, mark: Mark, reached: torch.Event | None, late: bool) -> None:
        """Its weights are there or on their way (``late``); the next operators belong to it."""
        self.marks.append(mark)
        if self._link is None:
            return
        mark.reached = reached
        mark.began = self._link.mark() if late else reached
        if self.sampler is not None:
            self.sampler.take()  # what was there until now does not belong to it
        mark.before_nbytes = mark.seen_nbytes = slots.allocated_nbytes(self._link.device)
        mark.held_nbytes = slots.lent_nbytes(self._link.device)
        mark.peak_before_nbytes = slots.peak_nbytes(self._link.device)


class Sampler:
    """Notes the most bytes that the operators inside it can have had allocated at any time.

    In inference mode it sees functions in their place, which is coarser: there, composite operators
    choose other kernels below a dispatch mode, and the bits would be others.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._most_nbytes = 0
        self.seen_nbytes = 0  # allocated between two of them, at most
        self._before = slots.allocated_nbytes(device), slots.ever_allocated_nbytes(device)
        coarse = torch.is_inference_mode_enabled()
        self._mode: Any = _Functions(self.look) if coarse else _Operators(self.look)

    def __enter__(self) -> None:
        self._mode.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._mode.__exit__(*exception)

    def look(self) -> None:
        """No more than was allocated at the last look, and all that was allocated since."""
        allocated, ever = self._before
        now = slots.allocated_nbytes(self._device), slots.ever_allocated_nbytes(self._device)
        self._most_nbytes = max(self._most_nbytes, allocated + now[1] - ever)
        self.seen_nbytes = max(self.seen_nbytes, now[0])
        self._before = now

    def take(self) -> int:
        """The most since the last time."""
        self.look()
        most, self._most_nbytes, self.seen_nbytes = self._most_nbytes, 0, 0
        return most

    @staticmethod
    def works_on(device: torch.device) -> bool:
        """Whether the allocator counts what it ever allocated."""
        return slots.ever_allocated_nbytes(device) > 0


class _Operators(TorchDispatchMode):
    """Looks before and after each operator."""

    def __init__(self, look: Callable[[], None]) -> None:
        super().__init__()
        self._look = look

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _between_looks(self._look, func, args, kwargs)


class _Functions(TorchFunctionMode):
    """Looks before and after each function of torch's."""

    def __init__(self, look: Callable[[], None]) -> None:
        super().__init__()
        self._look = look

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _between_looks(self._look, func, args, kwargs)


def _between_looks(look: Callable[[], None], func: Any, args: Any, kwargs: Any) -> Any:
    look()
    result = func(*args, **(kwargs or {}))
    look()
    return result
