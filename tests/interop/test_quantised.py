"""Weights that are not plain tensors: moved correctly with all their parts, or refused by name."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

import offload_engine
from offload_engine.errors import ComponentError

from .conftest import Meter, build, on_device, run

WIDTH, HIDDEN = 64, 128


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)).eval()


def torchao_int8():
    quantization = pytest.importorskip("torchao.quantization")
    model = plain()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def torchao_int8_dynamic():
    quantization = pytest.importorskip("torchao.quantization")
    model = plain()
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    return model


def torchao_float8():
    quantization = pytest.importorskip("torchao.quantization")
    model = plain().to(torch.bfloat16)
    quantization.quantize_(model, quantization.Float8WeightOnlyConfig())
    return model


def gguf_q8(model=None):
    """``model`` with the weights of every layer that divides into blocks of 32 as GGUF has them."""
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFParameter, _replace_with_gguf_linear

    model = plain() if model is None else model
    kind, packed = gguf.GGMLQuantizationType.Q8_0, {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer.in_features % 32 == 0:
            blocks = gguf.quants.quantize(layer.weight.detach().numpy(), kind)
            weight = GGUFParameter(torch.from_numpy(blocks.copy()), quant_type=kind)
            packed[name] = weight, layer.bias
    weights = {f"{name}.weight": weight for name, (weight, _) in packed.items()}
    _replace_with_gguf_linear(model, torch.float32, weights)
    for name, (weight, bias) in packed.items():
        layer = model.get_submodule(name)
        layer.weight, layer.bias = weight, bias
    return model


def bitsandbytes_layers(make_layer, make_weight):
    bnb = pytest.importorskip("bitsandbytes")
    model = plain()
    for index in (0, 2):
        old = model[index]
        new = make_layer(bnb, old.in_features, old.out_features)
        new.weight = make_weight(bnb, old.weight.detach().clone(), new)
        new.bias = nn.Parameter(old.bias.detach().clone())
        model[index] = new
    return model


def bitsandbytes_4bit(nested=False):
    options = {"quant_type": "nf4", "compress_statistics": nested}
    model = bitsandbytes_layers(
        lambda bnb, n_in, n_out: bnb.nn.Linear4bit(
            n_in, n_out, compute_dtype=torch.float32, **options
        ),
        lambda bnb, weight, layer: bnb.nn.Params4bit(
            weight, requires_grad=False, module=layer, **options
        ),
    )
    return model.to("cpu")  # quantises


def bitsandbytes_4bit_nested():
    return bitsandbytes_4bit(nested=True)


def bitsandbytes_8bit(device):
    model = bitsandbytes_layers(
        lambda bnb, n_in, n_out: bnb.nn.Linear8bitLt(n_in, n_out, has_fp16_weights=False),
        lambda bnb, weight, layer: bnb.nn.Int8Params(
            weight, requires_grad=False, has_fp16_weights=False
        ),
    )
    return model.to(device)  # quantises


class Opaque(torch.Tensor):
    """Wraps integers and a scale, and tells nobody how to take them apart."""

    @staticmethod
    def __new__(cls, integers, scale):
        shape, device = integers.shape, integers.device
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=scale.dtype, device=device)

    def __init__(self, integers, scale):
        self.integers, self.scale = integers, scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].integers, args[0].scale)
        return function(*tree_map(cls.unpack, args), **tree_map(cls.unpack, kwargs or {}))

    @staticmethod
    def unpack(value):
        return value.integers * value.scale if isinstance(value, Opaque) else value


class Wrapped(Opaque):
    """The same, as torch asks wrapper classes to be."""

    def __tensor_flatten__(self):
        return ["integers", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["integers"], inner["scale"])


def wrapped_by_hand(kind=Wrapped):
    model = plain()
    for index in (0, 2):
        weight = model[index].weight.detach()
        scale = weight.abs().max() / 127
        wrapper = kind((weight / scale).round().to(torch.int8), scale)
        model[index].weight = nn.Parameter(wrapper, requires_grad=False)
    return model


MOVABLE = [
    torchao_int8,
    torchao_int8_dynamic,
    torchao_float8,
    gguf_q8,
    bitsandbytes_4bit,
    bitsandbytes_4bit_nested,
    wrapped_by_hand,
]


@pytest.mark.parametrize("make", MOVABLE, ids=lambda make: make.__name__)
def test_quantised_weights_move_with_all_their_parts_and_compute_the_same(make):
    model, twin, other = make(), make(), nn.Linear(WIDTH, WIDTH)
    x = torch.randn(4, WIDTH, dtype=model[0].bias.dtype)
    want = twin(x)  # the simulator runs the kernels of the CPU
    kinds = {name: type(p) for name, p in model.named_parameters()}
    engine = offload_engine.attach({"model": model, "other": other}, "model->other")
    packed_nbytes = engine.report().components["model"].nbytes
    plain_nbytes = sum(p.nbytes for p in plain().parameters())
    assert packed_nbytes < 0.6 * plain_nbytes  # as quantised, not unpacked
    model(x), other(torch.ones(1, WIDTH))  # some kernels upload tables the first time
    for _ in range(3):
        with Meter() as meter:
            out = model(x)
        assert out.device.type == "sim" and torch.equal(out.cpu(), want)
        there = x.to("sim")
        with Meter() as own:
            model(there)
        h2d_nbytes = meter.moved.h2d_nbytes - own.moved.h2d_nbytes
        assert h2d_nbytes == packed_nbytes + x.nbytes
        assert meter.moved.pageable_copies == own.moved.pageable_copies + 1  # x
        assert meter.peak_nbytes < 1.5 * own.peak_nbytes + packed_nbytes + x.nbytes
        assert engine.resident == ("model",)
        other(torch.ones(1, WIDTH))
        assert engine.resident == ("other",)
    engine.detach()
    assert {name: type(p) for name, p in model.named_parameters()} == kinds
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("make", [torchao_int8, wrapped_by_hand], ids=lambda make: make.__name__)
def test_a_change_inside_a_wrapper_is_not_lost(make):
    model, twin, other = make(), make(), nn.Linear(WIDTH, WIDTH)
    x = torch.randn(4, WIDTH)
    engine = offload_engine.attach({"model": model, "other": other}, "model->other")
    for _ in range(3):
        assert torch.equal(model(x).cpu(), twin(x))
        with torch.no_grad():
            model[0].weight.scale.mul_(1.5), twin[0].weight.scale.mul_(1.5)
        assert torch.equal(model(x.to("sim")).cpu(), twin(x))
        other(torch.ones(1, WIDTH))
        assert torch.equal(model(x).cpu(), twin(x))
        engine.release()


def test_a_wrapper_that_cannot_be_taken_apart_is_refused_by_name():
    model, other = wrapped_by_hand(Opaque), nn.Linear(WIDTH, WIDTH)
    with pytest.raises(ComponentError, match="Opaque") as error:
        offload_engine.attach({"model": model, "other": other}, "model->other")
    assert error.value.names == ("model",)
    assert not model._forward_pre_hooks and not other._forward_pre_hooks
    assert torch.isfinite(model(torch.ones(1, WIDTH))).all()


def test_an_8_bit_component_on_the_device_stays_there_also_after_detach():
    """On purpose: its state lies outside its tensors; bitsandbytes itself loses it in moving."""
    model, other = bitsandbytes_8bit("sim"), nn.Linear(WIDTH, WIDTH)
    x = torch.randn(4, WIDTH, dtype=torch.float16).to("sim")
    want = model(x)
    engine = offload_engine.attach({"model": model, "other": other}, "model->other")
    for _ in range(2):
        assert torch.equal(model(x), want)
        other(torch.ones(1, WIDTH, device="sim"))
        assert set(engine.resident) == {"model", "other"}
    engine.detach()
    assert torch.equal(model(x), want)


def test_an_8_bit_component_on_the_host_is_refused_with_what_to_do():
    model, other = bitsandbytes_8bit("cpu"), nn.Linear(WIDTH, WIDTH)
    parts = {"model": model, "other": other}
    with pytest.raises(ComponentError, match="8-bit") as error:
        offload_engine.attach(parts, "model->other")
    assert error.value.names == ("model",)
    x = torch.randn(4, WIDTH, dtype=torch.float16)
    want = model(x)
    with offload_engine.attach(parts, "model->other", device="cpu"):
        assert torch.equal(model(x), want)


# ---- in a whole pipeline


def quantise_with_torchao(transformer):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(transformer, quantization.Int8WeightOnlyConfig())


@pytest.mark.parametrize("quantise", [quantise_with_torchao, gguf_q8], ids=lambda q: q.__name__)
def test_a_pipeline_with_a_quantised_transformer_gives_the_same_bits(quantise):
    pipe, twin = build("flux"), build("flux")
    quantise(pipe.transformer), quantise(twin.transformer)
    twin.to("sim")
    engine = offload_engine.attach(pipe)
    for _ in range(2):
        assert torch.equal(run(pipe, "flux"), run(twin, "flux"))
        assert engine.resident == ()
    with torch.inference_mode():
        assert torch.equal(run(pipe, "flux"), run(twin, "flux"))


def test_layers_that_are_dequantised_while_attached_are_offloaded_as_the_rest():
    from diffusers.quantizers.gguf.utils import _dequantize_gguf_and_restore_linear

    pipe, twin = build("flux"), build("flux")
    for each in (pipe, twin):
        gguf_q8(each.transformer)
    twin.to("sim")
    engine = offload_engine.attach(pipe)
    for _ in range(2):
        assert torch.equal(run(pipe, "flux"), run(twin, "flux"))
    packed_nbytes = engine.report().components["transformer"].nbytes
    for each in (pipe, twin):
        _dequantize_gguf_and_restore_linear(each.transformer)
    for _ in range(2):
        assert torch.equal(run(pipe, "flux"), run(twin, "flux"))
        assert engine.resident == ()
    assert engine.report().components["transformer"].nbytes > 2 * packed_nbytes


def test_the_twin_on_the_device_is_a_fair_judge():
    assert torch.isfinite(run(on_device("flux"), "flux")).all()
