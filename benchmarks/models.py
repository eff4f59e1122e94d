"""SDXL and FLUX.1-dev at their published sizes, with random weights drawn on the device.

Nothing is downloaded and no tokenizer is needed. Weights appear one tensor at a time, so that a
model may be larger than the device; "tiny" takes the same path with small numbers.

[Note: random weights] Matrices are normal with a deviation of 0.02, biases too, and the gains of
norms are near one: activations stay finite at every depth, and every weight matters to the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from .ways import modules

PROMPT = "a red bird on a snowy branch, morning light, photograph"
SEED = 7
Place = Callable[[Tensor], Tensor]  # where a weight that was drawn on the device is to live


@dataclass(frozen=True)
class Model:
    """A pipeline at one size, without weights, and one request to it."""

    name: str
    build: Callable[[], Any]  # the pipeline; its parameters are on the meta device
    kwargs: dict[str, Any]  # of one request, but for the number of steps

    def request(self, pipe: Any, steps: int) -> Tensor:
        """The image of one request, on the host: (1, 3, height, width), float32, 0 to 1."""
        noise = torch.Generator("cpu").manual_seed(SEED)
        arguments = {**self.kwargs, "num_inference_steps": steps, "generator": noise}
        return pipe(**arguments, output_type="pt").images.float().cpu()


class Words:
    """Stands in for a tokenizer: numbers the words of a text; makes tensors of equal length."""

    def __init__(self, vocab_size: int, max_tokens: int) -> None:
        self.added_tokens_encoder: dict[str, int] = {}
        self.model_max_length = max_tokens
        self._vocab_size = vocab_size

    def tokenize(self, text: str) -> list[str]:
        return text.split()

    def __call__(
        self, text: str | list[str], padding: Any = None, max_length: int | None = None, **_: Any
    ) -> Any:
        texts = [text] if isinstance(text, str) else list(text)
        rows = [[*self._ids(each), self._vocab_size - 1] for each in texts]
        length = max_length or self.model_max_length
        if padding != "max_length":
            length = max(map(len, rows))
        padded = [(row + [0] * length)[:length] for row in rows]
        ids = torch.tensor(padded)
        return SimpleNamespace(input_ids=ids, attention_mask=(ids != 0).long())

    def _ids(self, text: str) -> Iterator[int]:
        for word in self.tokenize(text):
            yield 3 + sum(word.encode()) * 31 % (self._vocab_size - 5)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within, modules get parameters without storage; buffers are made as ever."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _clip(width: int, layers: int, vocab_size: int, *, projected: bool = False) -> nn.Module:
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(2, width // 64),
        projection_dim=width,
        hidden_act="gelu" if projected else "quick_gelu",
        vocab_size=vocab_size,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=0,
    )
    model: nn.Module = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
    return model


def _t5(width: int, inner: int, heads: int, layers: int, vocab_size: int) -> nn.Module:
    config = T5Config(
        vocab_size=vocab_size,
        d_model=width,
        d_ff=inner,
        d_kv=width // heads,
        num_heads=heads,
        num_layers=layers,
        feed_forward_proj="gated-gelu",
    )
    model: nn.Module = T5EncoderModel(config)
    return model


def _vae(channels: tuple[int, ...], latents: int, groups: int, **more: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=channels,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=2,
        latent_channels=latents,
        norm_num_groups=groups,
        **more,
    )


def sdxl_unet(
    channels: tuple[int, ...] = (320, 640, 1280),
    head_dims: tuple[int, ...] = (5, 10, 20),
    text_width: int = 2048,
    pooled_width: int = 1280,
    groups: int = 32,
    time_width: int = 256,
    transformers: tuple[int, ...] = (1, 2, 10),
) -> UNet2DConditionModel:
    """The denoiser of SDXL without weights."""
    with _parameters_on_meta():
        return UNet2DConditionModel(
            sample_size=128,
            in_channels=4,
            out_channels=4,
            layers_per_block=2,
            block_out_channels=channels,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=head_dims,
            transformer_layers_per_block=transformers,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=time_width,
            projection_class_embeddings_input_dim=6 * time_width + pooled_width,
            cross_attention_dim=text_width,
            norm_num_groups=groups,
        )


NARROW_UNET: dict[str, Any] = {  # as many tensors as the published one
    "channels": (16, 32, 64),
    "head_dims": (2, 2, 4),
    "text_width": 64,
    "pooled_width": 32,
    "groups": 8,
    "time_width": 8,
}


def _sdxl(tiny: bool) -> Any:
    vocab_size = 600 if tiny else 49408
    channels = (16, 32) if tiny else (128, 256, 512, 512)
    unet = sdxl_unet(**({**NARROW_UNET, "transformers": (1, 1, 1)} if tiny else {}))
    with _parameters_on_meta():
        return StableDiffusionXLPipeline(
            text_encoder=_clip(*((32, 2) if tiny else (768, 12)), vocab_size),
            text_encoder_2=_clip(*((32, 2) if tiny else (1280, 32)), vocab_size, projected=True),
            tokenizer=Words(vocab_size, 77),
            tokenizer_2=Words(vocab_size, 77),
            unet=unet,
            vae=_vae(channels, 4, 8 if tiny else 32, scaling_factor=0.13025),
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                timestep_spacing="leading",
                steps_offset=1,
            ),
            add_watermarker=False,
        )


_FLUX_TINY: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 4, 8),
}
_FLUX_DEV: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": (16, 56, 56),
}


def _flux(tiny: bool) -> Any:
    clip_words, t5_words = (600, 600) if tiny else (49408, 32128)
    channels = (16, 32) if tiny else (128, 256, 512, 512)
    with _parameters_on_meta():
        return FluxPipeline(
            text_encoder=_clip(*((32, 2) if tiny else (768, 12)), clip_words),
            text_encoder_2=_t5(*((32, 64, 4, 2) if tiny else (4096, 10240, 64, 24)), t5_words),
            tokenizer=Words(clip_words, 77),
            tokenizer_2=Words(t5_words, 512),
            transformer=FluxTransformer2DModel(
                patch_size=1, guidance_embeds=True, **(_FLUX_TINY if tiny else _FLUX_DEV)
            ),
            vae=_vae(
                channels,
                4 if tiny else 16,
                8 if tiny else 32,
                scaling_factor=0.3611,
                shift_factor=0.1159,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        )


def model(name: str, tiny: bool = False) -> Model:
    """ "sdxl" or "flux", at its published size or a tiny one."""
    side = 32 if tiny else 1024
    shape = {"prompt": PROMPT, "height": side, "width": side}
    if name == "sdxl":
        kwargs = {**shape, "negative_prompt": "blurry", "guidance_scale": 5.0}
        return Model(name, lambda: _sdxl(tiny), kwargs)
    assert name == "flux", name
    kwargs = {**shape, "guidance_scale": 3.5, "max_sequence_length": 48 if tiny else 512}
    return Model(name, lambda: _flux(tiny), kwargs)


def component_nbytes(pipe: Any, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of the weights of each component of ``pipe`` in ``dtype``, there already or not."""
    return {
        name: dtype.itemsize * sum(p.numel() for p in part.parameters())
        for name, part in modules(pipe).items()
    }


