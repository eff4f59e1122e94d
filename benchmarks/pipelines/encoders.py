"""Text and image encoders that several families share: CLIP, T5, UMT5."""

from __future__ import annotations

from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from .tokenizers import CLIP_VOCAB_SIZE, T5_VOCAB_SIZE


def _clip_text_config(width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(4, width // 64),
        projection_dim=width,
        hidden_act="gelu",
        vocab_size=CLIP_VOCAB_SIZE,
        max_position_embeddings=77,
        bos_token_id=CLIP_VOCAB_SIZE - 2,
        eos_token_id=CLIP_VOCAB_SIZE - 1,
        pad_token_id=0,
    )


def clip_text(width: int = 32, layers: int = 3) -> CLIPTextModel:
    """A text encoder as in Stable Diffusion 1.5."""
    return CLIPTextModel(_clip_text_config(width, layers))


def clip_text_projected(width: int = 32, layers: int = 3) -> CLIPTextModelWithProjection:
    """A text encoder with a projected pooled output, as in SDXL."""
    return CLIPTextModelWithProjection(_clip_text_config(width, layers))


def clip_vision(width: int = 32, layers: int = 2, side: int = 32) -> CLIPVisionModelWithProjection:
    """An image encoder, as IP-Adapter loads."""
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            projection_dim=width,
            image_size=side,
            patch_size=8,
        )
    )


def clip_image_processor(side: int = 32) -> CLIPImageProcessor:
    """What prepares an image for `clip_vision`."""
    return CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )


def t5_text(width: int = 32, layers: int = 2) -> T5EncoderModel:
    """A T5 encoder that fits `t5_tokenizer`; its embedding is tied."""
    return T5EncoderModel(
        T5Config(
            vocab_size=T5_VOCAB_SIZE,
            d_model=width,
            d_ff=2 * width,
            d_kv=8,
            num_heads=4,
            num_layers=layers,
            feed_forward_proj="gated-gelu",
        )
    )


def umt5_text(width: int = 32, layers: int = 2) -> UMT5EncoderModel:
    """A UMT5 encoder that fits `t5_tokenizer`: a position bias in each layer."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=T5_VOCAB_SIZE,
            d_model=width,
            d_ff=2 * width,
            d_kv=8,
            num_heads=4,
            num_layers=layers,
            feed_forward_proj="gated-gelu",
        )
    )
