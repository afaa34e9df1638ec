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

// Activations [n_rows, dim] on a backend, rows `row_stride` elements apart. The element type is the
// backend's own choice (float32 on the CPU); only the backend looks behind `data`.
struct Tensor {
  void* data = nullptr;
  std::int64_t n_rows = 0;
  std::int64_t dim = 0;
  std::int64_t row_stride = 0;
};

}  // namespace camelid
