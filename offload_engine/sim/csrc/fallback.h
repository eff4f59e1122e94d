#pragma once

namespace sim {

// Gives every operator that has a CPU kernel one on the device: the CPU's, on the same bytes.
void register_fallback();

}  // namespace sim
