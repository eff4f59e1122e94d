"""Wan: text to video, and the two-transformer models of Wan 2.2."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)

from .case import Case, Pipeline, finish, guided_kwargs, picture, seeded, sized
from .encoders import umt5_text
from .tokenizers import t5_tokenizer

_TEXT_WIDTH = 32
_LATENT_CHANNELS = 16
_PIXELS = 32
_CONDITION_CHANNELS = _LATENT_CHANNELS + 4  # the encoded image and its mask
_BOUNDARY_RATIO = 0.875
SIZES = {"tiny": 3}  # layers of each transformer


class _WanImageToVideo(WanImageToVideoPipeline):
    """Image to video that does without ftfy: upstream's own prompt cleaning needs it."""

    _get_t5_prompt_embeds = WanPipeline._get_t5_prompt_embeds


def _transformer(layers: int, in_channels: int = _LATENT_CHANNELS) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=_LATENT_CHANNELS,
        text_dim=_TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=64,
        num_layers=layers,
        rope_max_seq_len=32,
    )


def _vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=_LATENT_CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )


def _components() -> dict[str, Any]:
    return {
        "text_encoder": umt5_text(_TEXT_WIDTH),
        "tokenizer": t5_tokenizer(),
        "vae": _vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def build_wan_t2v(
    size: str = "tiny",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    two_transformers: bool = False,
) -> WanPipeline:
    """Wan text to video; Wan 2.2 changes to `transformer_2` once, when the noise is low."""
    layers = sized(SIZES, size)
    with seeded(seed):
        pipe = WanPipeline(
            **_components(),
            transformer=_transformer(layers),
            transformer_2=_transformer(layers) if two_transformers else None,
            boundary_ratio=_BOUNDARY_RATIO if two_transformers else None,
        )
        return finish(pipe, dtype)


def build_wan22_i2v(
    size: str = "tiny", dtype: torch.dtype = torch.float32, seed: int = 0
) -> WanImageToVideoPipeline:
    """Wan 2.2 image to video: the vae runs before both transformers and after them."""
    layers = sized(SIZES, size)
    in_channels = _LATENT_CHANNELS + _CONDITION_CHANNELS
    with seeded(seed):
        pipe = _WanImageToVideo(
            **_components(),
            transformer=_transformer(layers, in_channels),
            transformer_2=_transformer(layers, in_channels),
            boundary_ratio=_BOUNDARY_RATIO,
        )
        return finish(pipe, dtype)


def _video_kwargs(pipe: Pipeline, steps: int) -> dict[str, Any]:
    shape = {"height": _PIXELS, "width": _PIXELS, "num_frames": 5, "max_sequence_length": 32}
    return guided_kwargs(steps, **shape)


def _image_kwargs(pipe: Pipeline, steps: int) -> dict[str, Any]:
    return {**_video_kwargs(pipe, steps), "image": picture(_PIXELS)}


CASES = (
    Case("wan_t2v", build_wan_t2v, _video_kwargs, "frames"),
    Case("wan22_t2v", partial(build_wan_t2v, two_transformers=True), _video_kwargs, "frames"),
    Case("wan22_i2v", build_wan22_i2v, _image_kwargs, "frames"),
)
