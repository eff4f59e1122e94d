#include "memory.h"

#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>

#include "copies.h"

namespace sim {

namespace {

constexpr size_t kKeepFreedNbytes = size_t{16} << 20;
constexpr size_t kAggregate = 0;

std::string range_text(const Block& block, size_t begin, size_t end) {
  return "bytes " + std::to_string(begin) + ".." + std::to_string(end) + " of a block of " +
         std::to_string(block.nbytes) + " bytes";
}

std::string access_text(const Conflict& conflict) {
  const Access& access = conflict.earlier;
  return std::string(conflict.earlier_wrote ? "the write by " : "the read by ") + access.what +
         " on " + name_of(access.actor);
}

bool holds(const c10::Storage& storage, const char* address) {
  const char* begin = static_cast<const char*>(storage.data());
  return begin <= address && address < begin + storage.nbytes();
}

}  // namespace

DeviceMemory& device_memory() {
  static DeviceMemory* memory = new DeviceMemory;
  return *memory;
}

void poison(void* data, size_t nbytes) { std::memset(data, 0xFF, nbytes); }

// ---- allocation ---------------------------------------------------------------------------------

Block* DeviceMemory::allocate(size_t nbytes, Actor owner) {
  const Access by = machine().begin(owner, "its allocation");
  charge(device_of(owner), nbytes);
  c10::Allocator* cpu = c10::GetCPUAllocator();
  c10::Storage bytes(c10::Storage::use_byte_size_t(), nbytes, cpu->allocate(nbytes), cpu, true);
  poison(bytes.mutable_data(), nbytes);
  return add(std::move(bytes), by);
}

Block* DeviceMemory::adopt(c10::Storage bytes, Access by) {
  charge(device_of(by.actor), bytes.nbytes());
  return add(std::move(bytes), by);
}

Block* DeviceMemory::add(c10::Storage bytes, Access by) {
  char* data = static_cast<char*>(bytes.mutable_data());
  const size_t nbytes = bytes.nbytes();
  auto block = std::make_unique<Block>(Block{device_of(by.actor), by.actor, data, nbytes,
                                             std::move(bytes), Shadow(nbytes, by)});
  return (blocks_[data] = std::move(block)).get();
}

void DeviceMemory::charge(int device, size_t nbytes) {
  make_room(device, nbytes);
  Stats& stats = stats_[device];
  stats.allocation[kAggregate].increase(1);
  stats.active[kAggregate].increase(1);
  stats.allocated_bytes[kAggregate].increase(nbytes);
  stats.requested_bytes[kAggregate].increase(nbytes);
  stats.active_bytes[kAggregate].increase(nbytes);
  stats.reserved_bytes[kAggregate].increase(nbytes);
  ++machine().counters.allocations;
}

size_t DeviceMemory::free_nbytes(int device) const {
  const int64_t capacity = machine().devices[device].config.capacity_nbytes;
  return std::max<int64_t>(0, capacity - stats_[device].active_bytes[kAggregate].current);
}

void DeviceMemory::make_room(int device, size_t nbytes) {
  release_held(machine().host.time);
  if (nbytes > free_nbytes(device) && !held_.empty()) {
    // As a caching allocator does before it gives up: wait for the streams that hold memory.
    ++stats_[device].num_sync_all_streams;
    machine().synchronize_device(device);
    release_held(machine().host.time);
  }
  const bool is_injected = allocations_until_oom_ > 0 && --allocations_until_oom_ == 0;
  if (nbytes <= free_nbytes(device) && !is_injected) return;
  ++stats_[device].num_ooms;
  using c10::CachingAllocator::format_size;
  TORCH_CHECK_WITH(
      OutOfMemoryError, false, "sim out of memory",
      is_injected ? " (injected)" : "", ". Tried to allocate ", format_size(nbytes), " (", nbytes,
      " bytes). sim:", device, " has a capacity of ",
      format_size(machine().devices[device].config.capacity_nbytes), " of which ",
      format_size(free_nbytes(device)), " is free and ",
      format_size(stats_[device].allocated_bytes[kAggregate].current), " is allocated.");
}

// ---- free ---------------------------------------------------------------------------------------

void DeviceMemory::free(Block* block) noexcept {
  VectorClock clock = machine().clock_of(block->owner);
  if (auto conflict = block->shadow.unordered(clock, block->recorded))
    machine().violations.found(
        Check::UnorderedFree,
        "a block of " + std::to_string(block->nbytes) + " bytes allocated on " +
            name_of(block->owner) + " is freed while " + access_text(*conflict) +
            " may still be going on. Order " + name_of(block->owner) +
            " after it with an event, call record_stream, or wait for it before dropping the "
            "last reference.");
  copies().device_block_freed(*block, clock);

  Stats& stats = stats_[block->device];
  stats.allocation[kAggregate].decrease(1);
  stats.allocated_bytes[kAggregate].decrease(block->nbytes);
  stats.requested_bytes[kAggregate].decrease(block->nbytes);
  Picoseconds release_at = 0;
  for (Actor stream = 0; stream < kActors; ++stream)
    if (block->recorded.test(stream)) {
      Event event;
      machine().record(event, stream);
      release_at = std::max(release_at, event.time);
    }
  if (release_at > machine().host.time)
    held_.push_back({block->device, block->nbytes, release_at});
  else
    refund(block->device, block->nbytes);
  if (block->bytes) poison_and_keep(std::move(block->bytes));
  blocks_.erase(block->data);
}

void DeviceMemory::refund(int device, size_t nbytes) {
  Stats& stats = stats_[device];
  stats.active[kAggregate].decrease(1);
  stats.active_bytes[kAggregate].decrease(nbytes);
  stats.reserved_bytes[kAggregate].decrease(nbytes);
}

void DeviceMemory::release_held(Picoseconds up_to) {
  auto is_due = [&](const Held& held) { return held.release_at <= up_to; };
  for (const Held& held : held_)
    if (is_due(held)) refund(held.device, held.nbytes);
  held_.erase(std::remove_if(held_.begin(), held_.end(), is_due), held_.end());
}

void DeviceMemory::poison_and_keep(c10::Storage bytes) {
  poison(bytes.mutable_data(), bytes.nbytes());
  freed_nbytes_ += bytes.nbytes();
  freed_.push_back(std::move(bytes));
  while (freed_nbytes_ > kKeepFreedNbytes) {
    freed_nbytes_ -= freed_.front().nbytes();
    freed_.pop_front();
  }
}

void DeviceMemory::record_stream(Block* block, Actor stream) {
  ++machine().counters.record_stream_calls;
  if (stream != block->owner) block->recorded.set(stream);
}

Block* DeviceMemory::find(const void* address) const {
  auto next = blocks_.upper_bound(static_cast<const char*>(address));
  if (next == blocks_.begin()) return nullptr;
  Block* block = std::prev(next)->second.get();
  return static_cast<const char*>(address) < block->data + block->nbytes ? block : nullptr;
}

bool DeviceMemory::was_freed(const void* address) const {
  const char* at = static_cast<const char*>(address);
  return std::any_of(freed_.begin(), freed_.end(),
                     [&](const c10::Storage& bytes) { return holds(bytes, at); });
}

void DeviceMemory::reset() {
  release_held(INT64_MAX);
  allocations_until_oom_ = 0;
  for (int device = 0; device < kDevices; ++device) {
    for_each_stat(device, [](c10::CachingAllocator::Stat& stat) {
      stat.reset_peak();
      stat.reset_accumulated();
    });
    stats_[device].num_ooms = stats_[device].num_sync_all_streams = 0;
  }
}

// ---- use ----------------------------------------------------------------------------------------

void Work::reads(Block* block, size_t begin, size_t end) {
  if (auto conflict = block->shadow.read(begin, end, access_, clock()))
    report(*block, begin, end, *conflict, false);
  copies().land_on(*block, clock());
}

void Work::writes(Block* block, size_t begin, size_t end) {
  if (auto conflict = block->shadow.write(begin, end, access_, clock()))
    report(*block, begin, end, *conflict, true);
  copies().land_on(*block, clock());
}

void Work::report(const Block& block, size_t begin, size_t end, const Conflict& conflict,
                  bool writes) {
  const Actor mine = access_.actor, theirs = conflict.earlier.actor;
  machine().violations.found(
      writes ? Check::UnorderedWrite : Check::UnorderedRead,
      std::string(access_.what) + " on " + name_of(mine) + (writes ? " writes " : " reads ") +
          range_text(block, begin, end) + " but is not ordered after " + access_text(conflict) +
          ". Record an event on " + name_of(theirs) + " after it and let " + name_of(mine) +
          " wait for that event.");
}

}  // namespace sim
