"""Sana with a controlnet, the one family whose declared sequence names it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    FlowMatchEulerDiscreteScheduler,
    SanaControlNetModel,
    SanaControlNetPipeline,
    SanaTransformer2DModel,
)
from transformers import Gemma2Config, Gemma2Model

from .case import Case, Pipeline, finish, guided_kwargs, picture, seeded, sized
from .tokenizers import GEMMA_VOCAB_SIZE, gemma_tokenizer

_TEXT_WIDTH = 32
_LATENT_CHANNELS = 4
_PIXELS = 32
SIZES = {"tiny": (3, 2)}  # layers of the transformer, of the controlnet


def _text_encoder() -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=GEMMA_VOCAB_SIZE,
            hidden_size=_TEXT_WIDTH,
            intermediate_size=2 * _TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        )
    )


def _vae() -> AutoencoderDC:
    return AutoencoderDC(
        latent_channels=_LATENT_CHANNELS,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )


def _transformer_config(layers: int) -> dict[str, Any]:
    return {
        "in_channels": _LATENT_CHANNELS,
        "out_channels": _LATENT_CHANNELS,
        "num_layers": layers,
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "num_cross_attention_heads": 4,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 32,
        "caption_channels": _TEXT_WIDTH,
        "sample_size": 16,
        "patch_size": 1,
    }


def build_sana_controlnet(
    size: str = "tiny", dtype: torch.dtype = torch.float32, seed: int = 0
) -> SanaControlNetPipeline:
    """Sana with a controlnet: it alternates with the transformer; the vae runs first and last."""
    layers, controlnet_layers = sized(SIZES, size)
    with seeded(seed):
        pipe = SanaControlNetPipeline(
            tokenizer=gemma_tokenizer(),
            text_encoder=_text_encoder(),
            vae=_vae(),
            transformer=SanaTransformer2DModel(**_transformer_config(layers)),
            controlnet=SanaControlNetModel(**_transformer_config(controlnet_layers)),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
        return finish(pipe, dtype)


def _control_kwargs(pipe: Pipeline, steps: int) -> dict[str, Any]:
    return guided_kwargs(
        steps,
        control_image=picture(_PIXELS),
        height=_PIXELS,
        width=_PIXELS,
        max_sequence_length=32,
        complex_human_instruction=None,
        use_resolution_binning=False,
    )


CASES = (Case("sana_controlnet", build_sana_controlnet, _control_kwargs),)
