"""Flux: text to image, with true classifier-free guidance, image to image."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)

from .autoencoders import autoencoder_kl
from .case import Case, Pipeline, finish, guided_kwargs, picture, seeded, sized
from .encoders import clip_text, t5_text
from .tokenizers import clip_tokenizer, t5_tokenizer

_TEXT_WIDTH = 32
_LATENT_CHANNELS = 4
_PIXELS = 32
_T5_TOKENS = 48
SIZES = {"tiny": (2, 2)}  # layers, single layers of the transformer


def _transformer(layers: int, single_layers: int) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * _LATENT_CHANNELS,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=_TEXT_WIDTH,
        pooled_projection_dim=_TEXT_WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )


def _components(size: str) -> dict[str, Any]:
    return {
        "text_encoder": clip_text(_TEXT_WIDTH),
        "text_encoder_2": t5_text(_TEXT_WIDTH),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": t5_tokenizer(),
        "transformer": _transformer(*sized(SIZES, size)),
        "vae": autoencoder_kl(latent_channels=_LATENT_CHANNELS, shift_factor=0.1159),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }


def build_flux(
    size: str = "tiny", dtype: torch.dtype = torch.float32, seed: int = 0
) -> FluxPipeline:
    """Flux text to image; its guidance is distilled."""
    with seeded(seed):
        return finish(FluxPipeline(**_components(size)), dtype)


def build_flux_img2img(
    size: str = "tiny", dtype: torch.dtype = torch.float32, seed: int = 0
) -> FluxImg2ImgPipeline:
    """Flux image to image: the vae runs before the transformer and after it."""
    with seeded(seed):
        return finish(FluxImg2ImgPipeline(**_components(size)), dtype)


def _true_cfg_kwargs(pipe: Pipeline, steps: int) -> dict[str, Any]:
    shape = {"height": _PIXELS, "width": _PIXELS, "max_sequence_length": _T5_TOKENS}
    return guided_kwargs(steps, guidance_scale=3.5, true_cfg_scale=2.0, **shape)


def _text_kwargs(pipe: Pipeline, steps: int) -> dict[str, Any]:
    return {**_true_cfg_kwargs(pipe, steps), "negative_prompt": None, "true_cfg_scale": 1.0}


def _image_kwargs(pipe: Pipeline, steps: int) -> dict[str, Any]:
    return {**_text_kwargs(pipe, steps), "image": picture(_PIXELS), "strength": 1.0}


CASES = (
    Case("flux", build_flux, _text_kwargs),
    Case("flux_true_cfg", build_flux, _true_cfg_kwargs),
    Case("flux_img2img", build_flux_img2img, _image_kwargs),
)
