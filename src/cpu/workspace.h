// The CPU backend's working memory and its way of cutting matrix products into tasks, shared by
// backend.cpp and experts.cpp. Buffers grow with the number of tokens and are reused by every call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
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

// Activations: float32 rows `stride` apart.
struct Rows {
  const float* data = nullptr;
  std::int64_t n_rows = 0;
  std::int64_t stride = 0;
};

// y[n_rows, out_dim] (+)= x[rows] w^T: one of several products that run together.
struct Product {
  const PackedMatrix* w = nullptr;
  Rows x;
  const std::int32_t* rows = nullptr;  // of x, n_rows of them; null: first_row and those after it
  std::int64_t first_row = 0;
  std::int64_t n_rows = 0;
  float* y = nullptr;
  std::int64_t y_stride = 0;
  bool accumulate = false;
  bool exact = false;  // in float, whatever the others do
};

class Workspace {
 public:
  // fast: multiply by quantised weights in integers where their groups allow it, and by bf16 ones
  // in bf16 where the instruction set can.
  Workspace(const Kernels& kernels, int n_threads, bool fast);

  const Kernels& kernels;
  const bool fast;
  ThreadPool pool;

  // All products as one list of tasks, so that a thread without work in one takes up another. They
  // must not write to the same place.
  void multiply(std::span<const Product> products);
  // act[n, ffn_dim] = silu(f gate) * (f up) over rows [gate | up] of hidden[n, 2 ffn_dim]; f is
  // factors[row].
  void activate(float* act, const float* hidden, const float* factors, std::int64_t n_rows,
                std::int64_t ffn_dim);
  // Scratch of one worker, used inside one task only.
  float* scratch(int worker, std::size_t n);

 private:
  // One input of the products at hand, quantised for weights of one block size.
  struct Quantised {
    const float* source = nullptr;
    Int8Rows rows;
    Bf16Rows rounded;
    GrowingFloats values, scales, sums;
    GrowingFloats rest;  // what the int8 values leave of the source, where somebody asked for it
    bool has_rest = false;
  };
  // A product's input as int8 in one term or two, or as bf16; neither where it runs in float.
  struct Terms {
    const Int8Rows* first = nullptr;
    const Int8Rows* second = nullptr;
    const Bf16Rows* bf16 = nullptr;
  };
  struct Task {
    const Product* product;
    Terms terms;
    std::int64_t first_panel, last_panel;
    std::int64_t first_row, n_rows;
  };
  Terms quantise(const Product& product);
  Quantised& quantise(const Rows& x, std::int64_t dim, std::int64_t block);
  const Bf16Rows& round(const Rows& x, std::int64_t dim);
  Rows rest_of(Quantised& q, const Rows& x, std::int64_t dim);
  template <class RowTask>
  void for_rows(std::int64_t n_rows, std::int64_t dim, RowTask task);
  void cut(const Product& product, Terms terms, std::int64_t panel_step);
  void run(const Task& task, int worker);
  void run_integer(MatmulTask work, Terms x8, std::int64_t first, std::int64_t last);

  std::vector<std::unique_ptr<Quantised>> quantised_;  // the first n_quantised_ are in use
  std::size_t n_quantised_ = 0;
  std::vector<Task> tasks_;
  std::vector<GrowingFloats> scratch_;
};

}  // namespace camelid::cpu
