// What offload_engine.sim calls: torch.ops.offload_engine_sim.*
#include <torch/library.h>

#include "allocators.h"
#include "autocast.h"
#include "device.h"
#include "fallback.h"
#include "kernels.h"
#include "pinned.h"
#include "tensors.h"

namespace sim {

namespace {

void install() {
  register_allocators();
  register_device();
  register_kernels();
  register_fallback();
  register_autocast();
}

void reset() {
  std::lock_guard guard(machine().lock);
  machine().reset();
}

template <typename T>
void set_if(T& setting, std::optional<T> value) {
  if (value) setting = *value;
}

void configure(int64_t device, std::optional<int64_t> capacity_nbytes,
               std::optional<double> h2d_bandwidth, std::optional<double> d2h_bandwidth,
               std::optional<double> pageable_bandwidth, std::optional<double> launch_seconds,
               std::optional<double> memory_bandwidth) {
  std::lock_guard guard(machine().lock);
  Config& config = machine().devices.at(device).config;
  set_if(config.capacity_nbytes, capacity_nbytes);
  set_if(config.h2d_bandwidth, h2d_bandwidth);
  set_if(config.d2h_bandwidth, d2h_bandwidth);
  set_if(config.pageable_bandwidth, pageable_bandwidth);
  set_if(config.launch_seconds, launch_seconds);
  set_if(config.memory_bandwidth, memory_bandwidth);
}

void set_pinned_limit(int64_t nbytes) {
  std::lock_guard guard(machine().lock);
  pinned_memory().set_limit(nbytes);
}

std::vector<int64_t> counters() {
  std::lock_guard guard(machine().lock);
  const Counters& c = machine().counters;
  return {c.h2d_nbytes,  c.d2h_nbytes,          c.d2d_nbytes,        c.h2d_copies,
          c.d2h_copies,  c.pageable_copies,     c.host_syncs,        c.record_stream_calls,
          c.empty_cache_calls, c.allocations,   c.pinned_nbytes,     c.peak_pinned_nbytes};
}

// Free and total bytes. torch.accelerator has it only in newer versions.
std::vector<int64_t> memory_info(int64_t device) {
  std::lock_guard guard(machine().lock);
  return {static_cast<int64_t>(device_memory().free_nbytes(device)),
          machine().devices.at(device).config.capacity_nbytes};
}

// Three texts for each: the check, what became of it, and the message.
std::vector<std::string> violations() {
  std::lock_guard guard(machine().lock);
  static const char* const kStates[] = {"unraised", "raised", "allowed"};
  std::vector<std::string> texts;
  for (const auto& entry : machine().violations.entries()) {
    texts.emplace_back(name_of(entry.check));
    texts.emplace_back(kStates[static_cast<int>(entry.state)]);
    texts.push_back(entry.text);
  }
  return texts;
}

int64_t allow(int64_t mask) {
  std::lock_guard guard(machine().lock);
  return machine().violations.allow(mask);
}

void spend(double seconds) {
  std::lock_guard guard(machine().lock);
  const Actor stream = current_stream(current_device());
  machine().begin(stream, "spend");
  machine().run(stream, machine().devices[device_of(stream)].compute, from_seconds(seconds));
}

double now() {
  std::lock_guard guard(machine().lock);
  return to_seconds(machine().host.time);
}

void inject_oom(int64_t after) {
  std::lock_guard guard(machine().lock);
  device_memory().inject_oom(after);
}

void inject_pin_failure(int64_t after) {
  std::lock_guard guard(machine().lock);
  pinned_memory().inject_failure(after);
}

void register_host(int64_t address, int64_t nbytes) {
  std::lock_guard guard(machine().lock);
  pinned_memory().register_range(reinterpret_cast<void*>(address), nbytes);
}

void unregister_host(int64_t address) {
  std::lock_guard guard(machine().lock);
  pinned_memory().unregister_range(reinterpret_cast<void*>(address));
  machine().violations.raise_unraised();
}

}  // namespace

TORCH_LIBRARY(offload_engine_sim, m) {
  m.def("install", &install);
  m.def("reset", &reset);
  m.def("configure", &configure);
  m.def("set_pinned_limit", &set_pinned_limit);
  m.def("counters", &counters);
  m.def("memory_info", &memory_info);
  m.def("violations", &violations);
  m.def("allow", &allow);
  m.def("spend", &spend);
  m.def("now", &now);
  m.def("inject_oom", &inject_oom);
  m.def("inject_pin_failure", &inject_pin_failure);
  m.def("register_host", &register_host);
  m.def("unregister_host", &unregister_host);
}

}  // namespace sim
