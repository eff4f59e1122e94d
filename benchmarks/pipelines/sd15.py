"""Stable Diffusion 1.5: text to image, image to image, ControlNet."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig

from .autoencoders import autoencoder_kl
from .case import Case, Pipeline, finish, guided_kwargs, picture, seeded, sized
from .encoders import clip_image_processor, clip_text, clip_vision
from .tokenizers import clip_tokenizer

_TEXT_WIDTH = 32
_LATENT_SIDE = 16
_PIXELS = 2 * _LATENT_SIDE
_UNUSED = ("image_encoder",)
SIZES = {"tiny": ((32, 64), (16, 32))}  # channels of the unet, of the vae


def _unet(channels: tuple[int, ...]) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=_LATENT_SIDE,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=_TEXT_WIDTH,
        norm_num_groups=8,
    )


def _scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _safety_checker() -> StableDiffusionSafetyChecker:
    config = CLIPConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        },
        projection_dim=32,
    )
    return StableDiffusionSafetyChecker(config)


def _components(size: str, image_encoder: bool, safety_checker: bool) -> dict[str, Any]:
    unet_channels, vae_channels = sized(SIZES, size)
    return {
        "text_encoder": clip_text(_TEXT_WIDTH),
        "tokenizer": clip_tokenizer(),
        "unet": _unet(unet_channels),
        "vae": autoencoder_kl(vae_channels),
        "scheduler": _scheduler(),
        "image_encoder": clip_vision() if image_encoder else None,
        "safety_checker": _safety_checker() if safety_checker else None,
        "feature_extractor": clip_image_processor() if image_encoder or safety_checker else None,
        "requires_safety_checker": False,
    }


def build_sd15(
    size: str = "tiny",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    image_encoder: bool = False,
    safety_checker: bool = False,
) -> StableDiffusionPipeline:
    """SD 1.5; `image_encoder` stays unused, `safety_checker` is excluded from the offload."""
    with seeded(seed):
        pipe = StableDiffusionPipeline(**_components(size, image_encoder, safety_checker))
        return finish(pipe, dtype)


def build_sd15_img2img(
    size: str = "tiny", dtype: torch.dtype = torch.float32, seed: int = 0
) -> StableDiffusionImg2ImgPipeline:
    """SD 1.5 image to image: the vae runs first and last, an image_encoder stays unused."""
    with seeded(seed):
        parts = _components(size, image_encoder=True, safety_checker=False)
        return finish(StableDiffusionImg2ImgPipeline(**parts), dtype)


def build_sd15_controlnet(
    size: str = "tiny", dtype: torch.dtype = torch.float32, seed: int = 0
) -> StableDiffusionControlNetPipeline:
    """SD 1.5 with a controlnet, which the declared sequence does not name."""
    with seeded(seed):
        parts = _components(size, image_encoder=False, safety_checker=False)
        controlnet = ControlNetModel.from_unet(
            parts["unet"], conditioning_embedding_out_channels=(8, 16)
        )
        return finish(StableDiffusionControlNetPipeline(**parts, controlnet=controlnet), dtype)


def _text_kwargs(pipe: Pipeline, steps: int) -> dict[str, Any]:
    return guided_kwargs(steps)


def _image_kwargs(pipe: Pipeline, steps: int) -> dict[str, Any]:
    return guided_kwargs(steps, image=picture(_PIXELS), strength=1.0)


def _control_kwargs(pipe: Pipeline, steps: int) -> dict[str, Any]:
    return guided_kwargs(steps, image=picture(_PIXELS))


CASES = (
    Case("sd15", build_sd15, _text_kwargs),
    Case(
        "sd15_image_encoder", partial(build_sd15, image_encoder=True), _text_kwargs, unused=_UNUSED
    ),
    Case("sd15_safety_checker", partial(build_sd15, safety_checker=True), _text_kwargs),
    Case("sd15_img2img", build_sd15_img2img, _image_kwargs, unused=_UNUSED),
    Case("sd15_controlnet", build_sd15_controlnet, _control_kwargs),
)
