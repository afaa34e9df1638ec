// Row by row and value by value. rows.h says what the results are; sums are float32, in an order
// that depends on the width of a row alone.

// ---- layout ----
//
//   norms     a block for each row; thread t has the fours t, t + threads, .. of it, the first
//             kFours of them in registers from the one read to the one write
//   others    a block for each piece of 1024 values of a row, a four a thread
//
// Norms of one row are bound by latency: a read of DRAM or L2, a meeting of the block (layer norm:
// two) and a write. Gains do not depend on the kernel before and are read before it is waited for.

#include "ops/rows.h"

#include <algorithm>

#include "device/row.cuh"

namespace camelid::cuda {
namespace {

constexpr int kMostThreads = 1024;
constexpr int kPieceThreads = 256;
constexpr int kPiece = kPieceThreads * kFour;

__device__ Line row_of(const Rows& rows, std::int64_t row) {
  return line_of(rows.data, row * rows.stride, rows.dim, rows.element == Element::kBf16);
}

// ---- kernels: norms ----

struct Norm {
  Rows y, x;
  const std::int32_t* rows;  // of x; null: in order
  const float* gain;
  const float* bias;
  float eps;
};

// What a thread knows of a row and of what goes with it, four by four: the first kFours fours
// in registers, the others in memory.
template <bool kCentred, int kFours>
struct Mine {
  Line x, gain, bias;
  Four of_x[kFours], of_gain[kFours], of_bias[kCentred ? kFours : 1];

  __device__ static int step() { return block_size() * kFour; }
  __device__ static int first() { return thread_index() * kFour; }

  __device__ void load_constants() {
    load_fours(of_gain, gain, first(), step());
    if constexpr (kCentred) load_fours(of_bias, bias, first(), step());
  }
  __device__ void load_row() { load_fours(of_x, x, first(), step()); }

  // visit(column, x, gain, bias) for each four.
  template <class Visit>
  __device__ void each(const Visit& visit) const {
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      visit(first() + i * step(), of_x[i], of_gain[i], of_bias[kCentred ? i : 0]);
    }
    for (int column = first() + kFours * step(); column < x.n; column += step()) {
      const Four b = kCentred ? load_four(bias, column) : Four{};
      visit(column, load_four(x, column), load_four(gain, column), b);
    }
  }
  // The sum over the row of term(value); see sum_of_block.
  template <class Term>
  __device__ float sum(const Term& term, float* of_warps) const {
    float total = 0.0f;
    const auto add = [&](int column, const Four& v) {
#pragma unroll
      for (int j = 0; j < kFour; ++j) total += column + j < x.n ? term(v.at[j]) : 0.0f;
    };
#pragma unroll
    for (int i = 0; i < kFours; ++i) add(first() + i * step(), of_x[i]);
    for (int column = first() + kFours * step(); column < x.n; column += step()) {
      add(column, load_four(x, column));
    }
    return sum_of_block(total, of_warps);
  }
};

// kCentred: around the mean, and with a bias: a layer norm. Otherwise an RMS norm.
template <bool kCentred, int kFours>
__global__ void __launch_bounds__(kMostThreads) norm_kernel(const Norm call) {
  let_next_kernel_start();
  auto* of_warps = reinterpret_cast<float*>(shared_memory());
  const float share = 1.0f / static_cast<float>(call.x.dim);  // here, where nobody waits for it
  const Line y = row_of(call.y, block_index());
  Mine<kCentred, kFours> mine;
  mine.gain = line_of(call.gain, call.x.dim);
  mine.bias = line_of(call.bias, call.x.dim);
  mine.load_constants();
  wait_for_previous_kernel();
  mine.x = row_of(call.x, call.rows == nullptr ? block_index() : call.rows[block_index()]);
  mine.load_row();
  float mean = 0.0f;
  if constexpr (kCentred) {
    mean = mine.sum([](float v) { return v; }, of_warps + kWarp) * share;
  }
  const auto square = [&](float v) { return (v - mean) * (v - mean); };
  const float inverse = 1.0f / sqrtf(mine.sum(square, of_warps) * share + call.eps);
  mine.each([&](int column, const Four& v, const Four& gain, const Four& bias) {
    Four result;
#pragma unroll
    for (int j = 0; j < kFour; ++j) {
      result.at[j] = (v.at[j] - mean) * inverse * gain.at[j];
      if constexpr (kCentred) result.at[j] += bias.at[j];
    }
    store_four(y, column, result);
  });
}

// ---- kernel: all others ----

// y = op(y, row, column): `op` gives four values from `column` on.
template <class Op>
__global__ void __launch_bounds__(kPieceThreads) each_kernel(const Rows y, const Op op) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int n_pieces = divide_up(y.dim, kPiece);
  const std::int64_t n = std::int64_t{y.n_rows} * n_pieces;
  for (std::int64_t i = block_index(); i < n; i += grid_size()) {
    const std::int64_t row = i / n_pieces;
    const int column = static_cast<int>(i % n_pieces) * kPiece + thread_index() * kFour;
    if (column >= y.dim) continue;
    const Line line = row_of(y, row);
    store_four(line, column, op(line, row, column));
  }
}

struct EmbedPlain {
  const std::uint16_t* table;
  std::int64_t stride;
  const std::int32_t* tokens;

  __device__ Four operator()(const Line& y, std::int64_t row, int column) const {
    return load_four(line_of(table, tokens[row] * stride, y.n), column);
  }
};

struct EmbedTiled {
  TiledMatrix table;
  const std::int32_t* tokens;

