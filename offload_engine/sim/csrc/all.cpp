// One translation unit: reading torch's headers is most of the build.
//
// To read it, begin with the model: hazards, clock, machine, memory, pinned, copies, violations.
// Then what torch sees of it: device, allocators, tensors, fallback, kernels, autocast. What the
// Python package calls is in control.
#include "allocators.cpp"
#include "autocast.cpp"
#include "clock.cpp"
#include "control.cpp"
#include "copies.cpp"
#include "device.cpp"
#include "fallback.cpp"
#include "hazards.cpp"
#include "kernels.cpp"
#include "machine.cpp"
#include "memory.cpp"
#include "pinned.cpp"
#include "tensors.cpp"
#include "violations.cpp"
