"""Run a diffusers pipeline on a GPU too small for it, at nearly the speed of one that is not.

The front door loads the engine (and with it torch) on first use, so that
``import offload_engine.plan`` stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Engine", "OffloadError", "attach", "engine_of", "patch_diffusers"]

if TYPE_CHECKING:
    from .engine import Engine, attach, patch_diffusers
    from .errors import OffloadError
    from .pipeline import engine_of

_HOMES = {
    "Engine": ".engine",
    "attach": ".engine",
    "patch_diffusers": ".engine",
    "OffloadError": ".errors",
    "engine_of": ".pipeline",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    if name in ("plan", "sequence", "sim", "engine", "report", "errors"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
