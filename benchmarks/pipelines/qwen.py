"""Qwen-Image: a vision-language model as the text encoder, a video autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from .case import Case, Pipeline, finish, guided_kwargs, seeded, sized
from .tokenizers import QWEN_VOCAB_SIZE, qwen_tokenizer

_TEXT_WIDTH = 32
_LATENT_CHANNELS = 4
_PIXELS = 32
SIZES = {"tiny": 3}  # layers of the transformer


def _text_encoder() -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "vocab_size": QWEN_VOCAB_SIZE,
        "bos_token_id": None,
        "eos_token_id": None,
        "hidden_size": _TEXT_WIDTH,
        "intermediate_size": 2 * _TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [1, 1, 2],
        },
    }
    vision = {
        "depth": 1,
        "hidden_size": _TEXT_WIDTH,
        "intermediate_size": 2 * _TEXT_WIDTH,
        "num_heads": 4,
        "out_hidden_size": _TEXT_WIDTH,
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    )


def _vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=_LATENT_CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * _LATENT_CHANNELS,
        latents_std=[1.0] * _LATENT_CHANNELS,
    )


def _transformer(layers: int) -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * _LATENT_CHANNELS,
        out_channels=_LATENT_CHANNELS,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=_TEXT_WIDTH,
        axes_dims_rope=(8, 4, 4),
    )


def build_qwen_image(
    size: str = "tiny", dtype: torch.dtype = torch.float32, seed: int = 0
) -> QwenImagePipeline:
    """Qwen-Image text to image."""
    with seeded(seed):
        pipe = QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=_vae(),
            text_encoder=_text_encoder(),
            tokenizer=qwen_tokenizer(),
            transformer=_transformer(sized(SIZES, size)),
        )
        return finish(pipe, dtype)


def _text_kwargs(pipe: Pipeline, steps: int) -> dict[str, Any]:
    call = guided_kwargs(steps, true_cfg_scale=2.0, height=_PIXELS, width=_PIXELS)
    del call["guidance_scale"]
    return call


CASES = (Case("qwen_image", build_qwen_image, _text_kwargs),)
