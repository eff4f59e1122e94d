"""What enable_model_cpu_offload() does, row by row, and what the engine does in its place.

The numbers are those of the table in docs/migrating.md. accelerate is not installed here.
"""

import copy
import ctypes
import functools
import importlib.util
import json
import logging
import pickle

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from torch import nn

import offload_engine
from benchmarks.pipelines import PIPELINES, modules
from benchmarks.pipelines.case import picture
from benchmarks.pipelines.encoders import clip_image_processor, clip_vision
from offload_engine import sim
from offload_engine.errors import ComponentError, DeviceError, OffloadError, SequenceError

from .conftest import total_nbytes

SIM = "sim"


@pytest.fixture(autouse=True)
def on_the_simulator(sim_device):
    return sim_device


@pytest.fixture
def pipe():
    return build("sd15")


def build(name, **options):
    return PIPELINES[name].build(**options)


def run(pipe, name="sd15", **overrides):
    return torch.as_tensor(PIPELINES[name].run(pipe, steps=2, **overrides))


def on_device(name="sd15", **options):
    """The same pipeline, never offloaded, on the simulated device."""
    pipe = build(name, **options)
    return pipe.to(SIM)


@functools.cache
def expected(name="sd15"):
    return run(on_device(name), name)


def places(pipe):
    """Device types that the weights of each component are on."""
    return {
        name: "+".join(sorted({t.device.type for t in module.state_dict().values()}))
        for name, module in modules(pipe).items()
    }


def is_hooked(module):
    return "_hf_hook" in module.__dict__


def unet_inputs(device="cpu"):
    return torch.ones(1, 4, 16, 16, device=device), 1, torch.ones(1, 7, 32, device=device)


# ---- 1: what is refused, in which order, and with what kind of error


class Sharded(nn.Linear):
    """As tensor parallelism leaves a layer: its weights belong to a mesh of devices."""

    def __init__(self):
        super().__init__(2, 2)
        self.weight.device_mesh = "a mesh"


def group_offload(pipe):
    pipe.unet.enable_group_offload(
        onload_device=torch.device(SIM),
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
    )


def shard(pipe):
    pipe.vae.post_quant_conv.extra = Sharded()


def map_devices(pipe):
    pipe.hf_device_map = {"unet": 0, "vae": 1}


def take_the_sequence(pipe):
    pipe.model_cpu_offload_seq = None


REFUSALS = [  # as upstream checks them, one after the other
    (group_offload, ComponentError, "Group offloading is active on unet"),
    (shard, ComponentError, "vae is sharded over devices"),
    (map_devices, ComponentError, r"pipe\.reset_device_map\(\) first"),
    (take_the_sequence, SequenceError, "has no model_cpu_offload_seq"),
]


@pytest.mark.parametrize("first", range(len(REFUSALS)), ids=[r[0].__name__ for r in REFUSALS])
def test_what_cannot_be_offloaded_is_refused_in_the_order_of_upstream(pipe, first):
    for fault, _, _ in REFUSALS[first:]:
        fault(pipe)
    _, error, message = REFUSALS[first]
    with pytest.raises(error, match=message) as raised:
        offload_engine.attach(pipe, device="sim:0", gpu_id=0)
    assert isinstance(raised.value, ValueError)
    assert type(pipe) is StableDiffusionPipeline
    assert not any(is_hooked(module) for module in modules(pipe).values())


