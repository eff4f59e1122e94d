"""Stable Diffusion 3: three text encoders."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from .autoencoders import autoencoder_kl
from .case import Case, Pipeline, finish, guided_kwargs, seeded, sized
from .encoders import clip_text_projected, t5_text
from .tokenizers import clip_tokenizer, t5_tokenizer

_CLIP_WIDTH = 32
_T5_WIDTH = 64  # at least as wide as the two CLIP outputs together
_LATENT_CHANNELS = 4
_T5_TOKENS = 48
SIZES = {"tiny": 3}  # layers of the transformer


def _transformer(layers: int) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=_LATENT_CHANNELS,
        out_channels=_LATENT_CHANNELS,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=_T5_WIDTH,
        pooled_projection_dim=2 * _CLIP_WIDTH,
        pos_embed_max_size=16,
    )


def _components(size: str) -> dict[str, Any]:
    return {
        "text_encoder": clip_text_projected(_CLIP_WIDTH),
        "text_encoder_2": clip_text_projected(_CLIP_WIDTH),
        "text_encoder_3": t5_text(_T5_WIDTH),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(pad_token="!"),
        "tokenizer_3": t5_tokenizer(),
        "transformer": _transformer(sized(SIZES, size)),
        "vae": autoencoder_kl(latent_channels=_LATENT_CHANNELS, shift_factor=0.0609),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def build_sd3(
    size: str = "tiny", dtype: torch.dtype = torch.float32, seed: int = 0
) -> StableDiffusion3Pipeline:
    """SD3 text to image; with guidance each text encoder runs twice."""
    with seeded(seed):
        return finish(StableDiffusion3Pipeline(**_components(size)), dtype)


def _text_kwargs(pipe: Pipeline, steps: int) -> dict[str, Any]:
    return guided_kwargs(steps, height=32, width=32, max_sequence_length=_T5_TOKENS)


CASES = (Case("sd3", build_sd3, _text_kwargs),)
