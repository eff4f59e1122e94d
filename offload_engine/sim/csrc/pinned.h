// Pinned host memory: allocated by torch's `pin_memory`, or anyone's memory that was registered.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>

#include "hazards.h"

namespace sim {

struct PinnedBlock {
  char* data;
  size_t nbytes;
  bool is_ours;           // allocated here, not registered
  bool is_freed = false;  // kept only until the copies in flight have landed
  Shadow shadow;          // by copies; what the host does to it is seen only by checksum
};

class PinnedMemory {
 public:
  // Throws c10::Error over the limit, as cudaHostAlloc fails.
  PinnedBlock* allocate(size_t nbytes);
  void free(PinnedBlock* block) noexcept;
  // Page-lock memory that somebody else owns, as cudaHostRegister does, and let go of it.
  void register_range(void* data, size_t nbytes);
  void unregister_range(void* data);

  // The block that holds all of [data, data + nbytes), or nullptr.
  PinnedBlock* find(const void* data, size_t nbytes) const;
  // Tells that no copy uses the freed block any more.
  void release(PinnedBlock* block);

  int64_t nbytes() const { return nbytes_; }
  void set_limit(int64_t nbytes) { limit_nbytes_ = nbytes; }
  void inject_failure(int64_t after) { requests_until_failure_ = after; }
  void reset();

 private:
  void charge(size_t nbytes);
  PinnedBlock* add(char* data, size_t nbytes, bool is_ours);

  std::map<const char*, std::unique_ptr<PinnedBlock>> blocks_;
  int64_t nbytes_ = 0;
  int64_t limit_nbytes_ = INT64_MAX;
  int64_t requests_until_failure_ = 0;
};

PinnedMemory& pinned_memory();

}  // namespace sim
