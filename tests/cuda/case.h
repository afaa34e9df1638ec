// What C functions that tests call have in common, on a GPU and on the emulated device alike.
#pragma once

#include <exception>

#include "device/memory.h"

namespace camelid::cuda {

// Where all of them work, and whether that is only recorded: as a graph, to be timed (gpu.cu).
inline cudaStream_t stream = nullptr;
inline bool recording = false;

// device_error() tells it.
void remember_error(const char* message);

// Does work() and waits for the device; 1 where either throws.
template <class Work>
int caught(const Work& work) {
  try {
    work();
    if (!recording) finish(stream);
    return 0;
  } catch (const std::exception& error) {
    remember_error(error.what());
    return 1;
  }
}

}  // namespace camelid::cuda
