// The state of the simulated machine: streams, events, the host, and what is set and counted.
//
// One lock guards all of it (Machine::lock). It is never held while a CPU kernel runs, and nothing
// under it takes Python's lock.
#pragma once

#include <array>
#include <cstdint>
#include <mutex>
#include <string>

#include "clock.h"
#include "hazards.h"
#include "violations.h"

namespace sim {

struct Config {
  int64_t capacity_nbytes = int64_t{64} << 30;
  double h2d_bandwidth = 24e9;  // bytes per second, from and to pinned memory
  double d2h_bandwidth = 24e9;
  double pageable_bandwidth = 12e9;
  double launch_seconds = 5e-6;     // of compute time for each operator ...
  double memory_bandwidth = 1e12;   // ... plus the bytes that it touches at this rate
};

// The order of these is the order of the fields of offload_engine.sim.Counters.
struct Counters {
  int64_t h2d_nbytes = 0, d2h_nbytes = 0, d2d_nbytes = 0;
  int64_t h2d_copies = 0, d2h_copies = 0, pageable_copies = 0;
  int64_t host_syncs = 0, record_stream_calls = 0, empty_cache_calls = 0, allocations = 0;
  int64_t pinned_nbytes = 0, peak_pinned_nbytes = 0;
};

struct StreamState {
  VectorClock clock;             // what has happened before the next operation
  Picoseconds idle_at = 0;       // when the last operation ends
  uint64_t heard_from_host = 0;  // the version of the host's clock that was joined last
};

struct Event {
  VectorClock clock;
  Picoseconds time = 0;
};

struct Host {
  VectorClock clock;
  Picoseconds time = 0;
  uint64_t version = 0;  // changes whenever the clock learns something
};

struct Device {
  Config config;
  Engine compute, h2d, d2h;
  int streams_taken = 0;
};

class Machine {
 public:
  std::recursive_mutex lock;
  Violations violations;
  Counters counters;
  Host host;
  std::array<Device, kDevices> devices;

  // Begins an operation: everything the host knows to be finished now precedes it.
  Access begin(Actor stream, const char* what);
  const VectorClock& clock_of(Actor stream) { return heard(stream).clock; }
  // Books `duration` on `engine` behind the stream's earlier work.
  void run(Actor stream, Engine& engine, Picoseconds duration);
  void run_compute(Actor stream, size_t nbytes);
  // A transfer between two devices holds both copy engines.
  void run_between(Actor stream, Engine& out, Engine& in, Picoseconds duration);

  Actor take_stream(int device);
  void record(Event& event, Actor stream);
  void wait(Actor stream, const Event& event);

  // The host's side: each says or makes sure that the work is finished, and learns from it.
  bool is_finished(const Event& event);
  bool is_finished(Actor stream);
  void synchronize(const Event& event);
  void synchronize(Actor stream);
  void synchronize_device(int device);
  // Waits and counts as a wait even where there is nothing left to wait for: `.item()`.
  void synchronize_always(Actor stream);

  // Counters, clock, violations and configuration as at the start, with nothing in flight.
  void reset();

 private:
  StreamState& heard(Actor stream);
  void learn(const VectorClock& clock);
  bool poll(Picoseconds time, const VectorClock& clock);
  void wait_until(Picoseconds time);

  std::array<StreamState, kActors> streams_;
};

Machine& machine();
std::string name_of(Actor stream);  // "sim:0 stream 3"

}  // namespace sim
