#pragma once

namespace sim {

// Operators that a CPU kernel cannot do: making tensors, copies between devices, storage.
void register_kernels();

}  // namespace sim
