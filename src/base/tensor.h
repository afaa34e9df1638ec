// Two views that own nothing: a tensor as a checkpoint holds it, and rows of activations on a
// device.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/dtype.h"

namespace camelid {

// A named tensor of a checkpoint: row-major, contiguous, aligned to nothing in particular.
struct TensorView {
  std::string name;
  std::string file;  // for messages
  DType dtype = DType::kF32;
  std::vector<std::int64_t> shape;
  const void* data = nullptr;
};

// What activations are for. Sums are float32 everywhere. Operands are what products with weights
// are made of, in the type a backend multiplies: float32 on the CPU, bf16 on a GPU.
enum class Role : std::uint8_t { kSum, kOperand };

// Activations [n_rows, dim] on a backend, rows `row_stride` elements apart; only the backend looks
// behind `data`.
struct Tensor {
  void* data = nullptr;
  std::int64_t n_rows = 0;
  std::int64_t dim = 0;
  std::int64_t row_stride = 0;
  Role role = Role::kSum;
};

}  // namespace camelid
