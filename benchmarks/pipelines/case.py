"""What a case is, and the few helpers that every builder uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias, TypeVar

import numpy as np
import PIL.Image
import torch
from torch import nn

PROMPT = "a red bird on a snowy branch"
NEGATIVE_PROMPT = "blurry, grey"
CALL_SEED = 7

Pipe = TypeVar("Pipe")
Pipeline: TypeAlias = Any  # a DiffusionPipeline or a ModularPipeline: no common base


class UnknownSizeError(ValueError):
    """A builder was asked for a size that it does not have."""

    def __init__(self, size: str, known: Mapping[str, Any]) -> None:
        self.size = size
        self.known = tuple(known)
        super().__init__(f"there is no size {size!r}; choose one of: {', '.join(self.known)}")


@dataclass(frozen=True)
class Case:
    """A pipeline with small random weights, and one call of it whose result can be compared."""

    name: str
    build: Callable[..., Pipeline]  # (size="tiny", dtype=torch.float32, seed=0)
    call_kwargs: Callable[[Pipeline, int], dict[str, Any]]  # (pipe, steps)
    output: str = "images"  # the attribute of the output that holds the result; "+" joins two
    unused: tuple[str, ...] = ()  # components that are loaded, and that the call does not run
    seq: str | None = None  # for `attach`, where the class declares no sequence

    def run(
        self, pipe: Pipeline, steps: int = 2, **overrides: Any
    ) -> torch.Tensor | np.ndarray[Any, Any]:
        """The result of one call with a fixed seed: the same bits at each run on one device."""
        pipe.set_progress_bar_config(disable=True)
        output = pipe(**{**self.call_kwargs(pipe, steps), **overrides})
        results = [getattr(output, name) for name in self.output.split("+")]
        if isinstance(results[0], torch.Tensor):
            return torch.cat([result.cpu() for result in results])
        return np.concatenate(results)


def sized(sizes: Mapping[str, Any], size: str) -> Any:
    """The entry of `sizes` for `size`; raises UnknownSizeError."""
    if size not in sizes:
        raise UnknownSizeError(size, sizes)
    return sizes[size]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw weights from `seed` here, and leave the caller's random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def finish(pipe: Pipe, dtype: torch.dtype) -> Pipe:
    """`pipe` ready for inference in `dtype`, with no weight that multiplies its input by zero."""
    for module in modules(pipe).values():
        fill_zero_weights(module)
        cast(module, dtype)
        module.eval()
    return pipe


def modules(pipe: Pipeline) -> dict[str, nn.Module]:
    """The components of `pipe` that are modules, by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Bring `module` to `dtype`, but for what its class keeps in fp32, as loading does."""
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        if tensor.is_floating_point() and kept.isdisjoint(name.split(".")):
            tensor.data = tensor.data.to(dtype)


@torch.no_grad()
def fill_zero_weights(module: nn.Module) -> None:
    """Give zero-initialised weights (as ControlNet's) small values: a lost fetch must show."""
    for parameter in module.parameters():
        if parameter.ndim >= 2 and not parameter.any():
            parameter.normal_(std=0.02)


def cpu_generator() -> torch.Generator:
    """The noise of a call: on the host, so that every device draws the same."""
    return torch.Generator("cpu").manual_seed(CALL_SEED)


def guided_kwargs(steps: int, **more: Any) -> dict[str, Any]:
    """The arguments that most calls share: two prompts, classifier-free guidance, a tensor out."""
    return {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE_PROMPT,
        "guidance_scale": 5.0,
        "num_inference_steps": steps,
        "generator": cpu_generator(),
        "output_type": "pt",
        **more,
    }


def picture(side: int, seed: int = CALL_SEED) -> PIL.Image.Image:
    """A square RGB picture of random colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)