def test_no_accelerator_is_a_runtime_error(pipe, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no accelerator"):
        offload_engine.attach(pipe)


@pytest.mark.parametrize(
    "arguments",
    [
        {"gpu_id": 0, "device": "sim:0"},
        {"gpu_id": 1, "device": "sim:0"},
        {"gpu_id": 7},
        {"gpu_id": -1},
        {"device": "sim:9"},
        {"device": "cuda"},
    ],
    ids=str,
)
def test_a_device_that_cannot_be_meant_is_refused_and_what_was_attached_stays(pipe, arguments):
    engine = offload_engine.attach(pipe, gpu_id=1)
    with pytest.raises(DeviceError) as raised:
        offload_engine.attach(pipe, **arguments)
    assert isinstance(raised.value, ValueError)
    assert torch.equal(run(pipe), expected())
    assert pipe._offload_device == engine.device == torch.device("sim:1")


# ---- 2, 3, 4: the device, what is written down about it, everything to the host first


def test_the_cpu_is_a_device_as_any_other(pipe):
    on_cpu = run(build("sd15"))
    before = sim.counters()
    engine = offload_engine.attach(pipe, device="cpu")
    assert torch.equal(run(pipe), on_cpu)
    assert pipe._execution_device == engine.device == torch.device("cpu")
    assert sim.counters() == before


@pytest.mark.parametrize(
    ("arguments", "index"),
    [
        ({}, 0),
        ({"device": "sim"}, 0),
        ({"gpu_id": 1}, 1),
        ({"device": "sim:1"}, 1),
        ({"device": "sim", "gpu_id": 1}, 1),
    ],
    ids=str,
)
def test_the_device_is_the_one_asked_for(pipe, arguments, index):
    engine = offload_engine.attach(pipe, **arguments)
    assert engine.device == torch.device("sim", index)
    assert pipe._offload_gpu_id == index
    assert pipe._offload_device == pipe._execution_device == engine.device
    assert len(pipe._all_hooks) > 0
    assert torch.equal(run(pipe), expected())


def test_index_0_counts_as_given_and_no_index_means_the_one_before(pipe):
    offload_engine.attach(pipe, gpu_id=1)
    assert offload_engine.attach(pipe).device == torch.device("sim:1")
    assert offload_engine.attach(pipe, gpu_id=0).device == torch.device("sim:0")
    assert offload_engine.attach(pipe, device=torch.device("sim", 1)).device.index == 1
    assert offload_engine.attach(pipe, device="sim:0").device == torch.device("sim:0")


def test_detaching_takes_back_what_was_written_down(pipe):
    pipe._offload_gpu_id = 1
    with offload_engine.attach(pipe) as engine:
        assert engine.device.index == 1
    assert pipe._offload_gpu_id == 1
    assert not hasattr(pipe, "_offload_device") and not hasattr(pipe, "_all_hooks")


def test_a_pipeline_on_the_device_goes_to_the_host_first(pipe):
    free_of = torch.accelerator.memory_allocated()
    pipe.to(SIM)
    before = sim.counters()
    offload_engine.attach(pipe)
    assert set(places(pipe).values()) == {"cpu"}
    assert torch.accelerator.memory_allocated() == free_of
    assert sim.counters().since(before).empty_cache_calls == 1
    assert torch.equal(run(pipe), expected())


# ---- 5, 7, 8: names in the sequence, names outside of it, exclusions


def test_names_that_the_pipelines_own_sequence_should_not_have_are_passed_over(pipe):
    pipe.model_cpu_offload_seq = (
        "text_encoder->nothing->image_encoder->unet->text_encoder->scheduler->vae->vae"
    )
    engine = offload_engine.attach(pipe)
    assert str(engine.sequence) == "text_encoder->unet->vae"
    assert torch.equal(run(pipe), expected())


def test_in_a_sequence_given_by_hand_an_unknown_name_is_an_error(pipe):
    """On purpose: upstream takes no sequence by hand, and a typo there would be silent."""
    with pytest.raises(SequenceError, match="'nope'") as error:
        offload_engine.attach(pipe, "text_encoder->nope->safety_checker->vae")
    assert error.value.names == ("nope",)


def test_what_is_excluded_and_not_in_the_sequence_is_on_the_device_at_once():
    pipe = build("sd15_safety_checker")
    engine = offload_engine.attach(pipe)
    assert places(pipe)["safety_checker"] == "sim"
    assert engine.resident == ("safety_checker",)
    assert torch.equal(run(pipe, "sd15_safety_checker"), expected("sd15_safety_checker"))
    engine.release()
    assert engine.resident == ("safety_checker",)
    engine.detach()
    assert places(pipe)["safety_checker"] == "cpu" and not is_hooked(pipe.safety_checker)


def test_what_is_not_in_the_sequence_is_offloaded_as_the_rest():
    """On purpose: upstream leaves it on the device from its first use until the end of the call."""
    pipe = build("audioldm")
    assert "vocoder" not in pipe.model_cpu_offload_seq
    engine = offload_engine.attach(pipe)
    assert is_hooked(pipe.vocoder)
    pipe.vocoder(torch.ones(1, 4, 8))
    assert engine.resident == ("vocoder",)
    pipe.vae.decode(torch.ones(1, 4, 4, 4))
    assert engine.resident == ("vae",)


def test_an_exclusion_does_not_count_for_what_the_sequence_names():
    pipe = build("kandinsky_prior")
    assert "prior" in pipe._exclude_from_cpu_offload
    engine = offload_engine.attach(pipe)
    assert set(places(pipe).values()) == {"cpu"}
    assert pipe._execution_device == torch.device("sim:0")
    assert torch.equal(run(pipe, "kandinsky_prior"), expected("kandinsky_prior"))
    assert engine.resident == ()


# ---- 9 to 13: one component after the other


def test_the_previous_component_leaves_before_the_next_one_comes():
    parts = {"a": nn.Linear(256, 256), "b": nn.Linear(256, 256)}
    engine = offload_engine.attach(parts, "a->b")
    torch.accelerator.reset_peak_memory_stats()
    before = torch.accelerator.memory_allocated()
    for part in parts.values():
        part(torch.ones(1, 256))
    peak = torch.accelerator.max_memory_allocated() - before
    assert total_nbytes(parts["a"]) < peak < 1.1 * total_nbytes(parts["a"])
    assert engine.resident == ("b",)


def test_arguments_on_the_host_are_moved_wherever_they_are(pipe):
    offload_engine.attach(pipe)
    sample, timestep, states = unet_inputs()
    added = {"nested": [states, (states, {"deep": states})]}
    seen = {}
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    out = pipe.unet(sample, timestep, encoder_hidden_states=states, added_cond_kwargs=added)
    assert out.sample.device.type == "sim"
    nested = seen["kwargs"]["added_cond_kwargs"]["nested"]
    assert {t.device.type for t in (nested[0], nested[1][0], nested[1][1]["deep"])} == {"sim"}
    assert added["nested"][0] is states  # the caller's own are left alone


def test_arguments_are_moved_on_a_transition_only_as_upstream_does(pipe):
    offload_engine.attach(pipe)
    pipe.unet(*unet_inputs())
    with pytest.raises(RuntimeError, match="same device"):
        pipe.unet(*unet_inputs())
    pipe.unet(*unet_inputs("sim"))


def test_a_module_without_weights_is_a_component(pipe):
    pipe.register_modules(image_encoder=nn.Identity())
    engine = offload_engine.attach(pipe)
    assert pipe.image_encoder(torch.ones(1)).device.type == "sim"
    assert engine.resident == ("image_encoder",)
    assert torch.equal(run(pipe), expected())


def test_a_component_stays_until_the_next_one_comes(pipe):
    engine = offload_engine.attach(pipe)
    pipe.unet(*unet_inputs())
    assert engine.resident == ("unet",) and places(pipe)["unet"] == "sim"
    pipe.vae.decode(torch.ones(1, 4, 16, 16))
    assert engine.resident == ("vae",) and places(pipe)["unet"] == "cpu"


def test_one_module_under_two_names_is_fetched_once(pipe):
    pipe.image_encoder = pipe.text_encoder
    engine = offload_engine.attach(pipe)
    ids = torch.ones(1, 4, dtype=torch.int64)
    for encoder in (pipe.text_encoder, pipe.image_encoder) * 3:
        encoder(ids.to(SIM))
    assert engine.report().components["text_encoder"].fetches == 1
    assert set(engine.resident) == {"text_encoder", "image_encoder"}


def test_the_device_of_the_pipeline_is_where_something_is_and_else_the_host(pipe):
    offload_engine.attach(pipe)
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append((pipe.device.type, pipe._execution_device.type))
        return tensors

    assert pipe.device.type == "cpu"
    run(pipe, callback_on_step_end=look)
    assert seen == [("sim", "sim")] * 2
    assert pipe.device.type == "cpu" and pipe._execution_device.type == "sim"


# ---- 14, 22: moved and cast by hand


def test_moving_the_pipeline_to_the_device_warns_works_and_ends_with_the_call(pipe, caplog):
    engine = offload_engine.attach(pipe)
    with caplog.at_level(logging.WARNING, "offload_engine"):
        pipe.to(SIM)
    assert "Call engine.detach() first" in caplog.text
    assert set(places(pipe).values()) == {"sim"}
    for _ in range(2):
        assert torch.equal(run(pipe), expected())
        assert engine.resident == () and set(places(pipe).values()) == {"cpu"}


@pytest.mark.parametrize("move", [{}, {"device": "cpu"}, {"device": SIM}], ids=str)
def test_a_cast_of_the_pipeline_takes_effect(pipe, move):
    twin = on_device()
    engine = offload_engine.attach(pipe)
    for dtype in (torch.bfloat16, torch.float32):
        pipe.to(dtype=dtype, **move), twin.to(dtype=dtype)
        assert torch.equal(run(pipe), run(twin))
        assert engine.resident == ()
        assert pipe.unet.dtype == pipe.vae.dtype == dtype


@pytest.mark.parametrize("resident", [False, True], ids=["on the host", "on the device"])
def test_a_cast_of_one_component_takes_effect(pipe, resident):
    twin = on_device()
    engine = offload_engine.attach(pipe)
    if resident:
        pipe.vae.decode(torch.ones(1, 4, 16, 16))
        assert engine.resident == ("vae",)
    for each in (pipe, twin):
        each.vae.to(torch.float16).to(torch.float32)
    assert torch.equal(run(pipe), run(twin))
    assert not torch.equal(run(pipe), expected())  # the cast has cost bits, and they stay lost


def test_a_component_moved_to_the_host_while_it_runs_comes_back(pipe):
    engine = offload_engine.attach(pipe)

    def take_away(pipe, step, timestep, tensors):
        pipe.unet.to("cpu")
        return tensors

    for _ in range(2):
        assert torch.equal(run(pipe, callback_on_step_end=take_away), expected())
        assert engine.resident == ()


def test_an_excluded_component_that_was_moved_away_is_back_for_the_next_call():
    pipe = build("sd15_safety_checker")
    offload_engine.attach(pipe)
    pipe.to(SIM), pipe.to("cpu")
    assert torch.equal(run(pipe, "sd15_safety_checker"), expected("sd15_safety_checker"))
    assert places(pipe)["safety_checker"] == "sim"


# ---- 15: the end of a call


class Unfreed(StableDiffusionPipeline):
    """One of those classes that never call maybe_free_model_hooks."""

    def __call__(self, *args, **kwargs):
        self.maybe_free_model_hooks = lambda: None
        try:
            return super().__call__(*args, **kwargs)
        finally:
            del self.maybe_free_model_hooks


def test_a_class_that_never_frees_is_freed_all_the_same():
    """On purpose: upstream keeps the last component on the device."""
    pipe = Unfreed(**build("sd15").components, requires_safety_checker=False)
    engine = offload_engine.attach(pipe)
    assert torch.equal(run(pipe), expected())
    assert engine.resident == ()


@pytest.mark.parametrize("name", ["repaint", "ldm_text2img", "audioldm", "dance_diffusion"])
def test_the_classes_of_upstream_that_never_free_are_freed(name):
    pipe = build(name)
    want = expected(name)
    before = torch.accelerator.memory_allocated()
    engine = offload_engine.attach(pipe)
    assert torch.equal(run(pipe, name), want)
    assert engine.resident == ()
    assert torch.accelerator.memory_allocated() < before + total_nbytes(pipe.unet) / 100


def test_maybe_free_model_hooks_frees_by_hand(pipe):
    engine = offload_engine.attach(pipe)
    pipe.unet(*unet_inputs())
    pipe.maybe_free_model_hooks()
    assert engine.resident == ()
    engine.detach()
    pipe.maybe_free_model_hooks()  # and does nothing any more
    assert not is_hooked(pipe.unet)


def test_the_end_of_a_call_resets_stateful_caches(pipe):
    resets = []
    pipe.unet._reset_stateful_cache = lambda: resets.append("unet")
    offload_engine.attach(pipe)
    run(pipe)
    assert resets == ["unet"]


def test_an_override_of_maybe_free_model_hooks_on_the_instance_is_called(pipe):
    calls = []
    pipe.maybe_free_model_hooks = lambda: calls.append("mine")
    engine = offload_engine.attach(pipe)
    assert torch.equal(run(pipe), expected())
    assert calls == ["mine"] and engine.resident == ()


def test_an_override_of_enable_model_cpu_offload_on_the_instance_is_called_at_the_end(pipe):
    calls = []
    pipe.enable_model_cpu_offload = lambda **arguments: calls.append(arguments)
    offload_engine.attach(pipe)
    assert torch.equal(run(pipe), expected())
    assert calls == [{"device": torch.device("sim:0")}]


# ---- 16, 3 of "First of all": hooks removed


def test_remove_all_hooks_detaches_without_accelerate(pipe):
    assert importlib.util.find_spec("accelerate") is None
    engine = offload_engine.attach(pipe)
    run(pipe)
    pipe.remove_all_hooks()
    assert pipe._all_hooks == [] and engine.resident == ()
    assert not any(is_hooked(module) for module in modules(pipe).values())
    assert pipe._execution_device.type == "cpu"
    pipe.to(SIM)
    assert torch.equal(run(pipe), expected())


def test_reset_device_map_detaches_and_leaves_everything_on_the_host():
    pipe = build("sd15_safety_checker")
    pipe.hf_device_map = {"": "sim:0"}  # one entry: no hindrance
    offload_engine.attach(pipe)
    pipe.reset_device_map()
    assert pipe.hf_device_map is None
    assert set(places(pipe).values()) == {"cpu"}
    assert not any(is_hooked(module) for module in modules(pipe).values())


# ---- 18, 19: loaders


@pytest.mark.parametrize("resident", [False, True], ids=["on the host", "on the device"])
def test_a_textual_inversion_is_loaded_and_unloaded_without_accelerate(pipe, resident):
    twin = on_device()
    engine = offload_engine.attach(pipe)
    if resident:
        pipe.text_encoder(torch.ones(1, 4, dtype=torch.int64))
        assert engine.resident == ("text_encoder",)
    embedding = {"<mine>": torch.randn(32, generator=torch.Generator().manual_seed(0))}
    for each in (pipe, twin):
        each.load_textual_inversion(embedding)
    assert pipe._execution_device == torch.device("sim:0")
    with_token = run(twin, prompt="a <mine> bird")
    for _ in range(2):
        assert torch.equal(run(pipe, prompt="a <mine> bird"), with_token)
        assert engine.resident == ()
    for each in (pipe, twin):
        each.unload_textual_inversion()
    assert torch.equal(run(pipe, prompt="a <mine> bird"), run(twin, prompt="a <mine> bird"))
    assert torch.equal(run(pipe), expected())


def ip_adapter(unet):
    """A small random IP-Adapter for ``unet``, as load_ip_adapter takes it."""
    draw = torch.Generator().manual_seed(3)
    attentions = [name for name in unet.attn_processors if "attn2" in name]
    layers = {}
    for place, name in enumerate(attentions):
        width = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for key in ("to_k_ip", "to_v_ip"):
            weight = torch.randn(width, 32, generator=draw) * 0.1
            layers[f"{2 * place + 1}.{key}.weight"] = weight
    projection = {
        "proj.weight": torch.randn(4 * 32, 32, generator=draw) * 0.1,
        "proj.bias": torch.zeros(4 * 32),
        "norm.weight": torch.ones(32),
        "norm.bias": torch.zeros(32),
    }
    return {"image_proj": projection, "ip_adapter": layers}


@pytest.mark.parametrize("way", ["register_modules", "attribute"])
def test_an_ip_adapter_loads_scales_and_unloads_while_attached(pipe, way):
    """Upstream leaves the new image encoder without a hook until the next call has ended."""
    twin = on_device()
    engine = offload_engine.attach(pipe)
    torch.manual_seed(0)
    for each, encoder in ((pipe, clip_vision()), (twin, None)):
        encoder = copy.deepcopy(pipe.image_encoder).to(SIM) if encoder is None else encoder.eval()
        if way == "register_modules":
            each.register_modules(image_encoder=encoder)
        else:
            each.image_encoder = encoder
        each.feature_extractor = clip_image_processor()
        each.load_ip_adapter(ip_adapter(each.unet), "", "weights", image_encoder_folder=None)
    for scale in (1.0, 0.5):
        for each in (pipe, twin):
            each.set_ip_adapter_scale(scale)
        image = {"ip_adapter_image": picture(32)}
        for _ in range(2):
            out = run(pipe, **image)
            assert torch.equal(out, run(twin, **image)) and not torch.equal(out, expected())
            assert engine.resident == ()
        assert str(engine.sequence) == "text_encoder->image_encoder->unet->vae"
    encoder = pipe.image_encoder
    assert is_hooked(encoder)
    for each in (pipe, twin):
        each.unload_ip_adapter()
    for _ in range(2):
        assert torch.equal(run(pipe), expected()) and torch.equal(run(twin), expected())
    assert not is_hooked(encoder) and "image_encoder" not in engine.report().components


# ---- 20, 21: shared and replaced components


IMG2IMG = "sd15_img2img"


def second(pipe, way):
    """An image-to-image pipeline of the same modules."""
    if way == "from_pipe":
        return StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    return StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)


