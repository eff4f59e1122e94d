import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from offload_engine.segments import TypedFlat, layout, scan, sharing, stack


def round_trip(tensors):
    """The tensors laid out in one flat buffer and filled from the originals."""
    nbytes, views = layout(tensors)
    flat = TypedFlat(torch.zeros(nbytes, dtype=torch.uint8))
    copies = [view.on(flat) for view in views]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor) if 0 not in tensor.stride() else copy[:1].copy_(tensor[:1])
    return nbytes, copies


def test_strides_dtypes_and_values_survive():
    tensors = [
        torch.randn(3, 5, 7, 2).to(memory_format=torch.channels_last),
        torch.randn(4, 6).t(),
        torch.randn(33, dtype=torch.bfloat16),
        torch.randint(0, 9, (5,), dtype=torch.int64),
        torch.tensor(3.5, dtype=torch.float64),
        torch.empty(0, 4),
        torch.randn(1, 6).expand(5, 6),
    ]
    _, copies = round_trip(tensors)
    for copy, tensor in zip(copies, tensors, strict=True):
        assert copy.stride() == tensor.stride() and copy.dtype == tensor.dtype
        assert torch.equal(copy, tensor)


def test_aliases_stay_aliases_and_cost_their_bytes_once():
    whole = torch.randn(64, 64)
    nbytes, copies = round_trip([whole, whole[:8], whole.view(-1)[100:200]])
    assert nbytes == whole.nbytes
    copies[1].fill_(7.0)
    assert (copies[0][:8] == 7.0).all()


def test_nothing_is_lost_to_padding_but_for_large_tensors_of_odd_size():
    tensors = [torch.randn(n) for n in (1, 10, 100, 1024, 10_240, 3, 96) for _ in range(5)]
    nbytes, _ = layout(tensors)
    assert nbytes == sum(t.nbytes for t in tensors)


def test_large_tensors_are_aligned_for_matrix_kernels():
    _, views = layout([torch.randn(n) for n in (3, 5120, 77, 4099, 1031, 640)])
    assert all(v.span_start % 64 == 0 for v in views if v.span_nbytes >= 4096)
    assert all(v.span_start % 256 == 0 for v in views if v.span_nbytes % 256 == 0)
    assert all(v.span_start % 4 == 0 for v in views)


def test_tied_parameters_are_found_once():
    module = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    module["b"].weight = module["a"].weight
    module.register_buffer("c", torch.ones(3))
    assert len(scan([module]).tensors) == 4


def test_modules_that_share_weights_are_grouped():
    a, b, c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    assert sharing([a, c, b]) == [[0, 2], [1]]
    d = nn.Linear(4, 4)
    d.bias.data = c.bias.data  # another Parameter, the same bytes
    assert sharing([a, c, d]) == [[0], [1, 2]]
    assert sharing([a, a]) == [[0, 1]]


def test_neighbours_in_one_storage_do_not_share():
    a, b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    storage = torch.randn(32)
    a.weight.data, b.weight.data = storage[:16].view(4, 4), storage[16:].view(4, 4)
    assert sharing([a, b]) == [[0], [1]]


def test_buffers_stack_on_aligned_starts():
    assert stack([16, 512, 0, 48]) == (816, [0, 256, 768, 768])


@settings(deadline=None)
@given(st.data())
def test_any_views_of_shared_storages_keep_their_aliasing(data):
    """Random windows into a few storages: equal bytes before are equal bytes after."""
    storages = [torch.arange(n, dtype=torch.float32) for n in (64, 96)]
    tensors = []
    for _ in range(data.draw(st.integers(1, 8))):
        storage = data.draw(st.sampled_from(storages))
        start = data.draw(st.integers(0, len(storage) - 1))
        stop = data.draw(st.integers(start + 1, len(storage)))
        tensors.append(storage[start : stop : data.draw(st.integers(1, 3))])
    _, copies = round_trip(tensors)
    for i, left in enumerate(tensors):
        for j, right in enumerate(tensors):
            offset = copies[i].data_ptr() - copies[j].data_ptr()
            near = abs(left.data_ptr() - right.data_ptr()) < 256
            same = left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
            overlap = same and near and _overlaps(left, right)
            if overlap:
                assert offset == left.data_ptr() - right.data_ptr()


def _overlaps(left, right):
    def span(t):
        return t.data_ptr(), t.data_ptr() + ((t.numel() - 1) * t.stride(0) + 1) * 4

    (a, b), (c, d) = span(left), span(right)
    return a < d and c < b
