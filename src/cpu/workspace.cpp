// How work is cut: pieces small enough that all threads finish together, large enough that each
// streams its weights. The cut never changes a result (kernels.h).
#include "cpu/workspace.h"

#include <algorithm>

#include "base/arena.h"

namespace camelid::cpu {
namespace {

// Tasks per thread: the last one to finish idles the others for at most an eighth of its share.
constexpr std::int64_t kTasksPerThread = 8;
// Panels a kernel multiplies at once: cutting between multiples of it wastes no vector.
constexpr std::int64_t kPanelStep = 4;
// Below this many multiplications, waking a thread costs more than it saves.
constexpr std::int64_t kWorthSharing = 1 << 17;
// Rows below which unpacking weights for one task again costs more than a thread gains.
constexpr std::int64_t kRowStep = 48;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

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

Workspace::Workspace(const Kernels& table, int n_threads)
    : kernels(table), pool(n_threads), scratch_(static_cast<std::size_t>(n_threads)) {}

float* Workspace::scratch(int worker, std::size_t n) {
  return scratch_[static_cast<std::size_t>(worker)].at_least(n);
}

void Workspace::multiply(std::span<const Product> products) {
  std::int64_t panels = 0;
  std::int64_t multiplications = 0;
  for (const Product& p : products) {
    if (p.n_rows == 0) continue;
    panels += p.w->n_panels();
    multiplications += p.n_rows * p.w->in_dim * p.w->out_dim;
  }
  const bool share = multiplications >= kWorthSharing && pool.n_threads() > 1;
  const std::int64_t n_tasks = share ? pool.n_threads() * kTasksPerThread : 1;
  const std::int64_t step = ceil_div(ceil_div(panels, n_tasks), kPanelStep) * kPanelStep;
  tasks_.clear();
  for (const Product& p : products) {
    if (p.n_rows > 0) cut(p, share ? step : p.w->n_panels());
  }
  if (share) {
    pool.parallel_for(static_cast<std::int64_t>(tasks_.size()), [this](std::int64_t i, int worker) {
      run(tasks_[static_cast<std::size_t>(i)], worker);
    });
  } else {
    for (const Task& task : tasks_) run(task, 0);
  }
}

void Workspace::cut(const Product& product, std::int64_t panel_step) {
  const std::int64_t n_panels = product.w->n_panels();
  const std::int64_t pieces = ceil_div(n_panels, panel_step);
  // Few panels and many rows (a router): cut the rows as well.
  const std::int64_t wanted = ceil_div(2 * pool.n_threads(), pieces);
  const std::int64_t row_step = std::max(kRowStep, ceil_div(product.n_rows, wanted));
  for (std::int64_t panel = 0; panel < n_panels; panel += panel_step) {
    const std::int64_t last = std::min(panel + panel_step, n_panels);
    for (std::int64_t row = 0; row < product.n_rows; row += row_step) {
      tasks_.push_back({&product, panel, last, row, std::min(row_step, product.n_rows - row)});
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
      const MatmulTask work{.w = &segment,
                            .x = p.x + task.first_row * p.x_stride,
                            .n_rows = task.n_rows,
                            .x_stride = p.x_stride,
                            .y = p.y + task.first_row * p.y_stride,
                            .y_stride = p.y_stride,
                            .accumulate = p.accumulate};
      kernels.matmul(work, std::max<std::int64_t>(first, 0), std::min(last, segment.n_panels),
                     scratch(worker, kernels.matmul_scratch_floats(segment, task.n_rows)));
    }
    first -= segment.n_panels;
    last -= segment.n_panels;
  }
}

void Workspace::activate(float* act, const float* hidden, std::int64_t n_rows,
                         std::int64_t ffn_dim) {
  constexpr std::int64_t kColumns = 4096;  // one task; a row may be shared, it is elementwise
  const std::int64_t per_row = ceil_div(ffn_dim, kColumns);
  const auto piece = [&](std::int64_t i, int) {
    const std::int64_t row = i / per_row;
    const std::int64_t column = i % per_row * kColumns;
    const float* gate = hidden + row * 2 * ffn_dim + column;
    kernels.silu_mul_row(act + row * ffn_dim + column, gate, gate + ffn_dim,
                         std::min(kColumns, ffn_dim - column));
  };
  pool.parallel_for(n_rows * per_row, piece);
}

}  // namespace camelid::cpu
