#pragma once

#include <ATen/core/CachingHostAllocator.h>
#include <c10/core/StorageImpl.h>

namespace sim {

int current_device();  // of this thread
at::HostAllocator* host_allocator();
// Gives `storage` new memory of `nbytes` and copies what fits.
void resize_storage(c10::StorageImpl* storage, size_t nbytes);
void register_allocators();

}  // namespace sim
