// See settings.h.
#include "settings.h"

#include <algorithm>

#include "device/full.h"

namespace camelid::cuda::emulated {

Settings settings;

void take_bytes(std::size_t bytes) {
  if (bytes > free_bytes()) fail_full(bytes, free_bytes());
  settings.taken_bytes += bytes;
}

std::size_t free_bytes() {
  return settings.memory_bytes - std::min(settings.memory_bytes, settings.taken_bytes);
}

}  // namespace camelid::cuda::emulated

using camelid::cuda::emulated::settings;

extern "C" {

void emulated_multiprocessors(int count) { settings.n_multiprocessors = count; }
void emulated_compute_capability(int capability) { settings.compute_capability = capability; }
void emulated_shared_memory(int bytes) {
  settings.most_shared_bytes = static_cast<std::size_t>(bytes);
}
void emulated_recording(int works) { settings.can_record = works != 0; }
void emulated_memory(std::size_t bytes) { settings.memory_bytes = bytes; }
std::size_t emulated_memory_bytes() { return settings.memory_bytes; }
std::size_t emulated_taken_bytes() { return settings.taken_bytes; }
std::size_t emulated_downloads() { return settings.n_downloads; }
std::size_t emulated_launches() { return settings.n_launches; }
}
