"""A modular pipeline: its components have no declared sequence, and nothing frees hooks."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxAutoBlocks

from .case import PROMPT, Case, Pipeline, cpu_generator
from .flux import build_flux

_SEQ = "text_encoder->text_encoder_2->transformer->vae"


def build_modular_flux(
    size: str = "tiny", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Pipeline:
    """Flux text to image, made of blocks."""
    source: Any = build_flux(size, dtype, seed)
    blocks: Any = FluxAutoBlocks()
    _silence(blocks)
    pipe: Any = blocks.init_pipeline()
    parts = source.components
    pipe.update_components(**{name: parts[name] for name in pipe.component_names if name in parts})
    return pipe


def _silence(block: Any) -> None:
    """Hide the progress bars of a loop however deep it lies: the pipeline reaches one level."""
    if hasattr(block, "set_progress_bar_config"):  # a loop
        block.set_progress_bar_config(disable=True)
    for inner in block.sub_blocks.values():
        _silence(inner)


def _text_kwargs(pipe: Pipeline, steps: int) -> dict[str, Any]:
    return {
        "prompt": PROMPT,
        "height": 32,
        "width": 32,
        "num_inference_steps": steps,
        "max_sequence_length": 48,
        "generator": cpu_generator(),
        "output_type": "pt",
    }


CASES = (Case("modular_flux", build_modular_flux, _text_kwargs, seq=_SEQ),)