  __device__ Four operator()(const Line& y, std::int64_t row, int column) const {
    const int token = tokens[row];
    Four v;
#pragma unroll
    for (int j = 0; j < kFour; ++j) {
      v.at[j] = column + j < y.n ? weight(token / kTileRows, token % kTileRows, column + j) : 0.0f;
    }
    return v;
  }

  __device__ float weight(int row_tile, int r, int input) const {
    const TileShape& shape = table.shape;
    const auto value = static_cast<float>(tiled_value(table, row_tile, r, input));
    const int entry = input / kChunkInputs * shape.entries +
                      input % kChunkInputs / (kChunkInputs / shape.entries);
    const std::byte* scale = table.at.scales + row_tile * shape.row_tile_scale_bytes() +
                             std::int64_t{entry * kTileRows + r} * scale_bytes(shape.scales);
    if (shape.scales == Scales::kBf16) {
      return value * low_bf16(*reinterpret_cast<const std::uint16_t*>(scale));
    }
    const float2 pair = *reinterpret_cast<const float2*>(scale);
    return (value - pair.y) * pair.x;
  }
};

struct Copy {
  Rows x;
  const std::int32_t* rows;

  __device__ Four operator()(const Line&, std::int64_t row, int column) const {
    return load_four(row_of(x, rows == nullptr ? row : rows[row]), column);
  }
};

struct AddBias {
  const float* bias;

  __device__ Four operator()(const Line& y, std::int64_t, int column) const {
    Four v = load_four(y, column);
    const Four b = load_four(line_of(bias, y.n), column);
#pragma unroll
    for (int j = 0; j < kFour; ++j) v.at[j] += b.at[j];
    return v;
  }
};

// x / 2 * (1 + erf(x / sqrt 2)).
struct Gelu {
  __device__ Four operator()(const Line& y, std::int64_t, int column) const {
    Four v = load_four(y, column);
#pragma unroll
    for (int j = 0; j < kFour; ++j) {
      v.at[j] = 0.5f * v.at[j] * (1.0f + erff(v.at[j] * 0.70710678f));
    }
    return v;
  }
};

// ---- choose and launch ----

void require(bool holds, const char* wanted) {
  if (!holds) fail(ErrorCode::kInternal, "[cuda] rows: ", wanted, ".");
}

template <bool kCentred>
void norm(const char* what, const Norm& call, cudaStream_t stream) {
  require(call.y.dim == call.x.dim && (call.rows != nullptr || call.y.n_rows == call.x.n_rows),
          "a norm gives as many values as it takes");
  if (call.y.n_rows <= 0 || call.y.dim <= 0) return;
  Launch how;
  how.blocks = call.y.n_rows;
  how.shared_bytes = 2 * kWarp * sizeof(float);
  how.stream = stream;
  how.overlaps = true;
  const auto threads = [&](int fours) {
    return std::min(divide_up(call.x.dim, kFour * fours * kWarp) * kWarp, kMostThreads);
  };
  // 5120 values are 640 threads with two fours each. Four of x, gain and bias each would not fit
  // 64 registers; no layer norm is that wide.
  if (kCentred || call.x.dim <= kMostThreads * kFour * 2) {
    how.threads = threads(2);
    launch(what, norm_kernel<kCentred, 2>, how, call);
  } else {
    how.threads = threads(4);
    launch(what, norm_kernel<false, 4>, how, call);
  }
}

template <class Op>
void each(const char* what, const Rows& y, const Op& op, cudaStream_t stream) {
  if (y.n_rows <= 0 || y.dim <= 0) return;
  constexpr std::int64_t kMostBlocks = 1 << 20;  // each then takes more than one piece
  Launch how;
  how.blocks =
      static_cast<int>(std::min(std::int64_t{y.n_rows} * divide_up(y.dim, kPiece), kMostBlocks));
  how.threads = kPieceThreads;
  how.stream = stream;
  how.overlaps = true;
  launch(what, each_kernel<Op>, how, y, op);
}

}  // namespace

void embed(const Rows& y, const std::int32_t* tokens, const Table& table, cudaStream_t stream) {
  if (table.plain != nullptr) {
    each("embed", y, EmbedPlain{table.plain, table.stride, tokens}, stream);
    return;
  }
  require(table.tiled.shape.order == RowOrder::kPlain && y.dim <= table.tiled.shape.inputs,
          "a tiled table has its rows in order, as wide as the embeddings");
  each("embed", y, EmbedTiled{table.tiled, tokens}, stream);
}

void rms_norm(const Rows& y, const Rows& x, const std::int32_t* rows, const float* gain, float eps,
              cudaStream_t stream) {
  norm<false>("rms_norm", {y, x, rows, gain, nullptr, eps}, stream);
}

void layer_norm(const Rows& y, const Rows& x, const float* gain, const float* bias, float eps,
                cudaStream_t stream) {
  norm<true>("layer_norm", {y, x, nullptr, gain, bias, eps}, stream);
}

void add_bias(const Rows& y, const float* bias, cudaStream_t stream) {
  each("add_bias", y, AddBias{bias}, stream);
}

void gelu(const Rows& y, cudaStream_t stream) { each("gelu", y, Gelu{}, stream); }

void copy_rows(const Rows& y, const Rows& x, const std::int32_t* rows, cudaStream_t stream) {
  require(y.dim == x.dim && (rows != nullptr || y.n_rows <= x.n_rows),
          "rows are copied whole, and no more of them than there are");
  each("copy_rows", y, Copy{x, rows}, stream);
}

}  // namespace camelid::cuda
