// The device itself as torch sees it: guard (current device, streams, events), hooks, generator.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "allocators.h"
#include "device.h"
#include "pinned.h"
#include "tensors.h"

namespace sim {

namespace {

thread_local int t_device = 0;
thread_local std::array<Actor, kDevices> t_streams = {actor_of(0, 0), actor_of(1, 0)};

c10::Device to_device(int index) { return {kSim, static_cast<c10::DeviceIndex>(index)}; }

int index_of(const c10::Device& device) {
  const int index = device.has_index() ? device.index() : t_device;
  TORCH_CHECK(0 <= index && index < kDevices, "sim error: invalid device ordinal ", index,
              ", there are ", kDevices, " simulated devices");
  return index;
}

struct SimGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kSim; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }

  c10::Device exchangeDevice(c10::Device device) const override {
    return to_device(std::exchange(t_device, index_of(device)));
  }
  c10::Device getDevice() const override { return to_device(t_device); }
  void setDevice(c10::Device device) const override { t_device = index_of(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index()) t_device = device.index();
  }

#if __has_include(<c10/core/DeviceCapability.h>)
  c10::DeviceCapability getDeviceCapability(c10::Device) const override { return {}; }
#endif

  c10::Stream getStream(c10::Device device) const override {
    return to_stream(t_streams[index_of(device)]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return to_stream(actor_of(index_of(device), 0));
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    std::lock_guard guard(machine().lock);
    return to_stream(machine().take_stream(index_of(device)));
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getNewStream(device, 0);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const Actor next = to_actor(stream);
    return to_stream(std::exchange(t_streams[device_of(next)], next));
  }

  bool queryStream(const c10::Stream& stream) const override {
    std::lock_guard guard(machine().lock);
    return machine().is_finished(to_actor(stream));
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    std::lock_guard guard(machine().lock);
    machine().synchronize(to_actor(stream));
  }
  void synchronizeDevice(c10::DeviceIndex device) const override {
    std::lock_guard guard(machine().lock);
    machine().synchronize_device(index_of(to_device(device)));
  }

  void record(void** event, const c10::Stream& stream, c10::DeviceIndex,
              c10::EventFlag) const override {
    std::lock_guard guard(machine().lock);
    if (!*event) *event = new Event;
    machine().record(*static_cast<Event*>(*event), to_actor(stream));
  }
  void block(void* event, const c10::Stream& stream) const override {
    std::lock_guard guard(machine().lock);
    if (event) machine().wait(to_actor(stream), *static_cast<Event*>(event));
  }
  bool queryEvent(void* event) const override {
    std::lock_guard guard(machine().lock);
    return !event || machine().is_finished(*static_cast<Event*>(event));
  }
  void synchronizeEvent(void* event) const override {
    std::lock_guard guard(machine().lock);
    if (event) machine().synchronize(*static_cast<Event*>(event));
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override {
    delete static_cast<Event*>(event);
  }
  double elapsedTime(void* from, void* to, c10::DeviceIndex) const override {
    return to_milliseconds(static_cast<Event*>(to)->time - static_cast<Event*>(from)->time);
  }

  void recordDataPtrOnStream(const c10::DataPtr& pointer,
                             const c10::Stream& stream) const override {
    static_cast<c10::DeviceAllocator*>(device_allocator())->recordStream(pointer, stream);
  }
};

// Draws the numbers that a CPU generator of the same seed draws.
class SimGenerator final : public c10::GeneratorImpl {
 public:
  SimGenerator(int device, at::Generator cpu)
      : GeneratorImpl(to_device(device), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        cpu_(std::move(cpu)) {}

  const at::Generator& cpu() const { return cpu_; }

  void set_current_seed(uint64_t seed) override { cpu_.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { cpu_.set_offset(offset); }
  uint64_t get_offset() const override { return cpu_.get_offset(); }
  uint64_t current_seed() const override { return cpu_.current_seed(); }
  uint64_t seed() override { return cpu_.seed(); }
  void set_state(const c10::TensorImpl& state) override {
    cpu_.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return cpu_.unsafeGetGeneratorImpl()->get_state();
  }

 private:
  SimGenerator* clone_impl() const override {
    return new SimGenerator(device_.index(), cpu_.clone());
  }

  at::Generator cpu_;
};

struct SimHooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }

  void setCurrentDevice(c10::DeviceIndex device) const override {
    t_device = index_of(to_device(device));
  }
  c10::DeviceIndex getCurrentDevice() const override { return t_device; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    return std::exchange(t_device, index_of(to_device(device)));
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return exchangeDevice(device);
  }

  // The default generator is the CPU's own: a program draws the same numbers on either device.
  const at::Generator& getDefaultGenerator(c10::DeviceIndex device) const override {
    static std::array<at::Generator, kDevices> generators = {
        at::make_generator<SimGenerator>(0, at::detail::getDefaultCPUGenerator()),
        at::make_generator<SimGenerator>(1, at::detail::getDefaultCPUGenerator())};
    return generators[index_of(to_device(device))];
  }
  at::Generator getNewGenerator(c10::DeviceIndex device) const override {
    return at::make_generator<SimGenerator>(index_of(to_device(device)),
                                            at::detail::createCPUGenerator());
  }

  c10::Device getDeviceFromPtr(void* data) const override {
    std::lock_guard guard(machine().lock);
    Block* block = device_memory().find(data);
    TORCH_CHECK(block, "sim error: the address does not lie in device memory");
    return to_device(block->device);
  }
  bool isPinnedPtr(const void* data) const override {
    std::lock_guard guard(machine().lock);
    return pinned_memory().find(data, 1) != nullptr;
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return host_allocator(); }

  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t nbytes) const override {
    resize_storage(storage.unsafeGetStorageImpl(), nbytes);
  }
};

}  // namespace

int current_device() { return t_device; }
Actor current_stream(int device) { return t_streams[device]; }

c10::Stream to_stream(Actor stream) {
  return c10::Stream(c10::Stream::UNSAFE, to_device(device_of(stream)), stream_id_of(stream));
}

Actor to_actor(const c10::Stream& stream) {
  TORCH_CHECK(stream.device_type() == kSim, "sim error: expected a stream of a simulated device");
  return actor_of(index_of(stream.device()), stream.id());
}

at::Generator cpu_generator(const at::Generator& generator) {
  TORCH_CHECK(generator.device().type() == kSim,
              "Expected a 'sim' device type for generator but found '",
              c10::DeviceTypeName(generator.device().type(), true), "'");
  return static_cast<SimGenerator*>(generator.unsafeGetGeneratorImpl())->cpu();
}

void register_device() {
  c10::impl::DeviceGuardImplRegistrar(kSim, new SimGuard);
  at::RegisterPrivateUse1HooksInterface(new SimHooks);
}

}  // namespace sim
