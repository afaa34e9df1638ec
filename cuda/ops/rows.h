// Row by row and value by value: embeddings, norms, biases, GELU, and copies of rows. They touch
// few bytes beside the products they stand between.
#pragma once

#include <cstdint>

#include "device/launch.cuh"
#include "layout/tiles.h"

namespace camelid::cuda {

enum class Element : std::uint8_t { kF32, kBf16 };

// Activations [n_rows][stride], `dim` values of each row; device memory.
struct Rows {
  void* data = nullptr;
  std::int32_t n_rows = 0;
  std::int32_t dim = 0;
  std::int64_t stride = 0;  // values
  Element element = Element::kF32;
};

// A bf16 table [n][stride] or a packed one; y[i] = table[tokens[i]].
struct Table {
  const std::uint16_t* plain = nullptr;  // null: tiled
  std::int64_t stride = 0;
  TiledMatrix tiled;
};
void embed(const Rows& y, const std::int32_t* tokens, const Table& table, cudaStream_t stream);

// y[i] = x[rows[i]] / sqrt(mean(x^2) + eps) * gain, rows null: of x[i]; then y may be x where both
// are float32.
void rms_norm(const Rows& y, const Rows& x, const std::int32_t* rows, const float* gain, float eps,
              cudaStream_t stream);
// y = (x - mean) / sqrt(variance + eps) * gain + bias, the variance around the mean. y may be x
// where both are float32.
void layer_norm(const Rows& y, const Rows& x, const float* gain, const float* bias, float eps,
                cudaStream_t stream);

void add_bias(const Rows& y, const float* bias, cudaStream_t stream);  // to every row
void gelu(const Rows& y, cudaStream_t stream);                         // in place, by erf
// y[i] = x[rows[i]], rounded where y is bf16; rows null: x[i].
void copy_rows(const Rows& y, const Rows& x, const std::int32_t* rows, cudaStream_t stream);

}  // namespace camelid::cuda
