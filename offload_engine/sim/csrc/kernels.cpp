#include "kernels.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/Resize.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_fused_sdp_choice.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "allocators.h"
#include "copies.h"
#include "tensors.h"

namespace sim {

namespace {

using at::IntArrayRef;
using at::Tensor;
template <typename T>
using Maybe = std::optional<T>;

const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

// ---- making tensors -----------------------------------------------------------------------------

void check_dense(Maybe<at::Layout> layout, Maybe<bool> pin_memory) {
  TORCH_CHECK(layout.value_or(at::kStrided) == at::kStrided, "sim has strided tensors only");
  TORCH_CHECK(!pin_memory.value_or(false), "Only dense CPU tensors can be pinned");
}

Tensor empty(IntArrayRef size, Maybe<at::ScalarType> dtype, Maybe<at::Layout> layout,
             Maybe<at::Device> device, Maybe<bool> pin_memory, Maybe<at::MemoryFormat> format) {
  check_dense(layout, pin_memory);
  const c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_generic(size, device_allocator(), kKeys,
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, Maybe<at::ScalarType> dtype,
                     Maybe<at::Layout> layout, Maybe<at::Device> device, Maybe<bool> pin_memory) {
  check_dense(layout, pin_memory);
  const c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_strided_generic(size, stride, device_allocator(), kKeys,
                                           c10::dtype_or_default(dtype));
}

// ---- copies -------------------------------------------------------------------------------------

// Same bytes in the same order: one transfer does it.
bool is_plain(const Tensor& to, const Tensor& from) {
  if (to.scalar_type() != from.scalar_type() || to.sizes() != from.sizes()) return false;
  if (to.is_conj() != from.is_conj() || to.is_neg() != from.is_neg()) return false;
  if (to.is_contiguous() && from.is_contiguous()) return true;
  return to.is_non_overlapping_and_dense() && to.strides() == from.strides();
}

// Between host and device, bytes only: what else is needed is done by the source's CPU or by a
// kernel on the device, as CUDA does it. The temporary on the host is not pinned.
void copy_in_two_steps(const Tensor& to, const Tensor& from, bool non_blocking) {
  const Tensor packed =
      (is_sim(from) ? from : from.to(to.scalar_type())).expand_as(to).resolve_conj().resolve_neg()
          .contiguous();
  if (is_sim(from)) {
    to.copy_(packed.cpu());
  } else if (to.is_contiguous()) {
    to.copy_(packed, non_blocking);
  } else {
    Tensor dense = at::empty_like(to, at::MemoryFormat::Contiguous);
    dense.copy_(packed, non_blocking);
    to.copy_(dense);
  }
}

struct Transfer {
  const Tensor& device_tensor;
  const Tensor& host_tensor;
  bool to_device;
  size_t nbytes;
};

// Queues a copy from or to pinned memory, or does one from or to pageable memory.
void transfer(const Transfer& job, bool non_blocking) {
  Machine& m = machine();
  const Actor stream = current_stream(job.device_tensor);
  Device& device = m.devices[device_of(stream)];
  Work work(stream, job.to_device ? "the copy to the device" : "the copy to the host");
  const Region region = region_of(job.device_tensor);
  job.to_device ? region.written_by(work) : region.read_by(work);
  m.violations.raise_unraised();

  char* device_data = static_cast<char*>(region.bytes.mutable_data()) +
                      region.offset * job.device_tensor.itemsize();
  char* host_data = static_cast<char*>(job.host_tensor.data_ptr());
  PinnedBlock* pinned = pinned_memory().find(host_data, job.nbytes);
  if (pinned) {
    Copy copy{work.access(), job.to_device, device_data, host_data, job.nbytes,
              job.to_device ? region.block : nullptr, pinned,
              is_kept_for_copies(job.host_tensor.storage()), 0, {}, false};
    if (!job.to_device) copy.staged.assign(device_data, device_data + job.nbytes);
    copies().queue(std::move(copy));
    m.violations.raise_unraised();
  } else {
    job.to_device ? std::memcpy(device_data, host_data, job.nbytes)
                  : std::memcpy(host_data, device_data, job.nbytes);
  }

  const Config& config = device.config;
  const double pinned_bandwidth = job.to_device ? config.h2d_bandwidth : config.d2h_bandwidth;
  m.run(stream, job.to_device ? device.h2d : device.d2h,
        transfer_time(job.nbytes, pinned ? pinned_bandwidth : config.pageable_bandwidth));
  Counters& counters = m.counters;
  (job.to_device ? counters.h2d_nbytes : counters.d2h_nbytes) += job.nbytes;
  ++(job.to_device ? counters.h2d_copies : counters.d2h_copies);
  counters.pageable_copies += !pinned;
  if (!pinned || !non_blocking) m.synchronize_always(stream);
}

// Each device's current stream waits for the other, and the source's does the copy.
void copy_between_devices(const Tensor& to, const Tensor& from) {
  if (!is_plain(to, from)) {
    Tensor packed = from.to(to.scalar_type()).expand_as(to).contiguous();
    Tensor dense = at::empty_like(to, at::MemoryFormat::Contiguous);
    copy_between_devices(dense, packed);
    to.copy_(dense);
    return;
  }
  std::lock_guard guard(machine().lock);
  Machine& m = machine();
  const Actor source = current_stream(from), target = current_stream(to);
  Event arrived;
  m.record(arrived, target);
  m.wait(source, arrived);
  Work work(source, "the copy between devices");
  const Region read = region_of(from), written = region_of(to);
  read.read_by(work);
  written.written_by(work);
  m.violations.raise_unraised();
  const size_t nbytes = to.numel() * to.itemsize();
  std::memcpy(static_cast<char*>(written.bytes.mutable_data()) + written.begin,
              static_cast<const char*>(read.bytes.data()) + read.begin, nbytes);
  Device &out = m.devices[device_of(source)], &in = m.devices[device_of(target)];
  m.run_between(source, out.d2h, in.h2d, transfer_time(nbytes, out.config.d2h_bandwidth));
  m.counters.d2d_nbytes += nbytes;
  m.record(arrived, source);
  m.wait(target, arrived);
}

// A kernel on the device.
void copy_on_device(const Tensor& to, const Tensor& from) {
  std::unique_lock guard(machine().lock);
  Work work(current_stream(to), "aten::copy_");
  const Region read = region_of(from), written = region_of(to);
  read.read_by(work);
  written.written_by(work);
  machine().violations.raise_unraised();
  Tensor alias = cpu_alias(to, written);
  const Tensor source = cpu_alias(from, read);
  const size_t nbytes = to.numel() * to.itemsize();
  machine().counters.d2d_nbytes += nbytes;
  machine().run_compute(work.access().actor, nbytes + from.numel() * from.itemsize());
  guard.unlock();
  const c10::impl::ExcludeDispatchKeyGuard below(
      c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset);
  alias.copy_(source);
}

Tensor& copy_(Tensor& to, const Tensor& from, bool non_blocking) {
  if (to.is_same(from) || to.numel() == 0) return to;
  TORCH_CHECK((is_sim(to) || to.is_cpu()) && (is_sim(from) || from.is_cpu()),
              "sim copies from and to the CPU only, not from ", from.device(), " to ",
              to.device());
  if (is_sim(to) && is_sim(from)) {
    to.device() == from.device() ? copy_on_device(to, from) : copy_between_devices(to, from);
  } else if (!is_plain(to, from)) {
    copy_in_two_steps(to, from, non_blocking);
  } else {
    std::lock_guard guard(machine().lock);
    const bool to_device = is_sim(to);
    const size_t nbytes = to.numel() * to.itemsize();
    transfer({to_device ? to : from, to_device ? from : to, to_device, nbytes}, non_blocking);
  }
  return to;
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  Tensor target = to;
  return copy_(target, from, non_blocking);
}

at::Scalar item(const Tensor& self) {
  const Actor stream = current_stream(self);
  Tensor alias;
  {
    std::lock_guard guard(machine().lock);
    Work work(stream, "aten::item");
    const Region region = region_of(self);
    region.read_by(work);
    machine().violations.raise_unraised();
    machine().synchronize_always(stream);
    alias = cpu_alias(self, region);
  }
  return at::_local_scalar_dense(alias);
}

// ---- storage ------------------------------------------------------------------------------------

const Tensor& resize_(const Tensor& self, IntArrayRef size, Maybe<at::MemoryFormat> format) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  if (format && *format != at::MemoryFormat::Preserve) impl->empty_tensor_restride(*format);
  const size_t nbytes = (self.numel() + self.storage_offset()) * self.itemsize();
  if (self.numel() > 0 && nbytes > self.storage().nbytes())
    resize_storage(self.storage().unsafeGetStorageImpl(), nbytes);
  return self;
}

Tensor& set_storage_and_shape(Tensor& self, at::Storage source, int64_t offset, IntArrayRef size,
                              IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  if (stride.empty() && !size.empty()) {
    impl->set_storage_offset(offset);
    impl->set_sizes_contiguous(size);
  } else {
    impl->set_sizes_and_strides(size, stride, offset);
  }
  const size_t needed = at::detail::computeStorageNbytes(self.sizes(), self.strides(),
                                                         self.itemsize(), offset);
  if (self.numel() > 0 && needed > self.storage().nbytes())
    resize_storage(self.storage().unsafeGetStorageImpl(), needed);
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage source) {
  const int64_t numel = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return set_storage_and_shape(self, std::move(source), 0, {numel}, {1});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  if (self.is_same(source)) return self;
  return set_storage_and_shape(self, source.storage(), source.storage_offset(), source.sizes(),
                               source.strides());
}

Tensor& set_empty(Tensor& self) {
  return set_tensor(self, at::empty({0}, self.options()));
}

void record_stream(Tensor& self, c10::Stream stream) {
  std::lock_guard guard(machine().lock);
  if (Block* block = region_of(self).block)
    device_memory().record_stream(block, to_actor(stream));
}

// `parameter.data = tensor` between the CPU and the device, both ways.
bool has_compatible_shallow_copy_type(const Tensor&, const Tensor&) { return true; }

// Attention runs the kernel that the CPU would choose. It is named for the CPU, but is dispatched.
int64_t choose_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                         const Maybe<Tensor>& mask, double dropout, bool is_causal,
                         Maybe<double> scale, bool enable_gqa) {
  return at::_fused_sdp_choice(query, key, value, mask, dropout, is_causal, scale, enable_gqa);
}

}  // namespace

