// Loops that do nothing but one instruction as fast as the machine can, and the table of them. Each
// is compiled for its own instruction set by an attribute and asks the processor before it is
// offered. Knows nothing of camelid.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace camelid::benchmarks {

enum class Products { kFloat, kBf16, kInt8 };

struct PeakLoop {
  const char* name;  // "vnni512"
  Products products;
  double operations;  // of one turn; a multiply and an add are two
  void (*run)(std::int64_t turns);
  bool (*supported)();
};

// Every loop compiled here; ask supported() before run().
std::span<const PeakLoop> peak_loops();

// Reads every byte; `bytes` is a multiple of 256. Returns something that depends on all of them.
std::uint64_t read_all(const void* data, std::size_t bytes);

}  // namespace camelid::benchmarks
