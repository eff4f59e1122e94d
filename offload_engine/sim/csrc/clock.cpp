#include "clock.h"

#include <algorithm>
#include <cmath>

namespace sim {

Picoseconds from_seconds(double seconds) { return std::llround(seconds * 1e12); }
double to_seconds(Picoseconds time) { return static_cast<double>(time) / 1e12; }
double to_milliseconds(Picoseconds time) { return static_cast<double>(time) / 1e9; }

Picoseconds transfer_time(size_t nbytes, double bytes_per_second) {
  return from_seconds(static_cast<double>(nbytes) / bytes_per_second);
}

Picoseconds Engine::book(Picoseconds ready, Picoseconds duration, Picoseconds now) {
  auto is_past = [&](const Busy& busy) { return busy.end < now; };
  busy_.erase(busy_.begin(), std::find_if_not(busy_.begin(), busy_.end(), is_past));

  Picoseconds start = ready;
  auto next = busy_.begin();
  for (; next != busy_.end() && next->begin < start + duration; ++next)
    start = std::max(start, next->end);

  const bool joins_previous = next != busy_.begin() && (next - 1)->end == start;
  const bool joins_next = next != busy_.end() && next->begin == start + duration;
  if (joins_previous && joins_next) {
    (next - 1)->end = next->end;
    busy_.erase(next);
  } else if (joins_previous) {
    (next - 1)->end = start + duration;
  } else if (joins_next) {
    next->begin = start;
  } else {
    busy_.insert(next, {start, start + duration});
  }
  return start;
}

}  // namespace sim
