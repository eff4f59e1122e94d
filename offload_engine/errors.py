"""The failures a user can meet, each carrying its names and numbers. Imports nothing."""

from __future__ import annotations

from collections.abc import Iterable


class OffloadError(ValueError):
    """Base of every error that this package raises on purpose."""


class SequenceError(OffloadError):
    """A ``seq`` that cannot be read, is missing, or names what the pipeline has not.

    ``names`` holds the offending names, ``position`` the character in the text of ``seq``
    where reading stopped (None where there is no such place).
    """

    def __init__(
        self, message: str, *, names: Iterable[str] = (), position: int | None = None
    ) -> None:
        super().__init__(message)
        self.names = tuple(names)
        self.position = position


class DeviceError(OffloadError, RuntimeError):
    """The device asked for does not exist, or there is no accelerator at all."""


class ComponentError(OffloadError):
    """Components that the engine cannot manage; ``names`` holds all of them."""

    def __init__(self, message: str, *, names: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.names = tuple(names)


class PlanError(OffloadError):
    """No legal plan: a use does not fit into the budget even alone.

    ``use_index`` and ``segments`` tell which use (the neediest, if several do not fit; None where
    a ``vram`` is too small for ``segments`` before there is a plan),
    ``needed_nbytes`` what it takes with its workspace, ``budget_nbytes`` what there is.
    """

    def __init__(
        self,
        use_index: int | None,
        segments: Iterable[str],
        needed_nbytes: int,
        budget_nbytes: int,
        message: str | None = None,
    ) -> None:
        self.use_index = use_index
        self.segments = tuple(segments)
        self.needed_nbytes = needed_nbytes
        self.budget_nbytes = budget_nbytes
        super().__init__(
            message
            or f"use {use_index} ({', '.join(self.segments)}) needs {needed_nbytes} bytes, "
            f"weights and workspace, but the budget is {budget_nbytes} bytes; "
            "raise the budget, or split the use into smaller segments."
        )