each_way = pytest.mark.parametrize("way", ["from_pipe", "components"])


@each_way
def test_two_pipelines_of_the_same_modules_share_what_is_on_the_device(pipe, way):
    twin = on_device()
    want, want_2 = run(twin), run(second(twin, way), IMG2IMG)
    engine = offload_engine.attach(pipe)
    other = second(pipe, way)
    engine_2 = offload_engine.attach(other)
    pinned = sim.counters().pinned_nbytes
    for _ in range(2):
        assert torch.equal(run(pipe), want)
        assert torch.equal(run(other, IMG2IMG), want_2)
        assert engine.resident == engine_2.resident == ()
    pipe.unet(*unet_inputs())
    assert engine.resident == engine_2.resident == ("unet",)
    assert sim.counters().pinned_nbytes == pinned  # one set of masters


@each_way
@pytest.mark.parametrize("gone", [0, 1], ids=["the first", "the second"])
def test_when_one_of_two_is_detached_the_other_goes_on(pipe, way, gone):
    twin = on_device()
    wants = [run(twin), run(second(twin, way), IMG2IMG)]
    pipes, names = [pipe, second(pipe, way)], ["sd15", IMG2IMG]
    engines = [offload_engine.attach(each) for each in pipes]
    engines[gone].detach()
    stays = 1 - gone
    for _ in range(2):
        assert torch.equal(run(pipes[stays], names[stays]), wants[stays])
        assert engines[stays].resident == ()
        assert torch.equal(run(pipes[gone], names[gone]), wants[gone])  # by the hooks of the other
    engines[stays].detach()
    assert not any(is_hooked(module) for module in modules(pipe).values())
    assert set(places(pipe).values()) == {"cpu"}


