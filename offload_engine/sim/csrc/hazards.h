// Who happens before whom, and which bytes they touched.
//
// Every stream is an actor with its own counter (epoch). A VectorClock says, for each actor, up to
// which epoch its work is known to be finished. Memory remembers its last accesses by (actor,
// epoch); an access is ordered after another exactly when its clock covers it.
#pragma once

#include <array>
#include <bitset>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace sim {

constexpr int kDevices = 2;
constexpr int kStreamsPerDevice = 33;  // the default stream and a pool of 32, as CUDA has
constexpr int kActors = kDevices * kStreamsPerDevice;

using Actor = int;  // a stream: device * kStreamsPerDevice + stream id
using ActorSet = std::bitset<kActors>;

constexpr Actor actor_of(int device, int64_t stream_id) {
  return device * kStreamsPerDevice + static_cast<int>(stream_id);
}
constexpr int device_of(Actor actor) { return actor / kStreamsPerDevice; }
constexpr int stream_id_of(Actor actor) { return actor % kStreamsPerDevice; }

struct Access {
  Actor actor = -1;  // -1: nobody, ordered before everything
  uint64_t epoch = 0;
  const char* what = "";  // the operator's name, which outlives the process's tensors
};

class VectorClock {
 public:
  // Advances `actor` by one step and returns its new epoch.
  uint64_t tick(Actor actor) { return ++epochs_[actor]; }
  // True if `other` knew something that this clock did not.
  bool join(const VectorClock& other);
  bool covers(const Access& access) const {
    return access.actor < 0 || epochs_[access.actor] >= access.epoch;
  }

 private:
  std::array<uint64_t, kActors> epochs_{};
};

struct Conflict {
  Access earlier;
  bool earlier_wrote;
};

// The last accesses of every byte of one block, as a sorted list of spans that covers it.
class Shadow {
 public:
  Shadow(size_t nbytes, Access first_write) : spans_{{0, nbytes, first_write, {}}} {}

  // Record an access to [begin, end); what comes back is an earlier one that is not ordered.
  std::optional<Conflict> read(size_t begin, size_t end, Access by, const VectorClock& clock);
  std::optional<Conflict> write(size_t begin, size_t end, Access by, const VectorClock& clock);
  // An access that `clock` does not cover, by an actor that is not in `exempt`.
  std::optional<Conflict> unordered(const VectorClock& clock, const ActorSet& exempt) const;

 private:
  struct Span {
    size_t begin, end;
    Access write;
    std::vector<Access> reads;  // since that write; never two of which one covers the other
  };
  size_t split_at(size_t offset);  // index of the span that begins at `offset`

  std::vector<Span> spans_;
};

}  // namespace sim
