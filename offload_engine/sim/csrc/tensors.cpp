#include "tensors.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/TensorImpl.h>

namespace sim {

namespace {

void delete_block(void* context) {
  std::lock_guard guard(machine().lock);
  device_memory().free(static_cast<Block*>(context));
}

Block* block_of(const c10::DataPtr& pointer) {
  if (pointer.get_deleter() == &delete_block) return static_cast<Block*>(pointer.get_context());
  return device_memory().find(pointer.get());
}

size_t span_nbytes(const at::Tensor& tensor) {
  if (tensor.numel() == 0) return 0;
  int64_t last = 0;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim)
    last += (tensor.size(dim) - 1) * tensor.stride(dim);
  return (last + 1) * tensor.itemsize();
}

c10::Storage poisoned_storage(size_t nbytes) {
  c10::Allocator* cpu = c10::GetCPUAllocator();
  c10::Storage bytes(c10::Storage::use_byte_size_t(), nbytes, cpu->allocate(nbytes), cpu, true);
  poison(bytes.mutable_data(), nbytes);
  return bytes;
}

}  // namespace

c10::DataPtr own(Block* block) {
  return {block->data, block, &delete_block,
          c10::Device(kSim, static_cast<c10::DeviceIndex>(block->device))};
}

c10::Storage storage_of(Block* block) {
  return c10::Storage(c10::Storage::use_byte_size_t(), block->nbytes, own(block),
                      device_allocator(), true);
}

at::Tensor make_sim_tensor(c10::Storage storage, const at::Tensor& like) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), like.dtype());
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.is_conj()) tensor._set_conj(true);
  if (like.is_neg()) tensor._set_neg(true);
  return tensor;
}

Region region_of(const at::Tensor& tensor) {
  const c10::Storage& storage = tensor.storage();
  const size_t nbytes = span_nbytes(tensor), itemsize = tensor.itemsize();
  const size_t offset = tensor.storage_offset() * itemsize;
  Block* block = block_of(storage.data_ptr());
  if (block) {
    const size_t base = static_cast<const char*>(storage.data()) - block->data;
    const size_t begin = base + offset, end = begin + nbytes;
    if (end <= block->nbytes && (nbytes == 0 || offset + nbytes <= storage.nbytes()))
      return {block, begin, end, block->bytes, static_cast<int64_t>(begin / itemsize)};
  }
  if (nbytes == 0) return {nullptr, 0, 0, poisoned_storage(0), 0};
  machine().violations.found(
      Check::UseAfterFree,
      "a tensor of " + std::to_string(nbytes) + " bytes on sim:" +
          std::to_string(tensor.device().index()) + " is used after its memory was " +
          (block || !storage.data() ? "shrunk to " + std::to_string(storage.nbytes()) + " bytes"
                                    : std::string("freed")) +
          ". Re-point every tensor that uses a block before giving it back.");
  return {nullptr, 0, 0, poisoned_storage(nbytes), 0};
}

at::Tensor cpu_alias(const at::Tensor& tensor, const Region& region) {
  auto alias = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(region.bytes), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  auto* impl = alias.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), region.offset);
  if (tensor.is_conj()) alias._set_conj(true);
  if (tensor.is_neg()) alias._set_neg(true);
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return alias;
}

}  // namespace sim
