"""No false positives: correct programs run clean, and give the CPU's picture bit for bit."""

from __future__ import annotations

import gc

import pytest
import torch

from offload_engine import sim

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


def tiny_pipeline(dtype=torch.float32):
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=[32, 64],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=8,
    )
    text_encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=4,
            num_hidden_layers=2,
            vocab_size=100,
            max_position_embeddings=16,
        )
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=None,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype)


def picture(pipe, device) -> torch.Tensor:
    with torch.no_grad():
        prompt = pipe.text_encoder(torch.arange(16)[None].to(device))[0]
    return pipe(
        prompt_embeds=prompt,
        negative_prompt_embeds=torch.zeros_like(prompt),
        num_inference_steps=2,
        height=32,
        width=32,
        output_type="pt",
        generator=torch.Generator().manual_seed(1),
    ).images.cpu()


@pytest.fixture(scope="module")
def expected():
    return picture(tiny_pipeline(), "cpu")


@pytest.fixture
def pipe(device):
    yield (pipe := tiny_pipeline())
    del pipe
    gc.collect()
    assert not sim.violations()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resident_pipeline_gives_the_picture_of_the_cpu(device, dtype):
    expected = picture(tiny_pipeline(dtype), "cpu")
    assert torch.equal(picture(tiny_pipeline(dtype).to(device), device), expected)
    assert not sim.violations()


@pytest.mark.interop
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("record_stream", [False, True])
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload_with_streams_runs_clean(
    device, pipe, expected, kind, record_stream, low_cpu_mem_usage
):
    pytest.importorskip("accelerate")  # which diffusers needs for this
    pipe.enable_group_offload(
        onload_device=device,
        offload_type=kind,
        num_blocks_per_group=1 if kind == "block_level" else None,
        use_stream=True,
        record_stream=record_stream,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    for _ in range(2):
        assert torch.equal(picture(pipe, device), expected)
    assert sim.counters().h2d_copies > sim.counters().pageable_copies


@pytest.mark.interop
@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_the_offload_of_accelerate_runs_clean(device, pipe, expected, method):
    pytest.importorskip("accelerate")
    getattr(pipe, method)(device=device)
    for _ in range(2):
        assert torch.equal(picture(pipe, device), expected)
