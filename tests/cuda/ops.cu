// C functions over the kernels' host side, for tests that run them on a GPU (built with nvcc) or on
// the emulated device (built with the compiler for C++).
#include <cstring>
#include <utility>

#include "case.h"
#include "case_shapes.h"
#include "layout/share.h"
#include "ops/experts_few.h"
#include "ops/matmul_few.h"
#include "ops/matmul_plain.h"
#include "ops/project_kv.h"

using namespace camelid::cuda;

// Of the grids of calls for few tokens; 0: as many as run at once.
static int most_blocks = 0;
// Of the next call for few tokens.
static NormEnd norm_of_x;
static NormStart norm_of_y;

extern "C" {

// How many bytes tiles and scales take.
void tile_sizes(const CaseShape* s, std::int64_t* sizes) {
  sizes[0] = shape_of(*s).bytes();
  sizes[1] = shape_of(*s).all_scale_bytes();
}

// What pack on the host does: values int32 [rows][inputs], scales and zeros float [rows][n_groups].
void pack_tiles(const CaseShape* s, const int* values, const float* scales, const float* zeros,
                int group, std::byte* tiles, std::byte* packed_scales) {
  const TileShape shape = shape_of(*s);
  const int words = tile_bytes(shape.bits) / 4;
  auto* out = reinterpret_cast<std::uint32_t*>(tiles);
  for (int row_tile = 0; row_tile < shape.n_row_tiles(); ++row_tile) {
    for (int k = 0; k < shape.n_k_tiles(); ++k) {
      for (int i = 0; i < words; ++i) {
        *out++ = make_word(shape.bits, i, [&](int r, int input) -> std::uint32_t {
          const int row = source_row(shape, row_tile, r), column = k * kTileInputs + input;
          const int value =
              row < shape.rows && column < shape.inputs ? values[row * shape.inputs + column] : 0;
          return shape.bits == Bits::k4 ? static_cast<std::uint32_t>(value + 8)
                                        : static_cast<std::uint32_t>(value & 255);
        });
      }
    }
  }
  const int n_groups = divide_up(shape.inputs, group);
  std::byte* to = packed_scales;
  for (int row_tile = 0; row_tile < shape.n_row_tiles(); ++row_tile) {
    for (int entry = 0; entry < shape.n_chunks() * shape.entries; ++entry) {
      for (int r = 0; r < kTileRows; ++r) {
        const int row = source_row(shape, row_tile, r);
        const int input = entry * (kChunkInputs / shape.entries);
        const bool there = row < shape.rows && input < shape.inputs;
        const int at = there ? row * n_groups + input / group : 0;
        const float scale = there ? scales[at] : 0.0f;
        if (shape.scales == Scales::kBf16) {
          std::uint32_t bits;
          std::memcpy(&bits, &scale, 4);
          const auto half = static_cast<std::uint16_t>(bits >> 16);
          std::memcpy(to, &half, 2);
        } else {
          const float pair[2] = {scale, there && zeros != nullptr ? zeros[at] : 0.0f};
          std::memcpy(to, pair, 8);
        }
        to += scale_bytes(shape.scales);
      }
    }
  }
}

// Unpacks tiles into values [rows][inputs]; how many further ones there are, all 0, or -1.
int read_tiles(const CaseShape* s, const std::byte* tiles, int* values) {
  const TiledMatrix w = {shape_of(*s), {tiles, nullptr}};
  int n_padding = 0;
  for (int row_tile = 0; row_tile < w.shape.n_row_tiles(); ++row_tile) {
    for (int r = 0; r < kTileRows; ++r) {
      const int row = source_row(w.shape, row_tile, r);
      for (int input = 0; input < w.shape.n_k_tiles() * kTileInputs; ++input) {
        const int value = tiled_value(w, row_tile, r, input);
        if (row < w.shape.rows && input < w.shape.inputs) {
          values[row * w.shape.inputs + input] = value;
        } else if (value != 0) {
          return -1;
        } else {
          ++n_padding;
        }
      }
    }
  }
  return n_padding;
}

int source_row_of(const CaseShape* s, int row_tile, int r) {
  return source_row(shape_of(*s), row_tile, r);
}

// Of each block the first unit and the one past its last, [n_blocks][2]; of each unit its owner.
void deal(int n_blocks, int n_units, int* bounds, int* owners) {
  for (int block = 0; block < n_blocks; ++block) {
    const Share share = share_of(block, n_blocks, n_units);
    bounds[2 * block] = share.first;
    bounds[2 * block + 1] = share.last;
  }
  for (int unit = 0; unit < n_units; ++unit) owners[unit] = owner_of(unit, n_blocks, n_units);
}

void limit_blocks(int most) { most_blocks = most; }

void finish_norm_of_x(const void* squares, int n_parts, float share, float eps) {
  norm_of_x = {static_cast<const float*>(squares), n_parts, share, eps};
}

void begin_norm_of_y(const void* gain, void* h, std::int64_t h_stride, void* squares) {
  norm_of_y = {static_cast<const float*>(gain), static_cast<std::uint16_t*>(h), h_stride,
               static_cast<float*>(squares)};
}

void matmul_few_need(const CaseShape* s, int n_tokens, std::int64_t* need) {
  const WorkspaceNeed n = matmul_few_needs(shape_of(*s), n_tokens);
  need[0] = static_cast<std::int64_t>(n.sum_bytes);
  need[1] = static_cast<std::int64_t>(n.n_counters);
}

static MatmulFew matmul_of(const CaseShape& s, const void* tiles, const void* scales, const void* x,
                           int n_tokens, int x_stride, void* y, int y_stride, int output) {
  MatmulFew call;
  call.w = {shape_of(s),
            {static_cast<const std::byte*>(tiles), static_cast<const std::byte*>(scales)}};
  call.x = static_cast<const std::uint16_t*>(x);
  call.n_tokens = n_tokens;
  call.x_stride = x_stride;
  call.y = y;
  call.y_stride = y_stride;
  call.output = static_cast<Output>(output);
  call.norm_of_x = std::exchange(norm_of_x, {});
  call.norm_of_y = std::exchange(norm_of_y, {});
  call.most_blocks = most_blocks;
  return call;
}

int run_matmul_few(const CaseShape* s, const void* tiles, const void* scales, const void* x,
                   int n_tokens, int x_stride, void* y, int y_stride, int output, void* sums,
                   std::int64_t sum_bytes, void* counters, std::int64_t n_counters) {
  return caught([&] {
    matmul_few(matmul_of(*s, tiles, scales, x, n_tokens, x_stride, y, y_stride, output),
               {static_cast<std::byte*>(sums), static_cast<std::size_t>(sum_bytes),
                static_cast<unsigned*>(counters), static_cast<std::size_t>(n_counters)},
               stream);
  });
}

void project_kv_need(const CaseShape* s, std::int64_t* need) {
  const WorkspaceNeed n = project_kv_needs(shape_of(*s));
  need[0] = static_cast<std::int64_t>(n.sum_bytes);
  need[1] = static_cast<std::int64_t>(n.n_counters);
}

int run_project_kv(const CaseKv* kv, const CaseShape* s, const void* tiles, const void* scales,
                   const void* x, int n_tokens, int x_stride, void* y, int y_stride, int output,
                   void* sums, std::int64_t sum_bytes, void* counters, std::int64_t n_counters) {
  return caught([&] {
    project_kv(matmul_of(*s, tiles, scales, x, n_tokens, x_stride, y, y_stride, output),
               store_of(*kv),
               {static_cast<std::byte*>(sums), static_cast<std::size_t>(sum_bytes),
                static_cast<unsigned*>(counters), static_cast<std::size_t>(n_counters)},
               stream);
  });
}

struct CExperts {
  CaseShape gate_up, down, shared_gate_up, shared_down;
  const void *router, *gate_up_table, *down_table;
  const void *shared_gate_up_tiles, *shared_gate_up_scales, *shared_down_tiles, *shared_down_scales;
  int router_stride, n_experts, top_k;
};

static ExpertWeights experts_of(const CExperts& c) {
  const auto at = [](const void* tiles, const void* scales) {
    return TilePointers{static_cast<const std::byte*>(tiles),
                        static_cast<const std::byte*>(scales)};
  };
  ExpertWeights w;
  w.router = static_cast<const std::uint16_t*>(c.router);
  w.gate_up = static_cast<const TilePointers*>(c.gate_up_table);
  w.down = static_cast<const TilePointers*>(c.down_table);
  w.gate_up_shape = shape_of(c.gate_up);
  w.down_shape = shape_of(c.down);
  w.shared_gate_up = {shape_of(c.shared_gate_up),
                      at(c.shared_gate_up_tiles, c.shared_gate_up_scales)};
  w.shared_down = {shape_of(c.shared_down), at(c.shared_down_tiles, c.shared_down_scales)};
  w.router_stride = c.router_stride;
  w.n_experts = c.n_experts;
  w.top_k = c.top_k;
  return w;
}

// need: bytes of sums, counters, bytes of scratch, tokens at most.
void experts_few_need(const CExperts* c, int n_tokens, std::int64_t* need) {
  const ExpertWeights w = experts_of(*c);
  const WorkspaceNeed n = experts_few_needs(w, n_tokens);
  need[0] = static_cast<std::int64_t>(n.sum_bytes);
  need[1] = static_cast<std::int64_t>(n.n_counters);
  need[2] = static_cast<std::int64_t>(experts_few_scratch_bytes(w, n_tokens));
  need[3] = experts_few_limit(w);
}

int run_experts_few(const CExperts* c, const void* x, int n_tokens, int x_stride, void* y,
                    int y_stride, void* scratch, void* sums, std::int64_t sum_bytes, void* counters,
                    std::int64_t n_counters) {
  return caught([&] {
    ExpertsFew call;
    call.w = experts_of(*c);
    call.x = static_cast<const std::uint16_t*>(x);
    call.n_tokens = n_tokens;
    call.x_stride = x_stride;
    call.y = static_cast<float*>(y);
    call.y_stride = y_stride;
    call.scratch = static_cast<std::byte*>(scratch);
    call.norm_of_x = std::exchange(norm_of_x, {});
    call.norm_of_y = std::exchange(norm_of_y, {});
    call.most_blocks = most_blocks;
    experts_few(call,
                {static_cast<std::byte*>(sums), static_cast<std::size_t>(sum_bytes),
                 static_cast<unsigned*>(counters), static_cast<std::size_t>(n_counters)},
                stream);
  });
}

int run_matmul_plain(const void* x, const void* w, int n_tokens, int rows, int inputs, int x_stride,
                     int w_stride, void* y, int y_stride, int output) {
  return caught([&] {
    MatmulPlain call;
    call.x = static_cast<const std::uint16_t*>(x);
    call.w = static_cast<const std::uint16_t*>(w);
    call.y = y;
    call.n_tokens = n_tokens;
    call.rows = rows;
    call.inputs = inputs;
    call.x_stride = x_stride;
    call.w_stride = w_stride;
    call.y_stride = y_stride;
    call.output = static_cast<Output>(output);
    matmul_plain(call, stream);
  });
}

}  // extern "C"
