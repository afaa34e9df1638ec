// The twin of cuda/device/graph.h on the CPU: a list of what was launched.
#pragma once

#include <utility>

#include "device/launch.cuh"

namespace camelid::cuda {

class Graph {
 public:
  bool is_there() const { return is_there_; }
  void launch(cudaStream_t) const { emulated::replay(record_); }

  static void record(cudaStream_t) { emulated::start_recording(); }
  static void abandon(cudaStream_t) { emulated::finish_recording(); }
  static Graph finish(cudaStream_t) {
    Graph graph;
    graph.record_ = emulated::finish_recording();
    if (!emulated::can_record()) fail(ErrorCode::kInternal, "[cuda] graph: not supported.");
    graph.is_there_ = true;
    return graph;
  }

 private:
  emulated::Record record_;
  bool is_there_ = false;
};

}  // namespace camelid::cuda
