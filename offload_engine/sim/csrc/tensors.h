// Between torch's tensors and the simulator's blocks.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/Storage.h>

#include "memory.h"

namespace sim {

constexpr c10::DeviceType kSim = c10::DeviceType::PrivateUse1;

inline bool is_sim(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == kSim;
}

// The stream that is current on `device` in this thread.
Actor current_stream(int device);
inline Actor current_stream(const at::Tensor& tensor) {
  return current_stream(tensor.device().index());
}
c10::Stream to_stream(Actor stream);
Actor to_actor(const c10::Stream& stream);

c10::Allocator* device_allocator();
// A storage on the device that owns `block`.
c10::DataPtr own(Block* block);
c10::Storage storage_of(Block* block);
at::Tensor make_sim_tensor(c10::Storage storage, const at::Tensor& like);

// The bytes that a device tensor spans. Without a block they are no longer there, which has been
// reported; then `bytes` is poison.
struct Region {
  Block* block = nullptr;
  size_t begin = 0, end = 0;
  c10::Storage bytes;
  int64_t offset = 0;  // in elements, in `bytes`

  void read_by(Work& work) const {
    if (block && end > begin) work.reads(block, begin, end);
  }
  void written_by(Work& work) const {
    if (block && end > begin) work.writes(block, begin, end);
  }
};
Region region_of(const at::Tensor& tensor);
// The same bytes as a CPU tensor.
at::Tensor cpu_alias(const at::Tensor& tensor, const Region& region);

// True if `storage` holds pinned memory that torch allocated and so keeps for its copies.
bool is_kept_for_copies(const c10::Storage& storage);

}  // namespace sim
