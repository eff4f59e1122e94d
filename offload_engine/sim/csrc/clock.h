// Virtual time: integer picoseconds, so that every run adds up to the same number.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace sim {

using Picoseconds = int64_t;

Picoseconds from_seconds(double seconds);
double to_seconds(Picoseconds time);
double to_milliseconds(Picoseconds time);
Picoseconds transfer_time(size_t nbytes, double bytes_per_second);

// A unit of the device that does one thing at a time: the compute engine or one copy engine.
// Work takes the first gap that is long enough, so work that is ready passes work that waits.
class Engine {
 public:
  // Books `duration` at or after `ready` and returns the start. Nothing is booked before `now`.
  Picoseconds book(Picoseconds ready, Picoseconds duration, Picoseconds now);

 private:
  struct Busy {
    Picoseconds begin, end;
  };
  std::vector<Busy> busy_;  // disjoint, sorted, merged where they touch
};

}  // namespace sim
