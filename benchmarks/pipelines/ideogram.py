"""Ideogram 4: two transformers that alternate in the loop, a text encoder entered by its parts."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
)
from transformers import Qwen3VLConfig, Qwen3VLModel

from .autoencoders import autoencoder_kl_flux2
from .case import PROMPT, Case, Pipeline, cpu_generator, finish, seeded, sized
from .tokenizers import QWEN_VOCAB_SIZE, qwen_tokenizer

_TEXT_WIDTH = 16
_TEXT_LAYERS = 36  # the pipeline reads thirteen of them, by fixed numbers
_TAPPED_LAYERS = 13
_LATENT_CHANNELS = 4
_PIXELS = 32
SIZES = {"tiny": 2}  # layers of each transformer


def _text_encoder() -> Qwen3VLModel:
    text = {
        "vocab_size": QWEN_VOCAB_SIZE,
        "hidden_size": _TEXT_WIDTH,
        "intermediate_size": 2 * _TEXT_WIDTH,
        "num_hidden_layers": _TEXT_LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [2, 1, 1],
        },
    }
    vision = {
        "depth": 1,
        "hidden_size": _TEXT_WIDTH,
        "intermediate_size": 2 * _TEXT_WIDTH,
        "num_heads": 2,
        "out_hidden_size": _TEXT_WIDTH,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    return Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision))


def _transformer(layers: int) -> Ideogram4Transformer2DModel:
    return Ideogram4Transformer2DModel(
        in_channels=4 * _LATENT_CHANNELS,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        intermediate_size=64,
        adaln_dim=16,
        llm_features_dim=_TAPPED_LAYERS * _TEXT_WIDTH,
        mrope_section=(4, 2, 2),
    )


def build_ideogram4(
    size: str = "tiny", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Ideogram4Pipeline:
    """Ideogram 4 without its prompt enhancer, which needs accelerate."""
    layers = sized(SIZES, size)
    with seeded(seed):
        pipe = Ideogram4Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=autoencoder_kl_flux2(_LATENT_CHANNELS),
            text_encoder=_text_encoder(),
            tokenizer=qwen_tokenizer(),
            transformer=_transformer(layers),
            unconditional_transformer=_transformer(layers),
        )
        return finish(pipe, dtype)


def _text_kwargs(pipe: Pipeline, steps: int) -> dict[str, Any]:
    return {
        "prompt": PROMPT,
        "height": _PIXELS,
        "width": _PIXELS,
        "num_inference_steps": steps,
        "guidance_scale": 4.0,
        "guidance_schedule": None,
        "max_sequence_length": 64,
        "generator": cpu_generator(),
        "output_type": "pt",
    }


CASES = (Case("ideogram4", build_ideogram4, _text_kwargs),)
