"""The autoencoders that several image families share."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2


def autoencoder_kl(
    channels: tuple[int, ...] = (16, 32),
    *,
    layers: int = 1,
    latent_channels: int = 4,
    norm_groups: int = 8,
    scaling_factor: float = 0.18215,
    shift_factor: float | None = None,
) -> AutoencoderKL:
    """An image autoencoder that halves its picture between any two of its `channels`."""
    return AutoencoderKL(
        block_out_channels=channels,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=layers,
        latent_channels=latent_channels,
        norm_num_groups=norm_groups,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=shift_factor is None,
        use_post_quant_conv=shift_factor is None,
    )


def autoencoder_kl_flux2(latent_channels: int = 4) -> Any:
    """An autoencoder with statistics of its latents in `bn`, which pipelines read from outside."""
    vae: Any = AutoencoderKLFlux2(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
    )
    _draw_statistics(vae.bn)
    return vae


@torch.no_grad()
def _draw_statistics(norm: torch.nn.BatchNorm2d) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.normal_(std=0.1)
    norm.running_var.uniform_(0.5, 1.5)
