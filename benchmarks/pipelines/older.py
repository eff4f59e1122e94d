"""Older classes that never call maybe_free_model_hooks: RePaint, latent diffusion."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    LDMTextToImagePipeline,
    RePaintPipeline,
    RePaintScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig,
    LDMBertModel,
)

from .autoencoders import autoencoder_kl
from .case import Case, Pipeline, cpu_generator, finish, guided_kwargs, picture, seeded, sized
from .tokenizers import CLIP_VOCAB_SIZE, clip_tokenizer

_PIXELS = 32
_TEXT_WIDTH = 32
SIZES = {"tiny": (32, 64)}  # channels of the unet


def build_repaint(
    size: str = "tiny", dtype: torch.dtype = torch.float32, seed: int = 0
) -> RePaintPipeline:
    """RePaint: one component, run many times, with numpy images out."""
    with seeded(seed):
        unet = UNet2DModel(
            sample_size=_PIXELS,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=sized(SIZES, size),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
        )
        return finish(RePaintPipeline(unet=unet, scheduler=RePaintScheduler()), dtype)


def _bert() -> LDMBertModel:
    return LDMBertModel(
        LDMBertConfig(
            vocab_size=CLIP_VOCAB_SIZE,
            d_model=_TEXT_WIDTH,
            encoder_layers=2,
            encoder_ffn_dim=2 * _TEXT_WIDTH,
            encoder_attention_heads=4,
            head_dim=8,
        )
    )


def build_ldm_text2img(
    size: str = "tiny", dtype: torch.dtype = torch.float32, seed: int = 0
) -> LDMTextToImagePipeline:
    """Latent diffusion, with components named `bert` and `vqvae`."""
    with seeded(seed):
        unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=sized(SIZES, size),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=_TEXT_WIDTH,
            attention_head_dim=4,
            norm_num_groups=8,
        )
        pipe = LDMTextToImagePipeline(
            vqvae=autoencoder_kl((16, 16, 32, 32)),
            bert=_bert(),
            tokenizer=clip_tokenizer(),
            unet=unet,
            scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False),
        )
        return finish(pipe, dtype)


def _inpaint_kwargs(pipe: Pipeline, steps: int) -> dict[str, Any]:
    return {
        "image": picture(_PIXELS),
        "mask_image": picture(_PIXELS, seed=1).convert("L"),
        "num_inference_steps": steps,
        "jump_length": 1,
        "jump_n_sample": 2,
        "generator": cpu_generator(),
        "output_type": "np",
    }


def _text_kwargs(pipe: Pipeline, steps: int) -> dict[str, Any]:
    call = guided_kwargs(steps, height=_PIXELS, width=_PIXELS)
    del call["negative_prompt"]
    return call


CASES = (
    Case("repaint", build_repaint, _inpaint_kwargs),
    Case("ldm_text2img", build_ldm_text2img, _text_kwargs),
)
