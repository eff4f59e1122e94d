"""Priors: Kandinsky 2.2's excluded `prior`, and Stable Cascade's two pipelines in one."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DDPMWuerstchenScheduler,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    StableCascadeCombinedPipeline,
    UnCLIPScheduler,
)
from diffusers.models.unets import StableCascadeUNet
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

from .case import Case, Pipeline, finish, guided_kwargs, seeded, sized
from .encoders import clip_image_processor, clip_text_projected, clip_vision
from .tokenizers import clip_tokenizer

_WIDTH = 32
_PIXELS = 128
_EMBEDS = "image_embeds+negative_image_embeds"
SIZES = {"tiny": 2}  # layers of the prior


def build_kandinsky_prior(
    size: str = "tiny", dtype: torch.dtype = torch.float32, seed: int = 0
) -> KandinskyV22PriorPipeline:
    """Kandinsky 2.2 prior: `prior` is excluded from the offload and named in the sequence."""
    with seeded(seed):
        prior: Any = PriorTransformer(
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=sized(SIZES, size),
            embedding_dim=_WIDTH,
        )
        torch.nn.init.ones_(prior.clip_std)
        pipe = KandinskyV22PriorPipeline(
            prior=prior,
            image_encoder=clip_vision(_WIDTH),
            text_encoder=clip_text_projected(_WIDTH),
            tokenizer=clip_tokenizer(),
            scheduler=UnCLIPScheduler(
                variance_type="fixed_small_log",
                prediction_type="sample",
                clip_sample=True,
                clip_sample_range=5.0,
            ),
            image_processor=clip_image_processor(),
        )
        return finish(pipe, dtype)


def _cascade_unet(**more: Any) -> StableCascadeUNet:
    return StableCascadeUNet(
        conditioning_dim=_WIDTH,
        block_out_channels=(32, 32),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        clip_text_pooled_in_channels=_WIDTH,
        dropout=(0.1, 0.1),
        **more,
    )


def build_stable_cascade(
    size: str = "tiny", dtype: torch.dtype = torch.float32, seed: int = 0
) -> StableCascadeCombinedPipeline:
    """Stable Cascade: two inner pipelines, which share one text encoder under two names."""
    sized(SIZES, size)
    with seeded(seed):
        text_encoder = clip_text_projected(_WIDTH)
        pipe = StableCascadeCombinedPipeline(
            tokenizer=clip_tokenizer(),
            text_encoder=text_encoder,
            decoder=_cascade_unet(in_channels=4, out_channels=4, effnet_in_channels=16),
            scheduler=DDPMWuerstchenScheduler(),
            vqgan=PaellaVQModel(bottleneck_blocks=1, embed_dim=32, num_vq_embeddings=32),
            prior_prior=_cascade_unet(
                in_channels=16,
                out_channels=16,
                clip_text_in_channels=_WIDTH,
                clip_image_in_channels=_WIDTH,
                switch_level=(False,),
            ),
            prior_text_encoder=text_encoder,
            prior_tokenizer=clip_tokenizer(),
            prior_scheduler=DDPMWuerstchenScheduler(),
            prior_image_encoder=clip_vision(_WIDTH),
            prior_feature_extractor=clip_image_processor(),
        )
        return finish(pipe, dtype)


def _prior_kwargs(pipe: Pipeline, steps: int) -> dict[str, Any]:
    call = guided_kwargs(steps)
    del call["negative_prompt"]  # without one the image encoder runs, after the prior
    return call


def _cascade_kwargs(pipe: Pipeline, steps: int) -> dict[str, Any]:
    call = guided_kwargs(steps, height=_PIXELS, width=_PIXELS)
    call["prior_guidance_scale"] = call.pop("guidance_scale")
    call["prior_num_inference_steps"] = steps
    return call


CASES = (
    Case("kandinsky_prior", build_kandinsky_prior, _prior_kwargs, _EMBEDS),
    Case("stable_cascade", build_stable_cascade, _cascade_kwargs, unused=("prior_image_encoder",)),
)
