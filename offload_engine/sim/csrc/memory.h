// Device memory: who owns each block, which bytes are used by whom, and how much is left.
//
// A block's bytes live in a CPU storage, so that CPU kernels can run on them in place. Each block
// has fresh bytes: reuse by a caching allocator is not acted out but modelled. Memory handed out
// may still be in use by earlier work of the stream that asks, so an allocation counts as a write
// on that stream; memory given back may be handed out again to that stream, so a free must be
// ordered after every use on other streams.
#pragma once

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Storage.h>

#include <deque>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "hazards.h"
#include "machine.h"

namespace sim {

struct Block {
  int device;
  Actor owner;  // the stream that was current at the allocation
  char* data;
  size_t nbytes;
  c10::Storage bytes;  // empty once a CPU kernel has replaced them
  Shadow shadow;
  ActorSet recorded = {};  // streams that record_stream() named
  int n_arriving = 0;      // copies to this block that have not landed
};

class DeviceMemory {
 public:
  using Stats = c10::CachingDeviceAllocator::DeviceStats;

  // Poisoned bytes on `owner`'s device. Throws c10::OutOfMemoryError over the capacity.
  Block* allocate(size_t nbytes, Actor owner);
  // A block around bytes that a CPU kernel has just written, as part of the access `by`.
  Block* adopt(c10::Storage bytes, Access by);
  void free(Block* block) noexcept;
  void record_stream(Block* block, Actor stream);

  // The live block that `address` lies in, or nullptr.
  Block* find(const void* address) const;
  bool was_freed(const void* address) const;

  const Stats& stats(int device) const { return stats_[device]; }
  // Calls `f` with each statistic that is kept.
  template <typename F>
  void for_each_stat(int device, F f) {
    Stats& stats = stats_[device];
    for (auto* array : {&stats.allocation, &stats.active, &stats.allocated_bytes,
                        &stats.requested_bytes, &stats.active_bytes, &stats.reserved_bytes})
      f((*array)[0]);  // the aggregate: there are no pools
  }
  size_t free_nbytes(int device) const;
  // From now, the `after`-th allocation fails, once.
  void inject_oom(int64_t after) { allocations_until_oom_ = after; }
  void reset();

 private:
  // A freed block that record_stream() keeps from reuse until `release_at`.
  struct Held {
    int device;
    size_t nbytes;
    Picoseconds release_at;
  };

  void charge(int device, size_t nbytes);
  void make_room(int device, size_t nbytes);
  void release_held(Picoseconds up_to);
  void refund(int device, size_t nbytes);
  void poison_and_keep(c10::Storage bytes);
  Block* add(c10::Storage bytes, Access by);

  std::map<const char*, std::unique_ptr<Block>> blocks_;  // by first byte
  std::deque<c10::Storage> freed_;  // poisoned and kept for a while: uses after free are seen
  size_t freed_nbytes_ = 0;
  std::vector<Held> held_;
  std::array<Stats, kDevices> stats_;
  int64_t allocations_until_oom_ = 0;
};

DeviceMemory& device_memory();
void poison(void* data, size_t nbytes);  // 0xFF: NaN in every float type

// One operator or copy at work on device memory: checks order, then notes the access.
class Work {
 public:
  Work(Actor stream, const char* what) : access_(machine().begin(stream, what)) {}

  void reads(Block* block, size_t begin, size_t end);
  void writes(Block* block, size_t begin, size_t end);
  const Access& access() const { return access_; }
  const VectorClock& clock() const { return machine().clock_of(access_.actor); }

 private:
  void report(const Block& block, size_t begin, size_t end, const Conflict& conflict, bool writes);

  Access access_;
};

}  // namespace sim