void register_kernels() {
  at::native::_fused_sdp_choice_stub.set_privateuse1_dispatch_ptr(&choose_attention);
  static auto* aten = new torch::Library(torch::Library::IMPL, "aten",
                                         c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  aten->impl("empty.memory_format", TORCH_FN(empty));
  aten->impl("empty_strided", TORCH_FN(empty_strided));
  aten->impl("copy_", TORCH_FN(copy_));
  aten->impl("_copy_from", TORCH_FN(copy_from));
  aten->impl("_local_scalar_dense", TORCH_FN(item));
  aten->impl("resize_", TORCH_FN(resize_));
  aten->impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage_and_shape));
  aten->impl("set_.source_Storage", TORCH_FN(set_storage));
  aten->impl("set_.source_Tensor", TORCH_FN(set_tensor));
  aten->impl("set_", TORCH_FN(set_empty));
  aten->impl("record_stream", TORCH_FN(record_stream));
  aten->impl("_has_compatible_shallow_copy_type", TORCH_FN(has_compatible_shallow_copy_type));
  // A kernel of its own hides the operator's composite one from autograd, in some versions.
  static auto* autograd = new torch::Library(torch::Library::IMPL, "aten",
                                             c10::DispatchKey::AutogradPrivateUse1, __FILE__,
                                             __LINE__);
  autograd->impl("_has_compatible_shallow_copy_type", TORCH_FN(has_compatible_shallow_copy_type));
  aten->impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  aten->impl("view", TORCH_FN(at::native::view));
  aten->impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
}

}  // namespace sim
