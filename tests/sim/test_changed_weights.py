"""Who notices a changed weight? The table of facts/torch.md, row by row.

Each change is made on the host and on the device, three calls in a row; the model beside it, never
offloaded, says what must come out.
"""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import offload_engine


def in_place(m):
    with torch.no_grad():
        m[0].weight.add_(0.5)


def detached(m):
    m[0].weight.detach().add_(0.5)


def in_inference_mode(m):
    with torch.inference_mode():
        m[0].weight.mul_(1.5)


def load_state_dict(m):
    m.load_state_dict({k: v * 1.25 for k, v in m.state_dict().items()})


def load_state_dict_assign(m):
    m.load_state_dict({k: v * 1.25 for k, v in m.state_dict().items()}, assign=True)


def data_replaced(m):
    m[0].weight.data = m[0].weight.data * 0.5


def data_in_place(m):
    m[0].weight.data.add_(0.25)


def data_element(m):
    m[0].weight.data[3, 5] = 9.0


def data_increment(m):
    m[0].weight.data += torch.ones_like(m[0].weight)


def state_dict_data(m):
    m.state_dict()["0.weight"].data.mul_(-1)


def storage_write(m):
    w = m[0].weight
    torch.tensor([], dtype=w.dtype, device=w.device).set_(w.untyped_storage())[
        w.storage_offset() + 3
    ] = 7.0


def new_parameter(m):
    m[0].weight = nn.Parameter(m[0].weight.detach() * 3)


def cast_and_back(m):
    m.to(torch.float64).to(torch.float32)


def transposed(m):
    m[0].weight.data = m[0].weight.data.t().contiguous().t() * 2


def buffer_in_place(m):
    m[1].running_mean.add_(1.0)


def buffer_data(m):
    m[1].running_var.data.mul_(2.0)


def buffer_replaced(m):
    m[1].running_mean = m[1].running_mean * 2 + 1


def new_submodule(m):
    m.append(nn.Linear(16, 16).to(m[0].weight.device))
    with torch.no_grad():
        m[-1].weight.copy_(torch.eye(16) * 2)
        m[-1].bias.zero_()


def submodule_gone(m):
    del m[-1]


def bigger(m):
    m[2] = nn.Linear(64, 16).to(m[0].weight.device)
    with torch.no_grad():
        m[2].weight.fill_(0.125)
        m[2].bias.zero_()


def sgd(m, **options):
    optimizer = torch.optim.SGD([m[0].weight], lr=0.1, **options)
    m[0].weight.grad = torch.ones_like(m[0].weight)
    optimizer.step()
    optimizer.zero_grad()


def sgd_foreach(m):
    sgd(m, foreach=True)


def adamw(m, **options):
    optimizer = torch.optim.AdamW([m[0].weight, m[2].weight], lr=0.1, **options)
    for p in (m[0].weight, m[2].weight):
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()


def adamw_foreach(m):
    adamw(m, foreach=True)


def adamw_fused(m):
    adamw(m, fused=True)


CHANGES = [
    in_place, detached, in_inference_mode, load_state_dict, load_state_dict_assign, data_replaced,
    data_in_place, data_element, data_increment, state_dict_data, storage_write, new_parameter,
    cast_and_back, transposed, buffer_in_place, buffer_data, buffer_replaced, new_submodule,
    submodule_gone, bigger, sgd_foreach, adamw_foreach, adamw_fused,
]  # fmt: skip


def make():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 64), nn.BatchNorm1d(64), nn.Linear(64, 16), nn.Linear(16, 16)
    ).eval()


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_never_lost(sim_device, change, where):
    model, twin = make(), make().to(sim_device)
    other = nn.Linear(16, 16)
    x = torch.randn(3, 16).to(sim_device)
    engine = offload_engine.attach({"model": model, "other": other}, "model->other")
    for _ in range(3):
        with torch.no_grad():
            assert torch.equal(model(x), twin(x))
        if where == "host":
            other(x)  # evicts the model
        change(model)
        change(twin)
        with torch.no_grad():
            if where == "device":
                other(x)
            assert torch.equal(model(x), twin(x))
            other(x)
            assert engine.resident == ("other",)
            assert torch.equal(model(x), twin(x))
            engine.release()
    engine.detach()
    for key, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[key], value.cpu())


