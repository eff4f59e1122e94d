// Asynchronous copies between pinned host memory and a device.
//
// [Note: landing] A copy that is queued has not happened yet, and no one may count on it: its
// bytes arrive only when something is ordered after it. To the device that is the first operation
// on the destination block whose stream waited for the copy; to the host it is a synchronisation.
// Until then the destination holds what it held, and a copy to the host leaves poison.
//
// The source of a copy to the device must not change until the host knows that the copy is over,
// even when the device has already used what it brought. So a landed copy stays listed, with the
// checksum its source had when it was queued, until the host is ordered after it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <vector>

#include "memory.h"
#include "pinned.h"

namespace sim {

struct Copy {
  Access access;
  bool to_device;
  char* device_data;
  char* host_data;
  size_t nbytes;
  Block* device_block;       // of a copy to the device; nullptr once it is freed
  PinnedBlock* host_block;
  bool host_is_kept;         // freeing the host memory waits for this copy, as torch arranges
                             // for tensors it pinned itself but not for other views of that memory
  uint64_t checksum = 0;     // to the device: of the source, when queued
  std::vector<char> staged;  // to the host: the source, as the stream saw it
  bool has_landed = false;
};

class Copies {
 public:
  void queue(Copy copy);
  // Copies into `block` that `clock` covers arrive.
  void land_on(Block& block, const VectorClock& clock);
  // Copies that the host is ordered after arrive and are over.
  void settle();
  void device_block_freed(Block& block, const VectorClock& owner);
  // True if the memory must stay until a copy has landed.
  bool pinned_block_freed(const PinnedBlock& block);

 private:
  using Position = std::list<Copy>::iterator;

  void land(Copy& copy);
  void check_source(Copy& copy);
  void make_way_for(const Copy& next, const VectorClock& clock);
  Position remove(Position copy);

  std::list<Copy> in_flight_;  // in the order of their queueing, which is an order they can run in
};

Copies& copies();

}  // namespace sim
