// What becomes of a linear on its way to the GPU: tiles where it is quantised, bf16 rows where not.
#include "host/matrix.h"

#include <algorithm>
#include <limits>

#include "base/dtype.h"
#include "base/error.h"
#include "ops/pack.h"
#include "quant/quantize.h"

namespace camelid::cuda {
namespace {

// A linear on the host in compressed-tensors' form.
struct Quantised {
  LinearSource source;
  std::vector<std::int32_t> words;
  std::vector<std::uint16_t> scales;
};

constexpr std::int64_t kRowsAtOnce = 64;  // of a thread's task

// As allocate_device() aligns.
std::size_t aligned(std::size_t bytes) { return (bytes + 255) / 256 * 256; }

std::int64_t divide_up64(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

bool is_quantised_as(const LinearSource& source, WeightFormat format) {
  return (source.bits == 4 && format == WeightFormat::kInt4) ||
         (source.bits == 8 && format == WeightFormat::kInt8);
}

bool fits_tiles(const LinearSource& source) {
  return source.group_size >= source.in_dim || source.group_size % 32 == 0;
}

Quantised quantise(const LinearSource& source, const PackOptions& options, ThreadPool& pool) {
  const int bits = options.format == WeightFormat::kInt4 ? 4 : 8;
  const std::int64_t group = options.group_size == 0 ? source.in_dim : options.group_size;
  const std::int64_t row_words = divide_up64(source.in_dim, 32 / bits);
  const std::int64_t n_groups = divide_up64(source.in_dim, group);
  Quantised result;
  result.words.resize(static_cast<std::size_t>(source.out_dim * row_words));
  result.scales.resize(static_cast<std::size_t>(source.out_dim * n_groups));
  pool.parallel_for(divide_up64(source.out_dim, kRowsAtOnce), [&](std::int64_t task, int) {
    const std::int64_t first = task * kRowsAtOnce;
    const std::int64_t n = std::min(kRowsAtOnce, source.out_dim - first);
    std::vector<float> rows(static_cast<std::size_t>(n * source.in_dim));
    read_rows(source, first, n, rows.data());
    quantize_rows(rows.data(), n, source.in_dim, bits, group,
                  result.words.data() + first * row_words, result.scales.data() + first * n_groups);
  });
  result.source = source;
  result.source.bits = bits;
  result.source.group_size = group;
  result.source.words = result.words.data();
  result.source.scales = result.scales.data();
  result.source.scale_dtype = DType::kBf16;
  result.source.zero_points = nullptr;
  return result;
}

// The matrix's own from now on.
std::byte* allocate_weights(std::size_t bytes, DeviceMatrix& matrix) {
  matrix.bytes += bytes;
  matrix.memory.push_back(allocate_device(std::max<std::size_t>(bytes, 1)));
  return matrix.memory.back().get();
}

void add_tiled(DeviceMatrix& matrix, std::span<const LinearSource> stack, RowOrder order,
               std::int64_t first_row, Uploader& uploader) {
  Segment segment;
  segment.first_row = static_cast<std::int32_t>(first_row);
  segment.is_tiled = true;
  segment.tiled.shape = packed_shape(stack, order);
  const TileShape& shape = segment.tiled.shape;
  // One piece for all three: models have thousands of experts, and taking memory is slow.
  const auto tile_bytes = static_cast<std::size_t>(shape.bytes());
  const auto scale_bytes = static_cast<std::size_t>(shape.all_scale_bytes());
  const std::size_t scales_at = aligned(tile_bytes);
  const std::size_t table_at = scales_at + aligned(scale_bytes);
  std::byte* tiles = allocate_weights(table_at + sizeof(TilePointers), matrix);
  segment.tiled.at = {tiles, tiles + scales_at};
  pack(stack, shape, tiles, tiles + scales_at, uploader);
  uploader.copy(tiles + table_at, &segment.tiled.at, sizeof(TilePointers));
  segment.table = reinterpret_cast<const TilePointers*>(tiles + table_at);
  matrix.segments.push_back(segment);
}

// Writes one row of the stack as bf16, zeros behind its inputs.
void write_row(std::uint16_t* to, std::int32_t stride, std::span<const LinearSource> stack,
               std::int64_t row, std::vector<float>& values) {
  std::size_t index = 0;
  while (row >= stack[index].out_dim) row -= stack[index++].out_dim;
  const LinearSource& source = stack[index];
  values.resize(static_cast<std::size_t>(source.in_dim));
  read_rows(source, row, 1, values.data());
  std::transform(values.begin(), values.end(), to, f32_to_bf16);
  std::fill(to + source.in_dim, to + stride, std::uint16_t{0});
}

void add_plain(DeviceMatrix& matrix, std::span<const LinearSource> stack, RowOrder order,
               std::int64_t first_row, Uploader& uploader, ThreadPool& pool) {
  Segment segment;
  segment.first_row = static_cast<std::int32_t>(first_row);
  PlainMatrix& plain = segment.plain;
  for (const LinearSource& source : stack) plain.rows += static_cast<std::int32_t>(source.out_dim);
  plain.inputs = static_cast<std::int32_t>(stack[0].in_dim);
  plain.stride = divide_up(plain.inputs, 8) * 8;
  plain.order = order;
  TileShape shape;  // whose rows lie in the same order
  shape.rows = plain.rows;
  shape.order = order;
  const std::int64_t n_rows =
      order == RowOrder::kPlain ? plain.rows : std::int64_t{shape.n_row_tiles()} * kTileRows;
  const std::size_t row_bytes = static_cast<std::size_t>(plain.stride) * sizeof(std::uint16_t);
  std::byte* memory = allocate_weights(static_cast<std::size_t>(n_rows) * row_bytes, matrix);
  const auto at_once = static_cast<std::int64_t>(uploader.piece_bytes() / row_bytes);
  if (at_once == 0) {
    fail(ErrorCode::kUnsupported, "[cuda] ", stack[0].name, ": a row of ", plain.inputs,
         " inputs is more than goes to the GPU at once.");
  }
  for (std::int64_t first = 0; first < n_rows; first += at_once) {
    const std::int64_t n = std::min(at_once, n_rows - first);
    auto* rows = reinterpret_cast<std::uint16_t*>(uploader.next());
    pool.parallel_for(divide_up64(n, kRowsAtOnce), [&](std::int64_t task, int) {
      std::vector<float> values;
      for (std::int64_t i = task * kRowsAtOnce; i < std::min(n, (task + 1) * kRowsAtOnce); ++i) {
        std::uint16_t* to = rows + i * plain.stride;
        const std::int64_t row = first + i;
        const int from =
            source_row(shape, static_cast<int>(row / kTileRows), static_cast<int>(row % kTileRows));
        if (from < plain.rows) {
          write_row(to, plain.stride, stack, from, values);
        } else {
          std::fill(to, to + plain.stride, std::uint16_t{0});
        }
      }
    });
    uploader.send_to(memory + static_cast<std::size_t>(first) * row_bytes,
                     static_cast<std::size_t>(n) * row_bytes);
  }
  plain.at = reinterpret_cast<const std::uint16_t*>(memory);
  matrix.segments.push_back(segment);
}

}  // namespace

std::unique_ptr<DeviceMatrix> pack_matrix(std::span<const LinearSource> stack,
                                          std::span<const PackOptions> options, Stack kind,
                                          Uploader& uploader, ThreadPool& pool) {
  auto matrix = std::make_unique<DeviceMatrix>();
  matrix->in_dim = stack[0].in_dim;
  std::vector<Quantised> held;  // what was quantised here, until it is packed
  held.reserve(stack.size());
  std::vector<LinearSource> sources(stack.begin(), stack.end());
  std::vector<bool> is_tiled;
  for (std::size_t i = 0; i < stack.size(); ++i) {
    matrix->out_dim += stack[i].out_dim;
    constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max() / 2;
    if (matrix->out_dim > kMost || stack[i].in_dim > kMost) {
      fail(ErrorCode::kUnsupported, "[cuda] ", stack[i].name, ": [", stack[i].out_dim, ", ",
           stack[i].in_dim, "] is larger than a GPU takes.");
    }
    const WeightFormat format = options[i].format;
    const bool wants_tiles = format == WeightFormat::kInt4 || format == WeightFormat::kInt8;
    if (wants_tiles && !is_quantised_as(stack[i], format)) {
      held.push_back(quantise(stack[i], options[i], pool));
      sources[i] = held.back().source;
    }
    is_tiled.push_back(wants_tiles && fits_tiles(sources[i]));
  }

  const RowOrder order = kind == Stack::kGateUp ? RowOrder::kGateUp : RowOrder::kPlain;
  const auto alike = [&](std::size_t a, std::size_t b) {
    return is_tiled[a] == is_tiled[b] && (!is_tiled[a] || sources[a].bits == sources[b].bits);
  };
  if (order == RowOrder::kGateUp && !alike(0, 1)) is_tiled = {false, false};  // they must meet
  std::int64_t first_row = 0;
  for (std::size_t first = 0; first < sources.size();) {
    std::size_t last = first + 1;
    while (last < sources.size() && alike(first, last)) ++last;
    const std::span<const LinearSource> some(sources.data() + first, last - first);
    if (is_tiled[first]) {
      add_tiled(*matrix, some, order, first_row, uploader);
    } else {
      add_plain(*matrix, some, order, first_row, uploader, pool);
    }
    for (const LinearSource& source : some) first_row += source.out_dim;
    first = last;
  }
  return matrix;
}

}  // namespace camelid::cuda
