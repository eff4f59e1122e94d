"""Where real models are cut: nearly all bytes are in blocks, and each weight moves exactly once."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    ControlNetModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from offload_engine.blocks import find_blocks, least_nbytes, named_blocks, parts_of, rest_of
from offload_engine.errors import ComponentError
from offload_engine.segments import scan


def nbytes(tensors):
    return sum(t.nbytes for t in {id(t): t for t in tensors}.values())


def weights(module):
    return [*module.parameters(), *module.buffers()]


# ---- real models, in their proportions as far as a small one can have them


def unet(transformers, down, up, channels):
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=channels,
        layers_per_block=2,
        down_block_types=down,
        up_block_types=up,
        transformer_layers_per_block=transformers,
        attention_head_dim=8,
        cross_attention_dim=64,
        norm_num_groups=8,
    )


def sdxl():
    down = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    up = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    return unet((1, 2, 10), down, up, (16, 32, 64))


def sd15():
    down = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    up = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    return unet(1, down, up, (16, 32, 64, 64))


def controlnet():
    return ControlNetModel(
        block_out_channels=(16, 32, 64, 64),
        attention_head_dim=8,
        cross_attention_dim=64,
        norm_num_groups=8,
        conditioning_embedding_out_channels=(8, 16),
    )


def flux():
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=19,
        num_single_layers=38,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )


def wan():
    return WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=48,
        freq_dim=32,
        ffn_dim=130,
        num_layers=40,
        rope_max_seq_len=32,
    )


def qwen_image():
    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=60,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=56,
        axes_dims_rope=(8, 4, 4),
    )


def sd3():
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=24,
        attention_head_dim=8,
        num_attention_heads=6,
        caption_projection_dim=48,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
    )


_T5 = {"d_model": 64, "d_ff": 160, "d_kv": 8, "num_heads": 8, "num_layers": 24}


def t5():
    return T5EncoderModel(T5Config(vocab_size=500, feed_forward_proj="gated-gelu", **_T5))


def umt5():
    return UMT5EncoderModel(UMT5Config(vocab_size=500, feed_forward_proj="gated-gelu", **_T5))


def clip():
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=500,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=12,
            num_attention_heads=4,
            bos_token_id=498,
            eos_token_id=499,
        )
    )


def qwen_vl():
    text = {
        "vocab_size": 500,
        "bos_token_id": None,
        "eos_token_id": None,
        "hidden_size": 64,
        "intermediate_size": 320,
        "num_hidden_layers": 28,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [2, 3, 3],
        },
    }
    vision = {
        "depth": 8,
        "hidden_size": 32,
        "intermediate_size": 86,
        "num_heads": 4,
        "out_hidden_size": 64,
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    )


def vae():
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=8,
    )


def wan_vae():
    return AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], temperal_downsample=[False, True, True]
    )


# The least part of the bytes that is in blocks, and the largest part that one block may be.
MODELS = {
    "sdxl unet": (sdxl, 0.85, 0.05),
    "sd15 unet": (sd15, 0.85, 0.15),
    "controlnet": (controlnet, 0.8, 0.2),
    "flux": (flux, 0.97, 0.03),
    "wan": (wan, 0.95, 0.03),
    "qwen image": (qwen_image, 0.97, 0.02),
    "sd3": (sd3, 0.95, 0.05),
    "t5": (t5, 0.95, 0.045),
    "umt5": (umt5, 0.95, 0.045),
    "clip": (clip, 0.9, 0.085),
    "qwen vl": (qwen_vl, 0.9, 0.04),
    "vae": (vae, 0.8, 0.15),
    "wan vae": (wan_vae, 0.8, 0.2),
}


@pytest.fixture(scope="module")
def built():
    with torch.random.fork_rng(devices=[]):
        return {name: make() for name, (make, *_) in MODELS.items()}


@pytest.mark.parametrize("name", MODELS)
def test_the_rest_and_the_blocks_are_all_weights_exactly_once(built, name):
    model = built[name]
    blocks = find_blocks(model)
    parts = [rest_of(model, blocks), *(scan(modules) for _, modules in blocks)]
    found = [id(tensor) for part in parts for tensor in part.all_tensors]
    assert len(found) == len(set(found))
    assert set(found) == {id(tensor) for tensor in scan([model]).all_tensors}
    inside = [module for part in parts for module in part.modules]
    assert len(inside) == len(set(inside)) == len(set(model.modules()))


@pytest.mark.parametrize("name", MODELS)
def test_nearly_all_bytes_are_in_blocks_and_no_block_is_large(built, name):
    model, (_, least_part, most_part) = built[name], MODELS[name]
    blocks, total = find_blocks(model), nbytes(weights(model))
    sizes = [nbytes(t for m in modules for t in weights(m)) for _, modules in blocks]
    assert sum(sizes) >= least_part * total
    assert max(sizes) <= most_part * total
    rest = nbytes(rest_of(model, blocks).all_tensors)
    assert rest == total - sum(sizes)
    assert least_nbytes(model, blocks) == rest + max(sizes)


@pytest.mark.parametrize("name", MODELS)
def test_the_parts_of_a_block_have_each_of_its_weights_at_most_once(built, name):
    model = built[name]
    total = nbytes(weights(model))
    for block in find_blocks(model):
        parts = parts_of(block, total)
        assert len(parts) < 4
        layers = [layer for part in parts for layer in part]
        of_block = {module for each in block[1] for module in each.modules()}
        assert len(set(layers)) == len(layers) and of_block.issuperset(layers)
        sizes = [nbytes(t for layer in part for t in weights(layer)) for part in parts]
        largest = max((nbytes(weights(m)) for m in of_block if not any(m.children())), default=0)
        first = nbytes(t for module in block[1] for t in weights(module)) - sum(sizes)
        assert all(size > total / 2048 for size in sizes)
        if len(parts) == 3:
            assert max(first, *sizes) - min(first, *sizes) <= largest


@pytest.mark.parametrize("name", MODELS)
def test_a_block_is_found_under_its_path(built, name):
    modules = dict(built[name].named_modules())
    paths = [path for path, _ in find_blocks(built[name])]
    assert len(paths) == len(set(paths))
    for path, parts in find_blocks(built[name]):
        assert modules[path] in parts


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        (
            "flux",
            [f"transformer_blocks.{i}" for i in range(19)]
            + [f"single_transformer_blocks.{i}" for i in range(38)],
        ),
        ("wan", [f"blocks.{i}" for i in range(40)]),
        ("qwen image", [f"transformer_blocks.{i}" for i in range(60)]),
        ("sd3", [f"transformer_blocks.{i}" for i in range(24)]),
        ("t5", [f"encoder.block.{i}" for i in range(24)]),
        ("umt5", [f"encoder.block.{i}" for i in range(24)]),
    ],
)
def test_a_row_of_equal_blocks_is_cut_between_any_two(built, name, paths):
    assert [path for path, _ in find_blocks(built[name])] == paths


def test_a_unet_is_cut_below_its_down_mid_and_up_blocks(built):
    paths = [path for path, _ in find_blocks(built["sdxl unet"])]
    for stage in ("down_blocks.2.", "mid_block.", "up_blocks.0."):
        assert sum(path.startswith(stage) for path in paths) >= 10
    assert any("attentions.0.transformer_blocks" in path for path in paths)
    assert any("resnets" in path for path in paths)


def test_a_component_without_blocks_has_none():
    assert find_blocks(nn.Linear(8, 8)) == []
    assert find_blocks(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))) == []
    assert find_blocks(nn.ModuleList()) == []


# ---- made up for the purpose


class Block(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.linear = nn.Linear(8, width)


class Other(Block):
    pass


class Model(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.head = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(blocks)


def cut(model):
    """Path -> the numbers of the modules that move as one."""
    number = {block: i for i, block in enumerate(model.blocks)}
    return {path: [number[m] for m in modules] for path, modules in find_blocks(model)}


def test_blocks_that_share_weights_move_as_one():
    model = Model(*(Block() for _ in range(5)))
    model.blocks[3].linear.weight = model.blocks[1].linear.weight
    assert cut(model) == {
        "blocks.0": [0],
        "blocks.1": [1, 3],
        "blocks.2": [2],
        "blocks.4": [4],
    }


def test_blocks_that_share_weights_through_a_third_move_as_one():
    model = Model(*(Block() for _ in range(5)))
    model.blocks[3].linear.weight = model.blocks[1].linear.weight
    model.blocks[4].linear.bias = model.blocks[3].linear.bias
    assert cut(model) == {"blocks.0": [0], "blocks.1": [1, 3, 4], "blocks.2": [2]}


def test_slices_of_one_matrix_are_shared_weights():
    model, whole = Model(*(Block() for _ in range(3))), torch.randn(128, 8)
    for at, block in enumerate(model.blocks[:2]):
        block.linear.weight = nn.Parameter(whole[at : at + 64])  # they overlap
    assert cut(model) == {"blocks.0": [0, 1], "blocks.2": [2]}


def test_a_block_that_shares_weights_with_the_rest_stays_in_the_rest():
    model = Model(*(Block() for _ in range(4)))
    model.head.weight = nn.Parameter(model.blocks[2].linear.weight[:8])
    model.head.weight.data = model.blocks[2].linear.weight.data[:8]
    assert cut(model) == {"blocks.0": [0], "blocks.1": [1], "blocks.3": [3]}
    assert model.blocks[2] in rest_of(model, find_blocks(model)).modules


def test_a_block_that_is_in_the_row_twice_is_one_block():
    model = Model(*(Block() for _ in range(4)))
    model.blocks[3] = model.blocks[1]
    found = [modules for _, modules in find_blocks(model)]
    assert found == [(model.blocks[0],), (model.blocks[1],), (model.blocks[2],)]


def test_a_block_that_is_also_an_attribute_elsewhere_moves_once():
    model = Model(*(Block() for _ in range(3)))
    model.again = model.blocks[1]
    blocks = find_blocks(model)
    parts = [rest_of(model, blocks), *(scan(modules) for _, modules in blocks)]
    found = [id(tensor) for part in parts for tensor in part.all_tensors]
    assert len(found) == len(set(found)) == len(list(model.parameters()))


def test_neighbours_that_are_too_small_move_as_one():
    model = Model(*(Block(4) for _ in range(10)), *(Block(2000) for _ in range(3)))
    found = cut(model)
    assert found == {"blocks.0": [*range(11)], "blocks.11": [11], "blocks.12": [12]}


def test_two_hundred_small_blocks_become_about_a_hundred_units():
    found = find_blocks(Model(*(Block() for _ in range(400))))
    assert 64 <= len(found) <= 128
    assert sum(len(modules) for _, modules in found) == 400


def test_a_row_needs_two_blocks_of_one_class_that_have_parts():
    model = Model(Block(), Other())
    assert find_blocks(model) == []
    model.blocks.append(Other())
    assert [path for path, _ in find_blocks(model)] == ["blocks.0", "blocks.1", "blocks.2"]


def test_blocks_without_weights_are_left_out():
    model = Model(Block(), nn.Sequential(nn.ReLU()), Block(), nn.Identity())
    assert [path for path, _ in find_blocks(model)] == ["blocks.0", "blocks.2"]


def test_lists_of_lists_of_blocks_are_cut_into_the_blocks():
    model = Model()
    model.blocks = nn.ModuleList(nn.ModuleList(Block() for _ in range(3)) for _ in range(2))
    assert [path for path, _ in find_blocks(model)] == [
        f"blocks.{i}.{j}" for i in range(2) for j in range(3)
    ]


def test_a_component_that_is_a_row_itself_is_cut():
    assert len(find_blocks(nn.Sequential(Block(), Block(), Block()))) == 3


def test_a_block_with_few_bytes_in_rows_of_its_own_is_not_cut_further():
    class Mixed(nn.Module):
        def __init__(self, own):
            super().__init__()
            self.own = nn.Linear(8, own)
            self.rows = nn.ModuleList(Block() for _ in range(2))

    model = Model(Mixed(200), Mixed(200))
    assert [path for path, _ in find_blocks(model)] == ["blocks.0", "blocks.1"]
    model = Model(Mixed(8), Mixed(8))
    assert [path for path, _ in find_blocks(model)] == [
        f"blocks.{i}.rows.{j}" for i in range(2) for j in range(2)
    ]


# ---- blocks that the user names


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(4))
        self.up, self.down, self.gate, self.out = (nn.Linear(64, 64) for _ in range(4))


def test_the_parts_of_a_block_are_about_equal_and_its_own_weights_stay_with_the_first():
    model = nn.ModuleList(Layers() for _ in range(8))
    total = nbytes(weights(model))
    path, (block,) = find_blocks(model)[0]
    parts = parts_of((path, (block,)), total)
    assert [len(part) for part in parts] == [1, 1, 1]
    assert scan([block], without=[m for part in parts for m in part]).all_tensors[0] is block.scale


def test_layers_that_share_weights_stay_together():
    block = Layers()
    block.up.weight = block.down.weight
    parts = parts_of(("0", (block,)), nbytes(weights(block)))
    assert block.up not in [m for part in parts for m in part]
    assert block.down not in [m for part in parts for m in part]
    assert sum(map(len, parts)) == 2


def test_a_small_block_moves_as_one():
    block = Layers()
    assert parts_of(("0", (block,)), 200 * nbytes(weights(block))) == []
    assert len(parts_of(("0", (block,)), 100 * nbytes(weights(block)))) == 1


def test_the_path_of_a_list_names_each_of_its_items():
    model = Model(*(Block() for _ in range(3)))
    assert named_blocks(model, "unet", ["blocks"]) == [
        (f"blocks.{i}", (block,)) for i, block in enumerate(model.blocks)
    ]


def test_any_other_path_names_one_block():
    model = Model(*(Block() for _ in range(3)))
    assert named_blocks(model, "unet", ["blocks.2", "head"]) == [
        ("blocks.2", (model.blocks[2],)),
        ("head", (model.head,)),
    ]


def test_what_is_named_twice_or_within_another_block_is_one_block():
    model = Model(*(Block() for _ in range(2)))
    paths = ["blocks.1.linear", "blocks", "blocks.1", "blocks"]
    assert named_blocks(model, "unet", paths) == [
        ("blocks.0", (model.blocks[0],)),
        ("blocks.1", (model.blocks[1],)),
    ]


def test_named_blocks_that_share_weights_move_as_one_or_stay():
    model = Model(*(Block() for _ in range(4)))
    model.blocks[3].linear.weight = model.blocks[0].linear.weight
    model.head.bias = nn.Parameter(model.blocks[1].linear.bias[:8])
    model.head.bias.data = model.blocks[1].linear.bias.data[:8]
    assert named_blocks(model, "unet", ["blocks"]) == [
        ("blocks.0", (model.blocks[0], model.blocks[3])),
        ("blocks.2", (model.blocks[2],)),
    ]


@pytest.mark.parametrize(
    ("path", "near"),
    [("block", "unet.blocks"), ("blocks.7", "unet.blocks."), ("hed", "unet.head"), ("", "none")],
)
def test_a_path_that_does_not_exist_is_named_with_near_matches(path, near):
    model = Model(*(Block() for _ in range(3)))
    with pytest.raises(ComponentError, match=near) as error:
        named_blocks(model, "unet", ["blocks", path])
    assert error.value.names == (f"unet.{path}",)
    assert f"unet.{path}" in str(error.value)


def test_least_bytes_of_a_component_without_blocks_are_all_of_it():
    model = Model(Block())
    assert least_nbytes(model, ()) == nbytes(weights(model))
