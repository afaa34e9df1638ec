// The CPU backend's working memory and its way of cutting matrix products into tasks, shared by
// backend.cpp and experts.cpp. Buffers grow with the number of tokens and are reused by every call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "base/threads.h"
#include "cpu/kernels.h"

namespace camelid::cpu {

// float32 memory that grows and never shrinks; contents do not survive growth.
class GrowingFloats {
 public:
  float* at_least(std::size_t n);

 private:
  Buffer buffer_;
};

// y[n_rows, out_dim] (+)= x[n_rows, in_dim] w^T: one of several products that run together.
struct Product {
  const PackedMatrix* w = nullptr;
  const float* x = nullptr;
  std::int64_t n_rows = 0;
  std::int64_t x_stride = 0;
  float* y = nullptr;
  std::int64_t y_stride = 0;
  bool accumulate = false;
};

class Workspace {
 public:
  Workspace(const Kernels& kernels, int n_threads);

  const Kernels& kernels;
  ThreadPool pool;

  // All products as one list of tasks, so that a thread without work in one takes up another. They
  // must not write to the same place.
  void multiply(std::span<const Product> products);
  // act[n, ffn_dim] = silu(gate) * up over rows [gate | up] of hidden[n, 2 ffn_dim].
  void activate(float* act, const float* hidden, std::int64_t n_rows, std::int64_t ffn_dim);
  // Scratch of one worker, used inside one task only.
  float* scratch(int worker, std::size_t n);

 private:
  struct Task {
    const Product* product;
    std::int64_t first_panel, last_panel;
    std::int64_t first_row, n_rows;
  };
  void cut(const Product& product, std::int64_t panel_step);
  void run(const Task& task, int worker);

  std::vector<Task> tasks_;
  std::vector<GrowingFloats> scratch_;
};

}  // namespace camelid::cpu
