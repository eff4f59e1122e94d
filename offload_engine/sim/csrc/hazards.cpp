#include "hazards.h"

#include <algorithm>

namespace sim {

bool VectorClock::join(const VectorClock& other) {
  bool learned = false;
  for (int actor = 0; actor < kActors; ++actor) {
    learned |= other.epochs_[actor] > epochs_[actor];
    epochs_[actor] = std::max(epochs_[actor], other.epochs_[actor]);
  }
  return learned;
}

size_t Shadow::split_at(size_t offset) {
  auto span = std::lower_bound(spans_.begin(), spans_.end(), offset,
                               [](const Span& s, size_t at) { return s.end <= at; });
  const size_t index = span - spans_.begin();
  if (span == spans_.end() || span->begin == offset) return index;
  Span tail = *span;
  tail.begin = span->end = offset;
  spans_.insert(span + 1, std::move(tail));
  return index + 1;
}

std::optional<Conflict> Shadow::read(size_t begin, size_t end, Access by,
                                     const VectorClock& clock) {
  std::optional<Conflict> conflict;
  const size_t first = split_at(begin), last = split_at(end);
  for (size_t i = first; i < last; ++i) {
    Span& span = spans_[i];
    if (!clock.covers(span.write)) conflict = Conflict{span.write, true};
    // A read that this one is ordered after is implied by it from now on.
    auto implied = [&](const Access& read) { return clock.covers(read); };
    span.reads.erase(std::remove_if(span.reads.begin(), span.reads.end(), implied),
                     span.reads.end());
    span.reads.push_back(by);
  }
  return conflict;
}

std::optional<Conflict> Shadow::write(size_t begin, size_t end, Access by,
                                      const VectorClock& clock) {
  std::optional<Conflict> conflict;
  const size_t first = split_at(begin), last = split_at(end);
  if (first == last) return conflict;
  for (size_t i = first; i < last; ++i) {
    for (const Access& read : spans_[i].reads)
      if (!clock.covers(read)) conflict = Conflict{read, false};
    if (!clock.covers(spans_[i].write)) conflict = Conflict{spans_[i].write, true};
  }
  spans_[first].end = spans_[last - 1].end;
  spans_[first].write = by;
  spans_[first].reads.clear();
  spans_.erase(spans_.begin() + first + 1, spans_.begin() + last);
  return conflict;
}

std::optional<Conflict> Shadow::unordered(const VectorClock& clock, const ActorSet& exempt) const {
  auto is_loose = [&](const Access& access) {
    return !clock.covers(access) && !exempt.test(access.actor);
  };
  for (const Span& span : spans_) {
    if (is_loose(span.write)) return Conflict{span.write, true};
    for (const Access& read : span.reads)
      if (is_loose(read)) return Conflict{read, false};
  }
  return std::nullopt;
}

}  // namespace sim
