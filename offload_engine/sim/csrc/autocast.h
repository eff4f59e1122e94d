#pragma once

namespace sim {

void register_autocast();

}  // namespace sim
