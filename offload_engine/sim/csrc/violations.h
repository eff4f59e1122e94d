// What a correct program never does, found by the simulator and told to the program.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace sim {

// The order of these is the order of offload_engine.sim.CHECKS.
enum class Check {
  UnorderedRead,
  UnorderedWrite,
  UnorderedFree,
  UseAfterFree,
  SourceChanged,
  PinnedFree,
};

class Violations {
 public:
  enum class State { Unraised, Raised, Allowed };
  struct Entry {
    Check check;
    State state;
    std::string text;
  };

  // Notes a violation. It is raised by the next raise_unraised(): at once where an operation looks
  // at its own bytes, at the next operation where it was found in a destructor.
  void found(Check check, std::string text);
  void raise_unraised() {
    if (n_unraised_) raise();
  }

  // A bit per Check: those set are only collected. Returns the mask before.
  int64_t allow(int64_t mask);
  const std::vector<Entry>& entries() const { return entries_; }
  void clear();

 private:
  [[noreturn]] void raise();

  std::vector<Entry> entries_;
  int64_t n_unraised_ = 0;
  int64_t allowed_ = 0;
};

const char* name_of(Check check);  // "unordered-read"

}  // namespace sim
