// What a GPU is, and how fast its memory can be read and copied: what benchmarks of kernels are
// held against. All of it may be recorded and timed as any call of tests/cuda.
#include <cstring>

#include "case.h"

namespace camelid::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kLoads = 8;  // of 16 bytes, in flight at once in each thread

__global__ void __launch_bounds__(kThreads) read_all(const uint4* from, std::int64_t n, uint4* to) {
  uint4 sum = {0, 0, 0, 0};
  const std::int64_t step = std::int64_t{grid_size()} * kThreads * kLoads;
  const std::int64_t first = std::int64_t{block_index()} * kThreads * kLoads + thread_index();
  for (std::int64_t i = first; i + kThreads * (kLoads - 1) < n; i += step) {
    uint4 loaded[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) loaded[j] = __ldcs(from + i + j * kThreads);
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      sum.x ^= loaded[j].x;
      sum.y ^= loaded[j].y;
      sum.z ^= loaded[j].z;
      sum.w ^= loaded[j].w;
    }
  }
  // Never so for random bytes; but the compiler cannot know.
  if ((sum.x & sum.y & sum.z & sum.w) == 0xffffffffu) *to = sum;
}

// A hash of the place: as good as random for tensor cores, which slow down with what they multiply.
__global__ void fill_words(unsigned* to, std::int64_t n, unsigned seed) {
  const std::int64_t step = std::int64_t{grid_size()} * block_size();
  for (std::int64_t i = std::int64_t{block_index()} * block_size() + thread_index(); i < n;
       i += step) {
    unsigned word = static_cast<unsigned>(i) * 0x9e3779b9u + seed;
    word = (word ^ (word >> 16)) * 0x85ebca6bu;
    word = (word ^ (word >> 13)) * 0xc2b2ae35u;
    to[i] = word ^ (word >> 16);
  }
}

}  // namespace
}  // namespace camelid::cuda

using namespace camelid::cuda;

extern "C" {

// numbers: multiprocessors, bytes of L2, bytes of memory, kHz of the clock at most, capability.
int gpu_info(char* name, std::int64_t* numbers) {
  return caught([&] {
    int device = 0;
    check(cudaGetDevice(&device), "device");
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, device), "device");
    std::memcpy(name, properties.name, sizeof(properties.name));
    int clock = 0;
    check(cudaDeviceGetAttribute(&clock, cudaDevAttrClockRate, device), "device");
    numbers[0] = properties.multiProcessorCount;
    numbers[1] = properties.l2CacheSize;
    numbers[2] = static_cast<std::int64_t>(properties.totalGlobalMem);
    numbers[3] = clock;
    numbers[4] = properties.major * 10 + properties.minor;
    int driver = 0, runtime = 0;  // 13000 for CUDA 13.0
    check(cudaDriverGetVersion(&driver), "driver");
    check(cudaRuntimeGetVersion(&runtime), "runtime");
    numbers[5] = driver;
    numbers[6] = runtime;
  });
}

int fill_random(void* to, std::int64_t bytes, int seed) {
  return caught([&] {
    launch("fill", fill_words, {.blocks = 1024, .threads = 256, .stream = stream},
           static_cast<unsigned*>(to), bytes / 4, static_cast<unsigned>(seed));
  });
}

int read_memory(const void* from, std::int64_t bytes, void* to) {
  return caught([&] {
    launch("read", read_all,
           {.blocks = multiprocessors() * 4, .threads = kThreads, .stream = stream},
           static_cast<const uint4*>(from), bytes / 16, static_cast<uint4*>(to));
  });
}

int copy_memory(void* to, const void* from, std::int64_t bytes) {
  return caught([&] {
    check(cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), cudaMemcpyDeviceToDevice,
                          stream),
          "copy");
  });
}
}