@each_way
def test_a_second_pipeline_that_is_not_attached_runs_by_the_hooks_of_the_first(pipe, way):
    twin = on_device()
    want = run(second(twin, way), IMG2IMG)
    engine = offload_engine.attach(pipe)
    other = second(pipe, way)
    assert other._execution_device == torch.device("sim:0")
    assert torch.equal(run(other, IMG2IMG), want)
    assert engine.resident == ("vae",)  # nobody has told it that the call is over
    assert torch.equal(run(pipe), expected())
    assert engine.resident == ()


def test_from_pipe_casts_shared_modules_to_float32_as_upstream():
    pipe, twin = build("sd15", dtype=torch.float16), on_device(dtype=torch.float16)
    offload_engine.attach(pipe)
    for each in (pipe, twin):
        StableDiffusionImg2ImgPipeline.from_pipe(each)
    assert pipe.unet.dtype == torch.float32
    assert torch.equal(run(pipe), run(twin))


def test_sharing_with_a_pipeline_on_another_device_is_refused(pipe):
    offload_engine.attach(pipe, device="sim:0")
    other = second(pipe, "components")
    with pytest.raises(ComponentError, match="already offloaded to sim:0"):
        offload_engine.attach(other, device="sim:1")
    assert type(other) is StableDiffusionImg2ImgPipeline
    assert torch.equal(run(pipe), expected())


