#include "copies.h"

#include <cstring>

namespace sim {

namespace {

uint64_t checksum(const char* data, size_t nbytes) {
  // Four independent lanes of multiply and rotate: runs at memory speed.
  constexpr uint64_t kPrime = 0x9E3779B97F4A7C15;
  uint64_t lanes[4] = {1, 2, 3, 4};
  auto mix = [](uint64_t lane, uint64_t word) {
    lane = (lane ^ word) * kPrime;
    return lane << 31 | lane >> 33;
  };
  size_t at = 0;
  for (; at + sizeof lanes <= nbytes; at += sizeof lanes)
    for (int i = 0; i < 4; ++i) {
      uint64_t word;
      std::memcpy(&word, data + at + 8 * i, 8);
      lanes[i] = mix(lanes[i], word);
    }
  for (; at < nbytes; ++at) lanes[0] = mix(lanes[0], static_cast<unsigned char>(data[at]));
  return mix(mix(mix(lanes[0], lanes[1]), lanes[2]), lanes[3]);
}

}  // namespace

Copies& copies() {
  static Copies* the_copies = new Copies;
  return *the_copies;
}

void Copies::queue(Copy copy) {
  const VectorClock& clock = machine().clock_of(copy.access.actor);
  make_way_for(copy, clock);
  const size_t begin = copy.host_data - copy.host_block->data, end = begin + copy.nbytes;

  Shadow& shadow = copy.host_block->shadow;
  auto conflict = copy.to_device ? shadow.read(begin, end, copy.access, clock)
                                 : shadow.write(begin, end, copy.access, clock);
  if (conflict)
    machine().violations.found(
        copy.to_device ? Check::UnorderedRead : Check::UnorderedWrite,
        std::string(copy.access.what) + " on " + name_of(copy.access.actor) + " uses " +
            std::to_string(copy.nbytes) + " bytes of pinned memory but is not ordered after " +
            conflict->earlier.what + " on " + name_of(conflict->earlier.actor) +
            ". Let one stream wait for an event of the other.");

  if (copy.to_device)
    copy.checksum = checksum(copy.host_data, copy.nbytes);
  else
    poison(copy.host_data, copy.nbytes);
  if (copy.device_block) ++copy.device_block->n_arriving;
  in_flight_.push_back(std::move(copy));
}

void Copies::check_source(Copy& copy) {
  const uint64_t now = checksum(copy.host_data, copy.nbytes);
  if (now == copy.checksum) return;
  copy.checksum = now;  // say it once
  machine().violations.found(
      Check::SourceChanged,
      "the pinned source of " + std::string(copy.access.what) + " (" +
          std::to_string(copy.nbytes) + " bytes) on " + name_of(copy.access.actor) +
          " changed before the host knew that the copy was over. Synchronise with an event "
          "recorded after the copy before writing to its source.");
}

void Copies::land(Copy& copy) {
  if (copy.has_landed) return;
  copy.has_landed = true;
  if (!copy.to_device) {
    std::memcpy(copy.host_data, copy.staged.data(), copy.nbytes);
    return;
  }
  check_source(copy);
  if (!copy.device_block) return;
  --copy.device_block->n_arriving;
  std::memcpy(copy.device_data, copy.host_data, copy.nbytes);
}

Copies::Position Copies::remove(Position copy) {
  PinnedBlock* host_block = copy->host_block;
  const Position next = in_flight_.erase(copy);
  if (!host_block->is_freed) return next;
  for (const Copy& other : in_flight_)
    if (other.host_block == host_block) return next;
  pinned_memory().release(host_block);
  return next;
}

void Copies::land_on(Block& block, const VectorClock& clock) {
  if (!block.n_arriving) return;
  for (auto copy = in_flight_.begin(); copy != in_flight_.end();) {
    const bool arrives = copy->to_device && copy->device_block == &block && !copy->has_landed &&
                         clock.covers(copy->access);
    if (arrives) land(*copy);
    // Nobody can change the source any more once its owner has let go of it.
    copy = arrives && copy->host_block->is_freed ? remove(copy) : std::next(copy);
  }
}

// Copies that share host memory with `next`, and that it is ordered after, finish before it.
void Copies::make_way_for(const Copy& next, const VectorClock& clock) {
  const char* end = next.host_data + next.nbytes;
  for (auto copy = in_flight_.begin(); copy != in_flight_.end();) {
    const char* copy_end = copy->host_data + copy->nbytes;
    const bool overlaps = copy->host_data < end && next.host_data < copy_end;
    const bool is_inside = next.host_data <= copy->host_data && copy_end <= end;
    // Two reads of one source do not disturb each other; the later one can guard it for both.
    const bool both_read = copy->to_device && next.to_device;
    const bool must_finish = !both_read || (copy->has_landed && is_inside);
    if (!overlaps || !clock.covers(copy->access) || !must_finish) {
      ++copy;
      continue;
    }
    if (copy->has_landed) check_source(*copy);
    land(*copy);
    copy = remove(copy);
  }
}

void Copies::settle() {
  const VectorClock& host = machine().host.clock;
  for (auto copy = in_flight_.begin(); copy != in_flight_.end();) {
    if (!host.covers(copy->access)) {
      ++copy;
      continue;
    }
    if (copy->has_landed) check_source(*copy);
    land(*copy);
    copy = remove(copy);
  }
}

void Copies::device_block_freed(Block& block, const VectorClock& owner) {
  if (block.bytes) land_on(block, owner);
  for (auto copy = in_flight_.begin(); copy != in_flight_.end();) {
    if (copy->device_block == &block) {
      copy->device_block = nullptr;
      copy->has_landed = true;  // nowhere
    }
    const bool is_over = copy->to_device && copy->has_landed && copy->host_block->is_freed;
    copy = is_over ? remove(copy) : std::next(copy);
  }
}

bool Copies::pinned_block_freed(const PinnedBlock& block) {
  bool must_stay = false;
  for (auto copy = in_flight_.begin(); copy != in_flight_.end();) {
    if (copy->host_block != &block) {
      ++copy;
      continue;
    }
    if (copy->host_is_kept && !copy->has_landed) {
      must_stay = true;
      ++copy;
      continue;
    }
    if (!copy->host_is_kept)
      machine().violations.found(
          Check::PinnedFree,
          std::string(block.is_ours ? "freed" : "unregistered") + " " +
              std::to_string(block.nbytes) + " bytes of pinned memory before the host knew that " +
              copy->access.what + " on " + name_of(copy->access.actor) + " (" +
              std::to_string(copy->nbytes) + " bytes) was over. Synchronise with an event "
              "recorded after the copy first.");
    copy = in_flight_.erase(copy);
  }
  return must_stay;
}

}  // namespace sim
