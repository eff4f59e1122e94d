#include "pinned.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>

#include "copies.h"
#include "machine.h"

namespace sim {

namespace {
constexpr size_t kPage = 4096;
}

PinnedMemory& pinned_memory() {
  static PinnedMemory* memory = new PinnedMemory;
  return *memory;
}

void PinnedMemory::charge(size_t nbytes) {
  const bool is_injected = requests_until_failure_ > 0 && --requests_until_failure_ == 0;
  TORCH_CHECK(!is_injected, "sim error: pinning ", nbytes, " bytes failed (injected)");
  TORCH_CHECK(nbytes_ + static_cast<int64_t>(nbytes) <= limit_nbytes_,
              "sim error: out of memory: cannot pin ", nbytes, " bytes, ", nbytes_, " of ",
              limit_nbytes_, " bytes are pinned already");
  nbytes_ += nbytes;
  Counters& counters = machine().counters;
  counters.pinned_nbytes = nbytes_;
  counters.peak_pinned_nbytes = std::max(counters.peak_pinned_nbytes, nbytes_);
}

PinnedBlock* PinnedMemory::add(char* data, size_t nbytes, bool is_ours) {
  auto block = std::make_unique<PinnedBlock>(
      PinnedBlock{data, nbytes, is_ours, false, Shadow(nbytes, Access{})});
  return (blocks_[data] = std::move(block)).get();
}

PinnedBlock* PinnedMemory::allocate(size_t nbytes) {
  charge(nbytes);
  const size_t rounded = (nbytes + kPage - 1) / kPage * kPage;
  char* data = static_cast<char*>(std::aligned_alloc(kPage, rounded));
  TORCH_CHECK(data, "sim error: no host memory for ", nbytes, " pinned bytes");
  return add(data, nbytes, true);
}

void PinnedMemory::free(PinnedBlock* block) noexcept {
  block->is_freed = true;
  if (!copies().pinned_block_freed(*block)) release(block);
}

void PinnedMemory::release(PinnedBlock* block) {
  nbytes_ -= block->nbytes;
  machine().counters.pinned_nbytes = nbytes_;
  if (block->is_ours) std::free(block->data);
  blocks_.erase(block->data);
}

void PinnedMemory::register_range(void* data, size_t nbytes) {
  auto next = blocks_.lower_bound(static_cast<char*>(data) + nbytes);
  const bool overlaps =
      next != blocks_.begin() &&
      std::prev(next)->second->data + std::prev(next)->second->nbytes > static_cast<char*>(data);
  TORCH_CHECK(!overlaps, "sim error: part or all of the memory is already pinned");
  charge(nbytes);
  add(static_cast<char*>(data), nbytes, false);
}

void PinnedMemory::unregister_range(void* data) {
  auto found = blocks_.find(static_cast<char*>(data));
  TORCH_CHECK(found != blocks_.end() && !found->second->is_ours,
              "sim error: the memory was not registered");
  free(found->second.get());
}

PinnedBlock* PinnedMemory::find(const void* data, size_t nbytes) const {
  const char* at = static_cast<const char*>(data);
  auto next = blocks_.upper_bound(at);
  if (next == blocks_.begin()) return nullptr;
  PinnedBlock* block = std::prev(next)->second.get();
  return !block->is_freed && at + nbytes <= block->data + block->nbytes ? block : nullptr;
}

void PinnedMemory::reset() {
  limit_nbytes_ = INT64_MAX;
  requests_until_failure_ = 0;
}

}  // namespace sim