@pytest.mark.parametrize("resident", [False, True], ids=["on the host", "on the device"])
def test_a_replaced_component_is_offloaded_from_the_start(pipe, resident):
    """Upstream hooks it when the next call has ended; one that comes first computes on the host."""
    twin, new, new_twin = on_device(), build("sd15", seed=3), on_device(seed=3)
    engine = offload_engine.attach(pipe)
    for name in (next(iter(modules(pipe))), "unet", "text_encoder"):
        if resident:
            pipe.unet(*unet_inputs())
        old = getattr(pipe, name)
        setattr(pipe, name, getattr(new, name)), setattr(twin, name, getattr(new_twin, name))
        assert pipe._execution_device == torch.device("sim:0")
        assert not is_hooked(old)
        assert {t.device.type for t in old.state_dict().values()} == {"cpu"}
        for _ in range(2):
            assert torch.equal(run(pipe), run(twin))
            assert engine.resident == ()


def test_a_component_replaced_in_the_middle_of_a_call_runs(pipe):
    twin, vae = on_device(), build("sd15", seed=3).vae
    twin.vae = copy.deepcopy(vae).to(SIM)
    engine = offload_engine.attach(pipe)

    def replace(pipe, step, timestep, tensors):
        pipe.vae = vae
        return tensors

    assert torch.equal(run(pipe, callback_on_step_end=replace), run(twin))
    assert engine.resident == ()


