// What the emulated GPU and its driver are, as tests choose it, and what was asked of them. Knows
// nothing of kernels.
#pragma once

#include <cstddef>

namespace camelid::cuda::emulated {

struct Settings {
  int n_multiprocessors = 5;
  int compute_capability = 90;
  std::size_t most_shared_bytes = 227 * 1024;  // of a block
  std::size_t memory_bytes = std::size_t{1} << 28;
  std::size_t taken_bytes = 0;
  bool can_record = true;
  std::size_t n_downloads = 0;
  std::size_t n_launches = 0;
};
extern Settings settings;

inline int multiprocessors() { return settings.n_multiprocessors; }
inline int compute_capability() { return settings.compute_capability; }
inline std::size_t shared_memory_limit() { return settings.most_shared_bytes; }
inline bool can_record() { return settings.can_record; }
inline void count_download() { ++settings.n_downloads; }
inline void count_launch() { ++settings.n_launches; }

// Of the device's memory. Throws kCapacity.
void take_bytes(std::size_t bytes);
inline void give_bytes(std::size_t bytes) { settings.taken_bytes -= bytes; }
std::size_t free_bytes();

}  // namespace camelid::cuda::emulated

// What tests call.
extern "C" {
void emulated_multiprocessors(int count);
void emulated_compute_capability(int capability);  // 90 unless told otherwise
void emulated_shared_memory(int bytes);  // of a block at most: 227 KB unless told otherwise
void emulated_recording(int works);      // whether graphs can be made: 1 unless told otherwise
// All there is: 256 MB unless told otherwise. What was taken stays; what device_alloc() gives does
// not count.
void emulated_memory(std::size_t bytes);
std::size_t emulated_memory_bytes();
std::size_t emulated_taken_bytes();
// Since the start: copies to the host, and kernels that were launched or recorded.
std::size_t emulated_downloads();
std::size_t emulated_launches();
}