def test_a_numpy_view_of_the_host_weights_writes_through(sim_device):
    model, twin = make(), make().to(sim_device)
    x = torch.randn(3, 16).to(sim_device)
    engine = offload_engine.attach({"model": model}, "model")
    view = model[0].weight.detach().numpy()
    for _ in range(3):
        view *= np.float32(1.5)
        with torch.no_grad():
            twin[0].weight.mul_(1.5)
            assert torch.equal(model(x), twin(x))
        engine.release()


def test_inference_mode_weights_that_change_are_noticed(sim_device):
    with torch.inference_mode():
        model, twin = make(), make().to(sim_device)
        other = nn.Linear(16, 16)
        x = torch.randn(3, 16).to(sim_device)
        engine = offload_engine.attach({"model": model, "other": other}, "model->other")
        for _ in range(3):
            assert torch.equal(model(x), twin(x))
            model[0].weight.add_(1)  # counts no version
            twin[0].weight.add_(1)
            other(x)
            assert torch.equal(model(x), twin(x))
        engine.detach()


def test_unchanged_weights_never_travel_back(sim_device, meter):
    model, other = make(), nn.Linear(16, 16)
    x = torch.randn(3, 16).to(sim_device)
    offload_engine.attach({"model": model, "other": other}, "model->other")
    meter.read()
    with torch.no_grad():
        for _ in range(10):
            model(x), other(x)
    assert meter.read().d2h_nbytes == 0


def test_only_what_changed_travels_back(sim_device, meter):
    model, other = make(), nn.Linear(16, 16)
    x = torch.randn(3, 16).to(sim_device)
    engine = offload_engine.attach({"model": model, "other": other}, "model->other")
    with torch.no_grad():
        model(x)
        model[3].bias.add_(1)
        meter.read()
        other(x)
    assert meter.read().d2h_nbytes == model[3].bias.nbytes
    assert engine.report().components["model"].write_back_nbytes == model[3].bias.nbytes


def test_looking_at_a_weight_moves_no_weights(sim_device, meter):
    """A look cannot be told from a write until the contents are compared, by hashes."""
    model, other = make(), nn.Linear(16, 16)
    x = torch.randn(3, 16).to(sim_device)
    offload_engine.attach({"model": model, "other": other}, "model->other")
    model(x)
    _ = [p.data.norm() for p in model.parameters()]
    meter.read()
    other(x)
    moved = meter.read()
    assert moved.h2d_nbytes <= sum(p.nbytes for p in other.parameters()) + 512
    assert moved.d2h_nbytes <= 8 * len(list(model.parameters()))


def test_a_cast_in_the_middle_of_a_call_takes_effect_and_comes_back(sim_device, modules, x):
    """What upcast_vae does: to float32 before the decode, back to half after it."""
    vae = modules["vae"].to(torch.bfloat16)
    twin = copy.deepcopy(vae).to(sim_device)
    engine = offload_engine.attach(modules, "te->unet->vae")
    half = x.to(torch.bfloat16)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(vae(half), twin(half))
            vae.to(torch.float32), twin.to(torch.float32)
            assert torch.equal(vae(x), twin(x))
            modules["te"](x)
            assert torch.equal(vae(x), twin(x))
            vae.to(torch.bfloat16), twin.to(torch.bfloat16)
            engine.release()
    assert vae[0].weight.dtype == torch.bfloat16


def test_gradients_follow_their_weights(sim_device):
    model, other = make(), nn.Linear(16, 16)
    x = torch.randn(3, 16).to(sim_device)
    offload_engine.attach({"model": model, "other": other}, "model->other")
    with torch.autograd.set_multithreading_enabled(False):
        model(x).sum().backward()
    assert model[0].weight.grad.device == sim_device
    other(x)
    assert model[0].weight.grad.device.type == "cpu"
    torch.optim.SGD(model.parameters(), lr=0.1).step()