# ---- 23, 26: classes that offload in their own way


@pytest.mark.parametrize("way", ["attached", "patched"])
def test_a_class_with_its_own_offload_chain_is_offloaded_as_any_other(way):
    pipe = build("audioldm2")
    if way == "attached":
        offload_engine.attach(pipe)
    else:
        with offload_engine.patch_diffusers():
            pipe.enable_model_cpu_offload()
    for _ in range(2):
        assert torch.equal(run(pipe, "audioldm2"), expected("audioldm2"))
        assert set(places(pipe).values()) == {"cpu"}


def test_a_combined_pipeline_offloads_as_one_or_hands_on_to_those_inside():
    name = "stable_cascade"
    pipe = build(name)
    with offload_engine.patch_diffusers():
        pipe.enable_model_cpu_offload()
    for _ in range(2):
        assert torch.equal(run(pipe, name), expected(name))
        assert set(places(pipe).values()) == {"cpu"}
    pipe.prior_pipe.remove_all_hooks(), pipe.decoder_pipe.remove_all_hooks()
    engine = offload_engine.attach(pipe)
    for _ in range(2):
        assert torch.equal(run(pipe, name), expected(name))
        assert engine.resident == ()
    assert str(engine.sequence) == "text_encoder->prior_prior->decoder->vqgan"


def test_a_modular_pipeline_is_offloaded_given_its_sequence():
    case = PIPELINES["modular_flux"]
    pipe, twin = case.build(), case.build()
    with pytest.raises(SequenceError, match="Give one as seq="):
        offload_engine.attach(pipe)
    engine = offload_engine.attach(pipe, case.seq)
    twin.to(SIM)
    for seed in (None, 5):
        if seed is not None:
            new = [case.build(seed=seed).transformer for _ in range(2)]
            pipe.update_components(transformer=new[0])
            twin.update_components(transformer=new[1].to(SIM))
            assert is_hooked(new[0])
        for _ in range(2):
            assert torch.equal(run(pipe, case.name), run(twin, case.name))
            assert engine.resident == () and pipe._execution_device.type == "sim"


# ---- 24, 25: by hand, and copied


def test_who_fires_pre_forward_by_hand_has_the_component_there(pipe):
    engine = offload_engine.attach(pipe)
    hook = pipe.unet._hf_hook
    assert hook.execution_device == torch.device("sim:0") and hook.no_grad is False
    for _ in range(2):
        arguments, options = hook.pre_forward(pipe.unet, torch.ones(1), x=[torch.ones(1)])
        assert engine.resident == ("unet",)
    pipe.vae.decode(torch.ones(1, 4, 16, 16))
    arguments, options = hook.pre_forward(pipe.unet, torch.ones(1), x=[torch.ones(1)])
    assert arguments[0].device.type == options["x"][0].device.type == "sim"
    assert engine.resident == ("unet",)


@pytest.mark.parametrize("resident", [False, True], ids=["on the host", "on the device"])
def test_the_copy_of_a_component_is_on_its_own(pipe, resident):
    engine = offload_engine.attach(pipe)
    if resident:
        pipe.unet(*unet_inputs())
    other = copy.deepcopy(pipe.unet)
    before = engine.resident
    want = other.to(SIM)(*unet_inputs("sim")).sample
    assert engine.resident == before
    pipe.vae.decode(torch.ones(1, 4, 16, 16))
    assert torch.equal(other(*unet_inputs("sim")).sample, want)
    with torch.no_grad():
        other.conv_in.weight.zero_()
    assert torch.equal(run(pipe), expected())
    with offload_engine.attach({"other": other}, "other") as second_engine:
        other(*unet_inputs())
        assert second_engine.resident == ("other",)


