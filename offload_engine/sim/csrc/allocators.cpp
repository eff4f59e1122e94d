// Device and pinned memory as torch's allocators.
#include <ATen/core/CachingHostAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>

#include "allocators.h"
#include "pinned.h"
#include "tensors.h"

namespace sim {

namespace {

struct SimAllocator final : c10::DeviceAllocator {
  bool initialized() override { return true; }

  c10::DataPtr allocate(size_t nbytes) override {
    const int device = current_device();
    if (nbytes == 0) return {nullptr, c10::Device(kSim, static_cast<c10::DeviceIndex>(device))};
    std::lock_guard guard(machine().lock);
    return own(device_memory().allocate(nbytes, current_stream(device)));
  }

  void copy_data(void* to, const void* from, size_t nbytes) const override {
    default_copy_data(to, from, nbytes);
  }

  void emptyCache(c10::MempoolId_t) override {
    std::lock_guard guard(machine().lock);
    ++machine().counters.empty_cache_calls;
  }

  void recordStream(const c10::DataPtr& pointer, c10::Stream stream) override {
    std::lock_guard guard(machine().lock);
    if (Block* block = device_memory().find(pointer.get()))
      device_memory().record_stream(block, to_actor(stream));
  }

  DeviceMemory::Stats getDeviceStats(c10::DeviceIndex device) override {
    std::lock_guard guard(machine().lock);
    return device_memory().stats(device);
  }

  void resetAccumulatedStats(c10::DeviceIndex device) override {
    std::lock_guard guard(machine().lock);
    for_each_stat(device, [](Stat& stat) { stat.reset_accumulated(); });
  }

  void resetPeakStats(c10::DeviceIndex device) override {
    std::lock_guard guard(machine().lock);
    for_each_stat(device, [](Stat& stat) { stat.reset_peak(); });
  }

  // Overrides from torch 2.10 on.
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) {
    std::lock_guard guard(machine().lock);
    return {device_memory().free_nbytes(device),
            machine().devices[device].config.capacity_nbytes};
  }

 private:
  using Stat = c10::CachingAllocator::Stat;

  template <typename F>
  void for_each_stat(int device, F f) {
    device_memory().for_each_stat(device, f);
  }
};

void delete_pinned(void* context) {
  std::lock_guard guard(machine().lock);
  pinned_memory().free(static_cast<PinnedBlock*>(context));
}

struct SimHostAllocator final : at::HostAllocator {
  c10::DataPtr allocate(size_t nbytes) override {
    if (nbytes == 0) return {nullptr, c10::DeviceType::CPU};
    std::lock_guard guard(machine().lock);
    PinnedBlock* block = pinned_memory().allocate(nbytes);
    return {block->data, block, &delete_pinned, c10::DeviceType::CPU};
  }

  void copy_data(void* to, const void* from, size_t nbytes) const override {
    default_copy_data(to, from, nbytes);
  }

  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}

  at::HostStats get_stats() override {
    std::lock_guard guard(machine().lock);
    at::HostStats stats;
    stats.allocated_bytes.current = machine().counters.pinned_nbytes;
    stats.allocated_bytes.peak = machine().counters.peak_pinned_nbytes;
    return stats;
  }
};

SimAllocator* the_device_allocator() {
  static auto* allocator = new SimAllocator;
  return allocator;
}

}  // namespace

c10::Allocator* device_allocator() { return the_device_allocator(); }

at::HostAllocator* host_allocator() {
  static auto* allocator = new SimHostAllocator;
  return allocator;
}

bool is_kept_for_copies(const c10::Storage& storage) {
  return storage.data_ptr().get_deleter() == &delete_pinned;
}

void resize_storage(c10::StorageImpl* storage, size_t nbytes) {
  std::lock_guard guard(machine().lock);
  const int device = storage->device().index();
  c10::DataPtr fresh{nullptr, storage->device()};
  if (nbytes) {
    Block* to = device_memory().allocate(nbytes, current_stream(device));
    fresh = own(to);
    Block* from = device_memory().find(storage->data());
    if (const size_t kept = from ? std::min(nbytes, storage->nbytes()) : 0) {
      Work work(current_stream(device), "resize_");
      const size_t begin = static_cast<const char*>(storage->data()) - from->data;
      work.reads(from, begin, begin + kept);
      work.writes(to, 0, kept);
      std::memcpy(to->data, storage->data(), kept);
      machine().run_compute(work.access().actor, 2 * kept);
    }
  }
  storage->set_data_ptr_noswap(std::move(fresh));
  storage->set_nbytes(nbytes);
}

void register_allocators() {
  c10::SetAllocator(kSim, device_allocator());
  at::setHostAllocator(kSim, host_allocator());
}

}  // namespace sim