@torch.no_grad()
def materialise(pipe: Any, device: torch.device, dtype: torch.dtype, place: Place) -> None:
    """Draws every parameter of ``pipe`` on ``device`` and leaves it where ``place`` puts it.

    The same bits at each run on one kind of device. Ties are kept; see [Note: random weights].
    """
    torch.manual_seed(SEED)
    made: dict[int, nn.Parameter] = {}
    for part in modules(pipe).values():
        part.eval()
        for module in part.modules():
            for name, bare in module._parameters.items():
                if bare is not None and bare.is_meta:
                    if id(bare) not in made:
                        drawn = place(_draw(name, bare.shape, device, dtype))
                        made[id(bare)] = nn.Parameter(drawn, requires_grad=False)
                    module._parameters[name] = made[id(bare)]


def _draw(name: str, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    drawn = torch.empty(shape, device=device, dtype=dtype).normal_(std=0.02)
    return drawn.add_(1.0) if len(shape) == 1 and name == "weight" else drawn


class ToHost:
    """Places weights in ordinary host memory, by way of a pinned buffer: the fast way down."""

    def __init__(self, nbytes: int = 2**28) -> None:
        self._staging = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def __call__(self, drawn: Tensor) -> Tensor:
        host = torch.empty(drawn.shape, dtype=drawn.dtype)
        source, target = drawn.view(-1).view(torch.uint8), host.view(-1).view(torch.uint8)
        step = self._staging.numel()
        for start in range(0, source.numel(), step):
            piece = source[start : start + step]
            staged = self._staging[: piece.numel()]
            staged.copy_(piece)
            target[start : start + step].copy_(staged)
        return host
