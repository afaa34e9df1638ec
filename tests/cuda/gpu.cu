// Memory of a real GPU as emulated/fibers.cpp gives that of the emulated one, to the same Python:
// with guards on either side, which hold writes beside it. And a clock, for what calls would do.
// Nothing here is part of the engine.
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "case.h"

namespace camelid::cuda {
namespace {

constexpr std::size_t kGuard = 4096;
constexpr int kGuardByte = 0xa5;

std::string last_error;
cudaGraphExec_t recorded = nullptr;
std::map<std::byte*, std::size_t> sizes;  // of what device_alloc() gave

// A stream that waits for no other, as the engine's: what is only right because the legacy stream
// waits for all is wrong there. Made with the first memory: who only loads this touches no GPU.
void open_stream() {
  if (stream != nullptr) return;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
}

void check_guard(const std::byte* guard, const char* where, std::size_t bytes) {
  std::vector<unsigned char> found(kGuard);
  check(cudaMemcpy(found.data(), guard, kGuard, cudaMemcpyDeviceToHost), "guards");
  for (const unsigned char byte : found) {
    if (byte == kGuardByte) continue;
    fail(ErrorCode::kInternal, "something wrote ", where, " of ", bytes, " bytes of device memory");
  }
}

void check_guards_of(const std::byte* memory, std::size_t bytes) {
  check_guard(memory - kGuard, "before the first", bytes);
  check_guard(memory + bytes, "behind the last", bytes);
}

}  // namespace

void remember_error(const char* message) { last_error = message; }

}  // namespace camelid::cuda

using namespace camelid::cuda;

extern "C" {

const char* device_error() { return last_error.c_str(); }

// How many GPUs there are; 0 also after an error, as where there is no driver.
int device_count() {
  int count = 0;
  return caught([&] { check(cudaGetDeviceCount(&count), "devices"); }) == 0 ? count : 0;
}

// The CUDA of the driver, 0 where there is none, and of the runtime in here: 13000 for 13.0.
void cuda_versions(int* numbers) {
  numbers[0] = numbers[1] = 0;
  cudaDriverGetVersion(&numbers[0]);
  cudaRuntimeGetVersion(&numbers[1]);
}

// Filled with NaNs, as an emulated device fills it; null after an error.
void* device_alloc(std::size_t bytes) {
  std::byte* base = nullptr;
  const int failed = caught([&] {
    open_stream();
    void* memory = nullptr;
    check(cudaMalloc(&memory, bytes + 2 * kGuard), "device memory");
    base = static_cast<std::byte*>(memory);
    check(cudaMemsetAsync(base, kGuardByte, bytes + 2 * kGuard, stream), "device memory");
    check(cudaMemsetAsync(base + kGuard, 0xff, bytes, stream), "device memory");
    sizes[base + kGuard] = bytes;
  });
  return failed != 0 ? nullptr : base + kGuard;
}

int device_free(void* memory) {
  return caught([&] {
    auto* data = static_cast<std::byte*>(memory);
    sizes.erase(data);
    check(cudaFree(data - kGuard), "device memory");
  });
}

int device_copy(void* to, const void* from, std::size_t bytes) {
  return caught(
      [&] { check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream), "copy"); });
}

int check_guards() {
  return caught([] {
    for (const auto& [memory, bytes] : sizes) check_guards_of(memory, bytes);
  });
}

// From here to graph_end() calls are recorded instead of done.
int graph_begin() {
  return caught([] {
    open_stream();
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed), "graph");
    recording = true;
  });
}

int graph_end() {
  recording = false;
  return caught([] {
    if (recorded != nullptr) check(cudaGraphExecDestroy(recorded), "graph");
    recorded = nullptr;
    cudaGraph_t graph = nullptr;
    check(cudaStreamEndCapture(stream, &graph), "graph");
    check(cudaGraphInstantiate(&recorded, graph, 0), "graph");
    check(cudaGraphDestroy(graph), "graph");
  });
}

// Does what was recorded n_runs times; of each the milliseconds.
int graph_times(int n_runs, float* milliseconds) {
  return caught([&] {
    cudaEvent_t start = nullptr, end = nullptr;
    check(cudaEventCreate(&start), "event");
    check(cudaEventCreate(&end), "event");
    for (int i = 0; i < n_runs; ++i) {
      check(cudaEventRecord(start, stream), "event");
      check(cudaGraphLaunch(recorded, stream), "graph");
      check(cudaEventRecord(end, stream), "event");
      check(cudaEventSynchronize(end), "graph");
      check(cudaEventElapsedTime(milliseconds + i, start, end), "event");
    }
    check(cudaEventDestroy(start), "event");
    check(cudaEventDestroy(end), "event");
  });
}
}
