// Launches that are recorded once and then repeated by a single call: a step of decoding is some
// hundred of them, and starting each would take the host longer than the GPU needs for it.
#pragma once

#include <utility>

#include "device/launch.cuh"

namespace camelid::cuda {

class Graph {
 public:
  Graph() = default;
  Graph(Graph&& other) noexcept : graph_(std::exchange(other.graph_, nullptr)) {}
  Graph& operator=(Graph&& other) noexcept {
    std::swap(graph_, other.graph_);
    return *this;
  }
  ~Graph() {
    if (graph_ != nullptr) cudaGraphExecDestroy(graph_);
  }

  bool is_there() const { return graph_ != nullptr; }
  void launch(cudaStream_t stream) const { check(cudaGraphLaunch(graph_, stream), "graph"); }

  // What is launched on the stream from here on is not done but recorded.
  static void record(cudaStream_t stream) {
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "record");
  }
  // After a call that failed: nothing of what was recorded is kept.
  static void abandon(cudaStream_t stream) {
    cudaGraph_t recorded = nullptr;
    if (cudaStreamEndCapture(stream, &recorded) == cudaSuccess) cudaGraphDestroy(recorded);
    cudaGetLastError();  // not sticky
  }
  static Graph finish(cudaStream_t stream) {
    cudaGraph_t recorded = nullptr;
    check(cudaStreamEndCapture(stream, &recorded), "record");
    Graph graph;
    const cudaError_t status = cudaGraphInstantiate(&graph.graph_, recorded, 0);
    cudaGraphDestroy(recorded);
    check(status, "graph");
    return graph;
  }

 private:
  cudaGraphExec_t graph_ = nullptr;
};

}  // namespace camelid::cuda
