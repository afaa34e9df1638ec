// Large buffers straight from the operating system, and how much more of them there may be. Pages
// cost memory only once touched. Knows nothing of what is stored.
#pragma once

#include <cstddef>
#include <memory>

namespace camelid {

// Zeroed memory, aligned to a page or better (2 MiB from 2 MiB on, with huge pages asked for),
// given back when the last owner goes. Throws Error(kCapacity) naming `bytes` and what is free.
std::shared_ptr<void> map_memory(std::size_t bytes);

// Tells the system the contents of the whole pages inside [data, data + bytes) are no longer
// needed; they read as zeros afterwards. Bytes outside the range are untouched.
void discard_memory(void* data, std::size_t bytes);

// Bytes this process may still take: free memory of the machine or of its control group, whichever
// is less. File cache that can be dropped counts as free.
std::size_t available_memory();

}  // namespace camelid
