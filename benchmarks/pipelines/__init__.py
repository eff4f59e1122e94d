"""Real diffusers pipelines with small random weights: no download, the same bits at each build."""

from __future__ import annotations

from . import (
    audio,
    audioldm,
    flux,
    flux2,
    ideogram,
    modular,
    older,
    prior,
    qwen,
    sana,
    sd3,
    sd15,
    sdxl,
    wan,
)
from .audio import build_dance_diffusion, build_stable_audio
from .audioldm import build_audioldm, build_audioldm2
from .case import Case, UnknownSizeError, modules
from .flux import build_flux, build_flux_img2img
from .flux2 import build_flux2
from .ideogram import build_ideogram4
from .modular import build_modular_flux
from .older import build_ldm_text2img, build_repaint
from .prior import build_kandinsky_prior, build_stable_cascade
from .qwen import build_qwen_image
from .sana import build_sana_controlnet
from .sd3 import build_sd3
from .sd15 import build_sd15, build_sd15_controlnet, build_sd15_img2img
from .sdxl import build_sdxl, build_sdxl_controlnet, build_sdxl_img2img
from .wan import build_wan22_i2v, build_wan_t2v

_MAIN = (sdxl, sd15, flux, sd3, wan)
_MORE = (audio, audioldm, sana, ideogram, qwen, flux2, prior, older, modular)
PIPELINES: dict[str, Case] = {case.name: case for family in _MAIN + _MORE for case in family.CASES}

__all__ = [
    "PIPELINES",
    "Case",
    "UnknownSizeError",
    "build_audioldm",
    "build_audioldm2",
    "build_dance_diffusion",
    "build_flux",
    "build_flux2",
    "build_flux_img2img",
    "build_ideogram4",
    "build_kandinsky_prior",
    "build_ldm_text2img",
    "build_modular_flux",
    "build_qwen_image",
    "build_repaint",
    "build_sana_controlnet",
    "build_sd3",
    "build_sd15",
    "build_sd15_controlnet",
    "build_sd15_img2img",
    "build_sdxl",
    "build_sdxl_controlnet",
    "build_sdxl_img2img",
    "build_stable_audio",
    "build_stable_cascade",
    "build_wan22_i2v",
    "build_wan_t2v",
    "modules",
]
