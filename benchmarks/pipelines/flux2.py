"""Flux 2: its text encoder can first rewrite the prompt, and is then entered by `generate`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from .autoencoders import autoencoder_kl_flux2
from .case import PROMPT, Case, Pipeline, cpu_generator, finish, seeded, sized
from .tokenizers import QWEN_VOCAB_SIZE, chat_processor

_TEXT_WIDTH = 32
_TEXT_LAYERS = 3
_LATENT_CHANNELS = 4
_PIXELS = 32
_GREEDY = 1e-4  # a temperature at which the likeliest token is certain
SIZES = {"tiny": (2, 2)}  # layers, single layers of the transformer


def _text_encoder() -> Mistral3ForConditionalGeneration:
    """A language model that writes four tokens or a few more: most of the others end the text."""
    text = {
        "model_type": "mistral",
        "vocab_size": QWEN_VOCAB_SIZE,
        "hidden_size": _TEXT_WIDTH,
        "intermediate_size": 2 * _TEXT_WIDTH,
        "num_hidden_layers": _TEXT_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": _TEXT_WIDTH,
        "intermediate_size": 2 * _TEXT_WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    config = Mistral3Config(
        text_config=text,
        vision_config=vision,
        image_token_index=QWEN_VOCAB_SIZE - 1,
        tie_word_embeddings=False,  # tied, and small, it would repeat its last token for ever
    )
    encoder = Mistral3ForConditionalGeneration(config)
    assert encoder.generation_config is not None
    encoder.generation_config.pad_token_id = 0
    encoder.generation_config.min_new_tokens = 4
    encoder.generation_config.eos_token_id = [t for t in range(QWEN_VOCAB_SIZE) if t % 8]
    return encoder


def _transformer(layers: int, single_layers: int) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4 * _LATENT_CHANNELS,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=_TEXT_LAYERS * _TEXT_WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    )


def build_flux2(
    size: str = "tiny", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Flux2Pipeline:
    """Flux 2 text to image."""
    with seeded(seed):
        pipe = Flux2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=autoencoder_kl_flux2(_LATENT_CHANNELS),
            text_encoder=_text_encoder(),
            tokenizer=chat_processor(),
            transformer=_transformer(*sized(SIZES, size)),
        )
        return finish(pipe, dtype)


def _text_kwargs(pipe: Pipeline, steps: int) -> dict[str, Any]:
    return {
        "prompt": PROMPT,
        "height": _PIXELS,
        "width": _PIXELS,
        "num_inference_steps": steps,
        "guidance_scale": 4.0,
        "max_sequence_length": 512,  # the system message is long
        "text_encoder_out_layers": (1, 2, 3),
        "generator": cpu_generator(),
        "output_type": "pt",
    }


def _rewritten_kwargs(pipe: Pipeline, steps: int) -> dict[str, Any]:
    return {**_text_kwargs(pipe, steps), "caption_upsample_temperature": _GREEDY}


CASES = (
    Case("flux2", build_flux2, _text_kwargs),
    Case("flux2_generate", build_flux2, _rewritten_kwargs),
)
