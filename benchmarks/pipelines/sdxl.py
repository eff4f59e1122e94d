"""SDXL: text to image, image to image, ControlNet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    EulerDiscreteScheduler,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from .autoencoders import autoencoder_kl
from .case import Case, Pipeline, finish, guided_kwargs, picture, seeded, sized
from .encoders import clip_text, clip_text_projected
from .tokenizers import clip_tokenizer

_TIME_IDS = 6


@dataclass(frozen=True)
class _Size:
    """Widths and depths of one SDXL; `side` is the side of its latent image."""

    text: tuple[int, int]  # width, layers
    text_2: tuple[int, int]
    unet_channels: tuple[int, ...]
    unet_heads: tuple[int, ...]
    unet_transformers: tuple[int, ...]
    time_dim: int
    vae_channels: tuple[int, ...]
    norm_groups: int
    side: int
    vae_layers: int = 1


SIZES = {
    "tiny": _Size((32, 3), (32, 4), (32, 64), (2, 4), (1, 2), 8, (16, 32), 8, 16),
    "demo": _Size(
        text=(256, 4),
        text_2=(384, 6),
        unet_channels=(64, 128, 256),
        unet_heads=(2, 4, 8),
        unet_transformers=(1, 2, 4),
        time_dim=32,
        vae_channels=(32, 64, 128, 128),
        norm_groups=32,
        side=32,
    ),
    "full": _Size(  # the published model, but for its vocabulary
        text=(768, 12),
        text_2=(1280, 32),
        unet_channels=(320, 640, 1280),
        unet_heads=(5, 10, 20),
        unet_transformers=(1, 2, 10),
        time_dim=256,
        vae_channels=(128, 256, 512, 512),
        norm_groups=32,
        side=128,
        vae_layers=2,
    ),
}


def _unet(size: _Size) -> UNet2DConditionModel:
    levels = len(size.unet_channels)
    cross = levels - 1
    return UNet2DConditionModel(
        sample_size=size.side,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=size.unet_channels,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * cross),
        up_block_types=(*["CrossAttnUpBlock2D"] * cross, "UpBlock2D"),
        attention_head_dim=size.unet_heads,
        transformer_layers_per_block=size.unet_transformers,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=size.time_dim,
        projection_class_embeddings_input_dim=_TIME_IDS * size.time_dim + size.text_2[0],
        cross_attention_dim=size.text[0] + size.text_2[0],
        norm_num_groups=size.norm_groups,
    )


def _scheduler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )


def _components(size: _Size) -> dict[str, Any]:
    return {
        "text_encoder": clip_text(*size.text),
        "text_encoder_2": clip_text_projected(*size.text_2),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(pad_token="!"),
        "unet": _unet(size),
        "vae": autoencoder_kl(
            size.vae_channels,
            layers=size.vae_layers,
            norm_groups=size.norm_groups,
            scaling_factor=0.13025,
        ),
        "scheduler": _scheduler(),
    }


def build_sdxl(
    size: str = "tiny", dtype: torch.dtype = torch.float32, seed: int = 0
) -> StableDiffusionXLPipeline:
    """SDXL text to image; sizes "tiny", "demo" (0.3 GB in fp32) and "full" (6.7 GB in fp16)."""
    with seeded(seed):
        pipe = StableDiffusionXLPipeline(**_components(sized(SIZES, size)), add_watermarker=False)
        return finish(pipe, dtype)


def build_sdxl_img2img(
    size: str = "tiny", dtype: torch.dtype = torch.float32, seed: int = 0
) -> StableDiffusionXLImg2ImgPipeline:
    """SDXL image to image: the vae runs before the unet and after it."""
    with seeded(seed):
        parts = _components(sized(SIZES, size))
        return finish(StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False), dtype)


def build_sdxl_controlnet(
    size: str = "tiny", dtype: torch.dtype = torch.float32, seed: int = 0
) -> StableDiffusionXLControlNetPipeline:
    """SDXL with a controlnet, which the declared sequence does not name."""
    widths = sized(SIZES, size).vae_channels  # the control image shrinks as the vae's does
    with seeded(seed):
        parts = _components(sized(SIZES, size))
        parts["controlnet"] = ControlNetModel.from_unet(
            parts["unet"], conditioning_embedding_out_channels=widths
        )
        return finish(StableDiffusionXLControlNetPipeline(**parts, add_watermarker=False), dtype)


def _text_kwargs(pipe: Pipeline, steps: int) -> dict[str, Any]:
    return guided_kwargs(steps)


def _pixels(pipe: Pipeline) -> int:
    return int(pipe.unet.config.sample_size * pipe.vae_scale_factor)


def _image_kwargs(pipe: Pipeline, steps: int) -> dict[str, Any]:
    return guided_kwargs(steps, image=picture(_pixels(pipe)), strength=1.0)


def _control_kwargs(pipe: Pipeline, steps: int) -> dict[str, Any]:
    return guided_kwargs(steps, image=picture(_pixels(pipe)))


CASES = (
    Case("sdxl", build_sdxl, _text_kwargs),
    Case("sdxl_img2img", build_sdxl_img2img, _image_kwargs),
    Case("sdxl_controlnet", build_sdxl_controlnet, _control_kwargs),
)
