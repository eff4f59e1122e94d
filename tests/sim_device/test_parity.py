"""Every result on the device is the CPU's, bit for bit; so are gradients and optimizer steps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from offload_engine import sim

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def same(here, there) -> bool:
    if isinstance(here, torch.Tensor):
        return torch.equal(here, there.cpu()) and here.dtype == there.dtype
    return all(same(a, b) for a, b in zip(here, there, strict=True))


def check(function, *inputs):
    """``function`` on the CPU and on the device; equal bits, shapes and strides."""
    here = function(*inputs)
    there = function(*(x.to("sim") if isinstance(x, torch.Tensor) else x for x in inputs))
    assert same(here, there)
    if isinstance(here, torch.Tensor):
        assert here.stride() == there.stride() and there.device.type == "sim"


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


OPERATORS = {
    "linear": lambda x: F.linear(x, x[0, :8], x[0, :8, 0]),
    "matmul": lambda x: x @ x.transpose(-1, -2),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "group_norm": lambda x: F.group_norm(x, 2),
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:]),
    "softmax": lambda x: x.softmax(-1),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    "masked attention": lambda x: F.scaled_dot_product_attention(
        x[None], x[None], x[None], attn_mask=torch.ones(16, 16, dtype=bool, device=x.device).tril()
    ),
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "interpolate": lambda x: F.interpolate(x[None], scale_factor=2.0, mode="nearest"),
    "pad": lambda x: F.pad(x, (1, 1)),
    "cat and chunk": lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
    "in place": lambda x: x.clone().mul_(2).add_(x, alpha=3).clamp_(-1, 1),
    "reductions": lambda x: [x.sum(), x.mean(-1), x.std(), x.max(-1).values, x.argmax()],
    "indexing": lambda x: [x[..., 1], x[x > 0], x[[1, 0]], x.gather(-1, x.argsort(-1))],
    "dtypes": lambda x: [x.to(torch.float64), x.int(), x > 0, x.long() // 2],
    "strides": lambda x: [x.permute(2, 0, 1), x.flip(0), x.unfold(-1, 4, 2), x.expand(2, *x.shape)],
    "foreach": lambda x: torch._foreach_add(list(x), list(x), alpha=2),
    "where": lambda x: torch.where(x > 0, x, torch.tensor(0.0, dtype=x.dtype)),
    "einsum": lambda x: torch.einsum("bij,bkj->bik", x, x),
    "cumsum and sort": lambda x: [x.cumsum(-1), *x.sort(-1)],
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_gives_the_bits_of_the_cpu(name, dtype):
    check(OPERATORS[name], randn(4, 16, 16, dtype=dtype))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_convolution_block_gives_the_bits_of_the_cpu(layout, dtype):
    x = randn(2, 8, 16, 16, dtype=dtype).to(memory_format=layout)
    w = randn(8, 8, 3, 3, dtype=dtype).to(memory_format=layout)
    check(lambda x, w: F.group_norm(F.conv2d(x, w, padding=1), 2), x, w)
    check(lambda x, w: F.conv_transpose2d(x, w, stride=2), x, w)
    check(lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"), x)


def test_fft_and_complex_numbers_give_the_bits_of_the_cpu():
    x = randn(4, 16, 16)
    check(lambda x: torch.fft.ifftn(torch.fft.fftshift(torch.fft.fftn(x))).real, x)
    check(lambda x: torch.view_as_real(torch.polar(x, x).conj() * 2), x)
    check(lambda x: torch.fft.fftn(x).conj().to("cpu", copy=True).imag.contiguous().to(x.device), x)


def test_embedding_and_integers_give_the_bits_of_the_cpu():
    check(F.embedding, torch.arange(12).view(3, 4), randn(12, 8))
    check(lambda i: [i + 1, i * i, i.bitwise_and(3), i.unique()], torch.arange(12))


def test_out_arguments_give_the_bits_of_the_cpu():
    def run(x):
        out = torch.empty_like(x)
        torch.add(x, x, out=out)
        torch.mul(x, out, out=out[:])
        return out

    check(run, randn(4, 4))


def test_dropout_draws_as_on_the_cpu():
    def run(x):
        torch.manual_seed(0)
        return F.dropout(x, 0.5)

    check(run, randn(4, 16))


# ---- training ------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.heads = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        x = F.silu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        return self.out(x + self.heads(x, x, x, need_weights=False)[0])


def trained(device, **options) -> list[torch.Tensor]:
    torch.manual_seed(0)
    net = Net().to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, **options)
    for _ in range(3):
        loss = net(randn(2, 3, 8, 8).to(device)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [loss.detach(), *(p.detach() for p in net.parameters())]


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_training_gives_the_bits_of_the_cpu(options):
    assert same(trained("cpu", **options), trained("sim", **options))
    assert not sim.violations()


def test_backward_on_a_side_stream_is_ordered(device):
    side = torch.Stream(device=device)
    w = torch.ones(8, device=device, requires_grad=True)
    side.wait_event(torch.accelerator.current_stream().record_event())
    with side:
        loss = (w * 3).sum()
        loss.backward()
    torch.accelerator.current_stream().wait_event(side.record_event())
    assert w.grad.tolist() == [3.0] * 8
    w.grad.record_stream(torch.accelerator.current_stream())


def test_gradients_cross_from_the_device_to_the_cpu(device):
    w = torch.ones(4, requires_grad=True)
    (w.to(device) * 2).cpu().sum().backward()
    assert w.grad.tolist() == [2.0] * 4


def test_a_gradient_checkpoint_recomputes(device):
    from torch.utils.checkpoint import checkpoint

    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).to(device)
    checkpoint(net, torch.ones(2, 4, device=device), use_reentrant=False).sum().backward()
    assert net[0].weight.grad.shape == (4, 4)
