#include "machine.h"

#include <algorithm>

#include "copies.h"
#include "memory.h"
#include "pinned.h"

namespace sim {

namespace {
// What asking costs, so that a loop that polls an event comes to an end.
constexpr Picoseconds kPoll = 1'000'000;  // 1 us
}  // namespace

Machine& machine() {
  static Machine* the_machine = new Machine;  // outlives every tensor
  return *the_machine;
}

std::string name_of(Actor stream) {
  return "sim:" + std::to_string(device_of(stream)) + " stream " +
         std::to_string(stream_id_of(stream));
}

StreamState& Machine::heard(Actor stream) {
  StreamState& state = streams_[stream];
  if (state.heard_from_host != host.version) {
    state.clock.join(host.clock);
    state.heard_from_host = host.version;
  }
  return state;
}

Access Machine::begin(Actor stream, const char* what) {
  violations.raise_unraised();
  return {stream, heard(stream).clock.tick(stream), what};
}

void Machine::run(Actor stream, Engine& engine, Picoseconds duration) {
  StreamState& state = streams_[stream];
  const Picoseconds ready = std::max(host.time, state.idle_at);
  const Picoseconds start = duration ? engine.book(ready, duration, host.time) : ready;
  state.idle_at = start + duration;
}

void Machine::run_compute(Actor stream, size_t nbytes) {
  Device& device = devices[device_of(stream)];
  const Picoseconds duration = from_seconds(device.config.launch_seconds) +
                               transfer_time(nbytes, device.config.memory_bandwidth);
  run(stream, device.compute, duration);
}

void Machine::run_between(Actor stream, Engine& out, Engine& in, Picoseconds duration) {
  run(stream, out, duration);
  if (duration) in.book(streams_[stream].idle_at - duration, duration, host.time);
}

Actor Machine::take_stream(int device) {
  const int pool = kStreamsPerDevice - 1;
  return actor_of(device, 1 + devices[device].streams_taken++ % pool);
}

void Machine::record(Event& event, Actor stream) {
  const StreamState& state = heard(stream);
  event = {state.clock, std::max(host.time, state.idle_at)};
}

void Machine::wait(Actor stream, const Event& event) {
  StreamState& state = heard(stream);
  state.clock.join(event.clock);
  state.idle_at = std::max(state.idle_at, event.time);
}

void Machine::learn(const VectorClock& clock) {
  if (host.clock.join(clock)) ++host.version;
  copies().settle();
}

void Machine::wait_until(Picoseconds time) {
  if (time <= host.time) return;
  host.time = time;
  ++counters.host_syncs;
}

bool Machine::poll(Picoseconds time, const VectorClock& clock) {
  if (host.time < time) {
    host.time += kPoll;
    return false;
  }
  learn(clock);
  return true;
}

bool Machine::is_finished(const Event& event) { return poll(event.time, event.clock); }

bool Machine::is_finished(Actor stream) {
  const StreamState& state = heard(stream);
  return poll(state.idle_at, state.clock);
}

void Machine::synchronize(const Event& event) {
  wait_until(event.time);
  learn(event.clock);
  violations.raise_unraised();
}

void Machine::synchronize(Actor stream) {
  const StreamState& state = heard(stream);
  wait_until(state.idle_at);
  learn(state.clock);
  violations.raise_unraised();
}

void Machine::synchronize_always(Actor stream) {
  const int64_t waits = counters.host_syncs;
  synchronize(stream);
  counters.host_syncs = waits + 1;
}

void Machine::synchronize_device(int device) {
  Picoseconds time = host.time;
  VectorClock clock = host.clock;
  for (int id = 0; id < kStreamsPerDevice; ++id) {
    const StreamState& state = heard(actor_of(device, id));
    time = std::max(time, state.idle_at);
    clock.join(state.clock);
  }
  wait_until(time);
  learn(clock);
  violations.raise_unraised();
}

void Machine::reset() {
  for (const StreamState& state : streams_) host.clock.join(state.clock);
  ++host.version;
  host.time = 0;
  for (StreamState& state : streams_) state.idle_at = 0;
  for (Device& device : devices) device = Device{};
  copies().settle();
  device_memory().reset();
  pinned_memory().reset();
  violations.clear();
  counters = Counters{};
  counters.pinned_nbytes = counters.peak_pinned_nbytes = pinned_memory().nbytes();
}

}  // namespace sim