def pickled(pipe):
    return pickle.loads(pickle.dumps(pipe))


@pytest.mark.parametrize("make", [copy.deepcopy, pickled])
def test_the_copy_of_an_attached_pipeline_is_not_attached(pipe, make):
    on_cpu = run(build("sd15"))
    engine = offload_engine.attach(pipe)
    pipe.unet(*unet_inputs())
    other = make(pipe)
    assert type(other) is StableDiffusionPipeline
    engine.release()
    assert torch.equal(run(other.to("cpu")), on_cpu)
    assert engine.resident == ()
    second_engine = offload_engine.attach(other)
    engine.detach()
    assert torch.equal(run(other), expected())
    assert second_engine.resident == ()


def test_a_pickle_is_no_larger_than_without_the_engine(pipe):
    plain_nbytes = len(pickle.dumps(pipe))
    offload_engine.attach(pipe)
    assert len(pickle.dumps(pipe)) < 1.01 * plain_nbytes
    pipe.unet(*unet_inputs())  # resident now: all its weights lie in one slot
    assert len(pickle.dumps(pipe)) < 1.01 * plain_nbytes


def test_a_pipeline_is_saved_and_loaded_as_if_it_were_not_attached(pipe, tmp_path):
    offload_engine.attach(pipe)
    pipe.unet(*unet_inputs())
    pipe.save_pretrained(tmp_path / "attached")
    build("sd15").save_pretrained(tmp_path / "plain")
    index = "model_index.json"
    saved = json.loads((tmp_path / "attached" / index).read_text())
    assert saved == json.loads((tmp_path / "plain" / index).read_text())
    assert saved["_class_name"] == "StableDiffusionPipeline"
    for file in (tmp_path / "plain").rglob("*.safetensors"):
        twin = tmp_path / "attached" / file.relative_to(tmp_path / "plain")
        assert twin.read_bytes() == file.read_bytes()
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "attached", low_cpu_mem_usage=False)
    assert type(loaded) is StableDiffusionPipeline
    offload_engine.attach(loaded)
    assert torch.equal(run(loaded), expected()) and torch.equal(run(pipe), expected())


# ---- 2 of "First of all": entries other than the root forward


