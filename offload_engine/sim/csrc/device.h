#pragma once

#include <ATen/core/Generator.h>

namespace sim {

// The CPU generator behind a generator of the device; throws for one of any other device.
at::Generator cpu_generator(const at::Generator& generator);
void register_device();

}  // namespace sim
