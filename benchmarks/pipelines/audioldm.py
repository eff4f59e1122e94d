"""AudioLDM and AudioLDM 2: a vocoder after the vae, CLAP as the text encoder."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AudioLDM2Pipeline,
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AudioLDMPipeline,
    AutoencoderKL,
    DDIMScheduler,
    UNet2DConditionModel,
)
from transformers import (
    ClapAudioConfig,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    ClapTextConfig,
    ClapTextModelWithProjection,
    GPT2Config,
    GPT2LMHeadModel,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
)

from .case import Case, Pipeline, finish, guided_kwargs, seeded, sized
from .encoders import t5_text
from .tokenizers import ROBERTA_VOCAB_SIZE, roberta_tokenizer, t5_tokenizer

_TEXT_WIDTH = 32
_MEL_BINS = 8
_AUDIO_SECONDS = 0.016
_MAX_TOKENS = 48
SIZES = {"tiny": (32, 64)}  # channels of the unet


def _clap_text_config() -> ClapTextConfig:
    return ClapTextConfig(
        vocab_size=ROBERTA_VOCAB_SIZE,
        hidden_size=_TEXT_WIDTH,
        intermediate_size=2 * _TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=_TEXT_WIDTH,
    )


def _clap() -> ClapModel:
    audio = ClapAudioConfig(
        num_mel_bins=64,
        spec_size=64,
        window_size=4,
        patch_size=4,
        patch_stride=[4, 4],
        patch_embeds_hidden_size=16,
        hidden_size=32,
        depths=[1, 1],
        num_attention_heads=[2, 2],
        projection_dim=_TEXT_WIDTH,
        enable_fusion=False,
    )
    text = _clap_text_config()
    return ClapModel(
        ClapConfig(
            text_config=text.to_dict(), audio_config=audio.to_dict(), projection_dim=_TEXT_WIDTH
        )
    )


def _unet_config(channels: tuple[int, int]) -> dict[str, Any]:
    return {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": channels,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }


def _audioldm_unet(channels: tuple[int, int]) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **_unet_config(channels),
        cross_attention_dim=channels,  # each level attends to itself: the text enters as a class
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=_TEXT_WIDTH,
        class_embeddings_concat=True,
    )


def _language_model() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=32,
        n_positions=128,
        n_embd=_TEXT_WIDTH,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    config.max_new_tokens = 4
    return GPT2LMHeadModel(config)


def _mel_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32),
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
    )


def _vocoder() -> SpeechT5HifiGan:
    return SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=_MEL_BINS,
            sampling_rate=16_000,
            upsample_initial_channel=16,
            upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3, 7],
            resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
            normalize_before=False,
            initializer_range=0.2,  # smaller, and the sound is silence
        )
    )


def _scheduler() -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False, set_alpha_to_one=False)


def build_audioldm(
    size: str = "tiny", dtype: torch.dtype = torch.float32, seed: int = 0
) -> AudioLDMPipeline:
    """AudioLDM: a vocoder outside the declared sequence, and no call to maybe_free_model_hooks."""
    with seeded(seed):
        pipe = AudioLDMPipeline(
            vae=_mel_vae(),
            text_encoder=ClapTextModelWithProjection(_clap_text_config()),
            tokenizer=roberta_tokenizer(_MAX_TOKENS),
            unet=_audioldm_unet(sized(SIZES, size)),
            scheduler=_scheduler(),
            vocoder=_vocoder(),
        )
        return finish(pipe, dtype)


def build_audioldm2(
    size: str = "tiny", dtype: torch.dtype = torch.float32, seed: int = 0
) -> AudioLDM2Pipeline:
    """AudioLDM 2: no declared sequence; CLAP is entered by `get_text_features`."""
    channels = sized(SIZES, size)
    with seeded(seed):
        pipe = AudioLDM2Pipeline(
            vae=_mel_vae(),
            text_encoder=_clap(),
            text_encoder_2=t5_text(_TEXT_WIDTH),
            projection_model=AudioLDM2ProjectionModel(
                text_encoder_dim=_TEXT_WIDTH,
                text_encoder_1_dim=_TEXT_WIDTH,
                langauge_model_dim=_TEXT_WIDTH,  # upstream's spelling
            ),
            language_model=_language_model(),
            tokenizer=roberta_tokenizer(_MAX_TOKENS),
            tokenizer_2=t5_tokenizer(),
            feature_extractor=ClapFeatureExtractor(feature_size=64),
            unet=AudioLDM2UNet2DConditionModel(
                **_unet_config(channels),
                cross_attention_dim=([None, _TEXT_WIDTH, _TEXT_WIDTH],) * len(channels),
            ),
            scheduler=_scheduler(),
            vocoder=_vocoder(),
        )
        return finish(pipe, dtype)


def _speech_kwargs(pipe: Pipeline, steps: int) -> dict[str, Any]:
    return guided_kwargs(steps, output_type="np", audio_length_in_s=_AUDIO_SECONDS)


CASES = (
    Case("audioldm", build_audioldm, _speech_kwargs, "audios"),
    Case("audioldm2", build_audioldm2, _speech_kwargs, "audios"),
)