METHODS = {
    "decode": ("sd15", "vae", lambda vae: vae.decode(torch.ones(1, 4, 8, 8)).sample),
    "encode": ("sd15", "vae", lambda vae: vae.encode(torch.ones(1, 3, 16, 16)).latent_dist.mean),
    "get_text_features": (
        "audioldm2",
        "text_encoder",
        lambda te: te.get_text_features(torch.ones(1, 4).long()).pooler_output,
    ),
    "generate": (
        "flux2_generate",
        "text_encoder",
        lambda te: te.generate(torch.ones(1, 4).long(), max_length=12, do_sample=False),
    ),
}
SUBMODULES = {
    "child": ("vae", "post_quant_conv", torch.ones(1, 4, 8, 8)),
    "grandchild": ("unet", "time_embedding.linear_1", torch.ones(1, 32)),
    "late": ("text_encoder", "final_layer_norm", torch.ones(1, 3, 32)),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_an_entry_and_takes_inputs_from_the_host(method):
    name, component, enter = METHODS[method]
    pipe = build(name)
    with torch.no_grad():
        want = enter(getattr(build(name), component))
        engine = offload_engine.attach(pipe)
        other = next(module for each, module in modules(pipe).items() if each != component)
        for _ in range(2):
            other._hf_hook.pre_forward(other)
            out = enter(getattr(pipe, component))
            assert engine.resident == (component,)
            assert out.device.type == "sim"
            torch.testing.assert_close(out.cpu(), want)
            engine.release()


@pytest.mark.parametrize("submodule", SUBMODULES)
@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_a_submodule_is_an_entry_and_answers_where_it_was_asked(pipe, submodule, device):
    """Who asks `text_encoder.device` is told the host, and goes on there (Ideogram 4)."""
    component, path, x = SUBMODULES[submodule]
    want = getattr(build("sd15"), component).get_submodule(path)(x)
    engine = offload_engine.attach(pipe)
    module = getattr(pipe, component).get_submodule(path)
    other = next(each for name, each in modules(pipe).items() if name != component)
    for _ in range(2):
        other._hf_hook.pre_forward(other)
        out = module(x.to(device))
        assert engine.resident == (component,)
        assert out.device.type == device
        torch.testing.assert_close(out.cpu(), want)
        engine.release()


def test_forward_called_by_name_is_an_entry_too(pipe):
    engine = offload_engine.attach(pipe)
    want = pipe.unet(*unet_inputs()).sample
    engine.release()
    assert torch.equal(pipe.unet.forward(*unet_inputs()).sample, want)
    assert engine.resident == ("unet",)


# ---- the limits


def write_through_a_pointer(weight, value):
    """As a kernel does that is not torch's own; the memory of the simulator is the host's."""
    ctypes.memset(weight.data_ptr(), value, weight.nbytes)


@pytest.mark.parametrize("said", [False, True], ids=["silent", "said"])
def test_a_write_through_a_raw_pointer_is_kept_if_its_version_is_counted(pipe, said):
    engine = offload_engine.attach(pipe)
    pipe.unet(*unet_inputs())
    weight = pipe.unet.conv_in.weight
    write_through_a_pointer(weight, 0)
    if said:
        torch.autograd.graph.increment_version(weight)
    assert not weight.any()
    engine.release()
    assert weight.any().item() is not said


def test_the_forward_of_a_submodule_called_by_name_runs_where_its_weights_are(pipe):
    offload_engine.attach(pipe)
    quant = pipe.vae.post_quant_conv
    assert quant.forward(torch.ones(1, 4, 8, 8)).device.type == "cpu"
    assert quant(torch.ones(1, 4, 8, 8, device=SIM)).device.type == SIM


# ---- beside the table: modes, compilers, callbacks


def test_inference_mode_around_the_call_or_around_everything(pipe):
    engine = offload_engine.attach(pipe)
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(run(pipe), expected())
        assert torch.equal(run(pipe), expected())
    with torch.inference_mode():
        made_inside = build("sd15")
        offload_engine.attach(made_inside)
        for _ in range(2):
            assert torch.equal(run(made_inside), expected())
    assert engine.resident == ()


def compiled_before(pipe):
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    offload_engine.attach(pipe)


def compiled_after(pipe):
    offload_engine.attach(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager")


def compiled_in_place_before(pipe):
    pipe.unet.compile(backend="eager")
    offload_engine.attach(pipe)


def compiled_in_place_after(pipe):
    offload_engine.attach(pipe)
    pipe.unet.compile(backend="eager")


def compiled_child(pipe):
    offload_engine.attach(pipe)
    pipe.vae.decoder.compile(backend="eager")


def compiled_method_before(pipe):
    pipe.vae.decode = torch.compile(pipe.vae.decode, backend="eager")
    offload_engine.attach(pipe)


def compiled_method_after(pipe):
    offload_engine.attach(pipe)
    pipe.vae.decode = torch.compile(pipe.vae.decode, backend="eager")


def compiled_forward(pipe):
    offload_engine.attach(pipe)
    pipe.unet.forward = torch.compile(pipe.unet.forward, backend="eager", fullgraph=True)


COMPILED = [
    compiled_before, compiled_after, compiled_in_place_before, compiled_in_place_after,
    compiled_child, compiled_method_before, compiled_method_after, compiled_forward,
]  # fmt: skip


@pytest.mark.parametrize("prepare", COMPILED, ids=lambda prepare: prepare.__name__)
def test_a_compiled_component_gives_the_same_bits(pipe, prepare):
    torch._dynamo.reset()
    try:
        prepare(pipe)
        for _ in range(2):
            assert torch.equal(run(pipe), expected())
            assert set(places(pipe).values()) == {"cpu"}
    finally:
        torch._dynamo.reset()


def test_a_callback_that_decodes_each_step_sees_the_same_latents(pipe):
    def decoded(pipe, seen):
        def callback(pipe, step, timestep, tensors):
            seen.append(pipe.vae.decode(tensors["latents"]).sample.cpu())
            return tensors

        return run(pipe, callback_on_step_end=callback)

    want, ours = [], []
    out = decoded(on_device(), want)
    engine = offload_engine.attach(pipe)
    for _ in range(2):
        ours.clear()
        assert torch.equal(decoded(pipe, ours), out)
        assert all(torch.equal(a, b) for a, b in zip(ours, want, strict=True))
        assert engine.resident == ()


def test_the_patch_offloads_by_the_usual_call_and_is_taken_back(pipe):
    original = DiffusionPipeline.enable_model_cpu_offload
    with offload_engine.patch_diffusers():
        assert DiffusionPipeline.enable_model_cpu_offload is not original
        pipe.enable_model_cpu_offload(gpu_id=1)
        assert pipe._offload_device == torch.device("sim:1")
        pipe.enable_model_cpu_offload(gpu_id=0)
    assert DiffusionPipeline.enable_model_cpu_offload is original
    for _ in range(2):  # what was attached stays so
        assert torch.equal(run(pipe), expected())
        assert set(places(pipe).values()) == {"cpu"}
    assert pipe._offload_device == torch.device("sim:0")
    undo = offload_engine.patch_diffusers()
    undo(), undo()
    assert DiffusionPipeline.enable_model_cpu_offload is original


def test_upstream_errors_come_through_the_patch(pipe):
    with offload_engine.patch_diffusers():
        with pytest.raises(ValueError, match="Both gpu_id"):
            pipe.enable_model_cpu_offload(gpu_id=0, device="sim:0")
        pipe.model_cpu_offload_seq = None
        with pytest.raises(OffloadError, match="model_cpu_offload_seq"):
            pipe.enable_model_cpu_offload()
