// How work is cut: pieces small enough that all threads finish together, large enough that each
// streams its weights. The cut never changes a result (kernels.h).
#include "cpu/workspace.h"

#include <algorithm>

#include "base/arena.h"

namespace camelid::cpu {
namespace {

// Tasks per thread: the last one to finish idles the others for at most a sixteenth of its share.
constexpr std::int64_t kTasksPerThread = 16;
// Panels a kernel multiplies at once: cutting between multiples of it wastes no vector.
constexpr std::int64_t kPanelStep = 4;
// Reading a weight from memory takes about as long as this many rows take to multiply by it.
constexpr std::int64_t kReadRows = 12;
// Below this many multiplications, waking a thread costs more than it saves.
constexpr std::int64_t kWorthSharing = 1 << 17;
// Rows below which unpacking weights for one task again costs more than a thread gains.
constexpr std::int64_t kRowStep = 48;
// Values of one task that quantises rows: less than this is not worth waking a thread for.
constexpr std::int64_t kRowValues = 1 << 15;
// Panels multiplied by one term, then by the other while their words are in the cache.
constexpr std::int64_t kTermPanels = 8;
constexpr std::int64_t kLineBytes = 64;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// What one panel of a product takes, in the time of one input of one row: few rows are bound by
// reading, many by multiplying.
std::int64_t panel_cost(const Product& p) {
  return p.n_rows == 0 ? 0 : p.w->in_dim * (p.n_rows + kReadRows);
}

}  // namespace

float* GrowingFloats::at_least(std::size_t n) {
  const std::size_t bytes = n * sizeof(float);
  if (bytes > buffer_.bytes) {
    const std::size_t wanted = std::max(bytes, buffer_.bytes + buffer_.bytes / 2);
    buffer_ = {};  // give the old one back first
    buffer_ = {map_memory(wanted), wanted};
  }
  return static_cast<float*>(buffer_.data.get());
}

Workspace::Workspace(const Kernels& table, int n_threads, bool is_fast)
    : kernels(table),
      fast(is_fast),
      pool(n_threads),
      scratch_(static_cast<std::size_t>(n_threads)) {}

float* Workspace::scratch(int worker, std::size_t n) {
  return scratch_[static_cast<std::size_t>(worker)].at_least(n);
}

void Workspace::multiply(std::span<const Product> products) {
  std::int64_t multiplications = 0;
  std::int64_t cost = 0;
  for (const Product& p : products) {
    multiplications += p.n_rows * p.w->in_dim * p.w->out_dim;
    cost += p.w->n_panels() * panel_cost(p);
  }
  const bool share = multiplications >= kWorthSharing && pool.n_threads() > 1;
  const std::int64_t task_cost = cost / (pool.n_threads() * kTasksPerThread) + 1;
  tasks_.clear();
  n_quantised_ = 0;
  for (const Product& p : products) {
    if (p.n_rows == 0) continue;
    const std::int64_t panels = task_cost / panel_cost(p) / kPanelStep * kPanelStep;
    cut(p, quantise(p), share ? std::max(panels, kPanelStep) : p.w->n_panels());
  }
  if (share) {
    pool.parallel_for(static_cast<std::int64_t>(tasks_.size()), [this](std::int64_t i, int worker) {
      run(tasks_[static_cast<std::size_t>(i)], worker);
    });
  } else {
    for (const Task& task : tasks_) run(task, 0);
  }
}

Workspace::Terms Workspace::quantise(const Product& product) {
  const std::int64_t block = product.w->activation_block;
  const std::int64_t dim = product.w->in_dim;
  if (!fast || product.exact) return {};
  const bool bf16 = product.w->plain_bf16 && !product.w->precise && kernels.matmul_bf16 != nullptr;
  if (bf16) return {nullptr, nullptr, &round(product.x, dim)};
  if (block == 0) return {};
  Quantised& first = quantise(product.x, dim, block);
  if (!product.w->precise) return {&first.rows, nullptr, nullptr};
  return {&first.rows, &quantise(rest_of(first, product.x, dim), dim, block).rows, nullptr};
}

// Rows as int8, made once for all products of a call that share them.
Workspace::Quantised& Workspace::quantise(const Rows& x, std::int64_t dim, std::int64_t block) {
  for (std::size_t i = 0; i < n_quantised_; ++i) {
    Quantised& q = *quantised_[i];
    if (q.source == x.data && q.rows.block == block) return q;
  }
  if (n_quantised_ == quantised_.size()) quantised_.push_back(std::make_unique<Quantised>());
  Quantised& q = *quantised_[n_quantised_++];
  const std::int64_t stride = ceil_div(dim, kLineBytes) * kLineBytes;
  const std::int64_t n_blocks = ceil_div(dim, block);
  const auto n_scales = static_cast<std::size_t>(x.n_rows * n_blocks);
  auto* values = reinterpret_cast<std::int8_t*>(
      q.values.at_least(static_cast<std::size_t>(x.n_rows * stride) / sizeof(float)));
  float* scales = q.scales.at_least(n_scales);
  auto* sums = reinterpret_cast<std::int32_t*>(q.sums.at_least(n_scales));
  q.source = x.data;
  q.has_rest = false;
  q.rows = {values, scales, sums, stride, block, n_blocks};
  for_rows(x.n_rows, dim, [&](std::int64_t r) {
    kernels.quantize_row(values + r * stride, scales + r * n_blocks, sums + r * n_blocks,
                         x.data + r * x.stride, dim, block);
  });
  return q;
}

// Rows as bf16, made once for all products of a call that share them.
const Bf16Rows& Workspace::round(const Rows& x, std::int64_t dim) {
  for (std::size_t i = 0; i < n_quantised_; ++i) {
    const Quantised& q = *quantised_[i];
    if (q.source == x.data && q.rows.block == 0) return q.rounded;
  }
  if (n_quantised_ == quantised_.size()) quantised_.push_back(std::make_unique<Quantised>());
  Quantised& q = *quantised_[n_quantised_++];
  const std::int64_t stride = ceil_div(dim, kLineBytes) * kLineBytes;
  auto* values = reinterpret_cast<std::uint16_t*>(
      q.values.at_least(static_cast<std::size_t>(x.n_rows * stride) / 2));
  q.source = x.data;
  q.rows = {};
  q.rounded = {values, stride};
  for_rows(x.n_rows, dim, [&](std::int64_t row) {
    kernels.round_row(values + row * stride, x.data + row * x.stride, dim);
  });
  return q.rounded;
}

Rows Workspace::rest_of(Quantised& q, const Rows& x, std::int64_t dim) {
  float* rest = q.rest.at_least(static_cast<std::size_t>(x.n_rows * dim));
  if (!q.has_rest) {
    for_rows(x.n_rows, dim, [&](std::int64_t r) {
      const std::int8_t* values = q.rows.values + r * q.rows.stride;
      const float* scales = q.rows.scales + r * q.rows.n_blocks;
      for (std::int64_t i = 0; i < dim; ++i) {
        rest[r * dim + i] =
            x.data[r * x.stride + i] - static_cast<float>(values[i]) * scales[i / q.rows.block];
      }
    });
    q.has_rest = true;
  }
  return {rest, x.n_rows, dim};
}

// Runs task(row) for every row, several rows to a thread's task.
template <class RowTask>
void Workspace::for_rows(std::int64_t n_rows, std::int64_t dim, RowTask task) {
  const std::int64_t step = std::max<std::int64_t>(1, kRowValues / dim);
  pool.parallel_for(ceil_div(n_rows, step), [&](std::int64_t i, int) {
    for (std::int64_t r = i * step; r < std::min((i + 1) * step, n_rows); ++r) task(r);
  });
}

void Workspace::cut(const Product& product, Terms terms, std::int64_t panel_step) {
  const std::int64_t n_panels = product.w->n_panels();
  const std::int64_t pieces = ceil_div(n_panels, panel_step);
  // Few panels and many rows (a router): cut the rows as well.
  const std::int64_t wanted = ceil_div(2 * pool.n_threads(), pieces);
  const std::int64_t row_step = std::max(kRowStep, ceil_div(product.n_rows, wanted));
  for (std::int64_t panel = 0; panel < n_panels; panel += panel_step) {
    const std::int64_t last = std::min(panel + panel_step, n_panels);
    for (std::int64_t row = 0; row < product.n_rows; row += row_step) {
      tasks_.push_back(
          {&product, terms, panel, last, row, std::min(row_step, product.n_rows - row)});
    }
  }
}

void Workspace::run(const Task& task, int worker) {
  const Product& p = *task.product;
  std::int64_t first = task.first_panel;  // counted from the segment's own first panel
  std::int64_t last = task.last_panel;
  for (const Segment& segment : p.w->segments) {
    if (last <= 0) break;
    if (first < segment.n_panels) {
      MatmulTask work{.w = &segment,
                      .x = p.x.data,
                      .x_stride = p.x.stride,
                      .rows = p.rows == nullptr ? nullptr : p.rows + task.first_row,
                      .first_row = p.first_row + task.first_row,
                      .n_rows = task.n_rows,
                      .y = p.y + task.first_row * p.y_stride,
                      .y_stride = p.y_stride,
                      .accumulate = p.accumulate};
      const std::int64_t from = std::max<std::int64_t>(first, 0);
      const std::int64_t to = std::min(last, segment.n_panels);
      if (task.terms.first != nullptr) {
        run_integer(work, task.terms, from, to);
      } else if (task.terms.bf16 != nullptr) {
        work.x16 = task.terms.bf16;
        kernels.matmul_bf16(work, from, to);
      } else {
        kernels.matmul(work, from, to,
                       scratch(worker, kernels.matmul_scratch_floats(segment, task.n_rows)));
      }
    }
    first -= segment.n_panels;
    last -= segment.n_panels;
  }
}

void Workspace::run_integer(MatmulTask work, Terms x8, std::int64_t first, std::int64_t last) {
  const bool accumulate = work.accumulate;
  const std::int64_t step = x8.second == nullptr ? last - first : kTermPanels;
  for (std::int64_t panel = first; panel < last; panel += step) {
    const std::int64_t end = std::min(panel + step, last);
    work.x8 = x8.first;
    work.accumulate = accumulate;
    kernels.matmul_int8(work, panel, end);
    if (x8.second == nullptr) continue;
    work.x8 = x8.second;
    work.accumulate = true;
    kernels.matmul_int8(work, panel, end);
  }
}

void Workspace::activate(float* act, const float* hidden, const float* factors, std::int64_t n_rows,
                         std::int64_t ffn_dim) {
  constexpr std::int64_t kColumns = 4096;  // one task; a row may be shared, it is elementwise
  const std::int64_t per_row = ceil_div(ffn_dim, kColumns);
  const auto piece = [&](std::int64_t i, int) {
    const std::int64_t row = i / per_row;
    const std::int64_t column = i % per_row * kColumns;
    const float* gate = hidden + row * 2 * ffn_dim + column;
    kernels.silu_mul_row(act + row * ffn_dim + column, gate, gate + ffn_dim, factors[row],
                         std::min(kColumns, ffn_dim - column));
  };
  pool.parallel_for(n_rows * per_row, piece);
}

}  // namespace camelid::cpu
