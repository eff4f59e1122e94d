"""Audio: Stable Audio (a projection model in the sequence), Dance Diffusion."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderOobleck,
    DanceDiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    IPNDMScheduler,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
    UNet1DModel,
)

from .case import Case, Pipeline, cpu_generator, finish, guided_kwargs, seeded, sized
from .encoders import t5_text
from .tokenizers import t5_tokenizer

_TEXT_WIDTH = 32
_SAMPLES = 512
SIZES = {"tiny": 3}  # layers of the transformer


def _stable_audio_transformer(layers: int) -> StableAudioDiTModel:
    return StableAudioDiTModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        cross_attention_dim=_TEXT_WIDTH,
        cross_attention_input_dim=_TEXT_WIDTH,
        time_proj_dim=8,
        global_states_input_dim=2 * _TEXT_WIDTH,
    )


def _stable_audio_vae() -> AutoencoderOobleck:
    return AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 4],
        channel_multiples=[1, 2],
        decoder_channels=8,
        decoder_input_channels=4,
        audio_channels=2,
        sampling_rate=16,
    )


def build_stable_audio(
    size: str = "tiny", dtype: torch.dtype = torch.float32, seed: int = 0
) -> StableAudioPipeline:
    """Stable Audio; EDM's solver instead of the cosine one, which needs torchsde."""
    with seeded(seed):
        pipe = StableAudioPipeline(
            text_encoder=t5_text(_TEXT_WIDTH),
            tokenizer=t5_tokenizer(),
            projection_model=StableAudioProjectionModel(
                text_encoder_dim=_TEXT_WIDTH,
                conditioning_dim=_TEXT_WIDTH,
                min_value=0,
                max_value=32,
            ),
            transformer=_stable_audio_transformer(sized(SIZES, size)),
            vae=_stable_audio_vae(),
            scheduler=EDMDPMSolverMultistepScheduler(
                sigma_data=1.0, sigma_schedule="exponential", prediction_type="v_prediction"
            ),
        )
        return finish(pipe, dtype)


def build_dance_diffusion(
    size: str = "tiny", dtype: torch.dtype = torch.float32, seed: int = 0
) -> DanceDiffusionPipeline:
    """Dance Diffusion: one component, and no call to maybe_free_model_hooks."""
    sized(SIZES, size)
    with seeded(seed):
        unet = UNet1DModel(
            sample_size=_SAMPLES,
            sample_rate=16_000,
            extra_in_channels=64,  # twice the first width
            in_channels=2,
            out_channels=2,
            block_out_channels=(32, 32, 64),
            use_timestep_embedding=False,
            time_embedding_type="fourier",
            flip_sin_to_cos=True,
            mid_block_type="UNetMidBlock1D",
            down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
            up_block_types=("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
        )
        return finish(DanceDiffusionPipeline(unet=unet, scheduler=IPNDMScheduler()), dtype)


def _text_kwargs(pipe: Pipeline, steps: int) -> dict[str, Any]:
    return guided_kwargs(steps)


def _noise_kwargs(pipe: Pipeline, steps: int) -> dict[str, Any]:
    return {"num_inference_steps": steps, "generator": cpu_generator()}


CASES = (
    Case("stable_audio", build_stable_audio, _text_kwargs, "audios"),
    Case("dance_diffusion", build_dance_diffusion, _noise_kwargs, "audios"),
)
