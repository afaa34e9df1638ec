// The Backend on a CPU: float32 activations, a thread pool, and a table of kernels. Decides how
// each operation is cut into tasks; the arithmetic is in *.inl.
#include "cpu/backend.h"

#include <algorithm>
#include <cstring>

#include "backend/clock.h"
#include "base/arena.h"
#include "base/error.h"
#include "cpu/experts.h"
#include "cpu/kernels.h"
#include "cpu/pack.h"
#include "cpu/workspace.h"

namespace camelid {
namespace cpu {
namespace {

// Queries (rows times the heads that share a kv head) of one attention task: enough to use each key
// many times; at head_dim 128 their sums of two pieces are 128 KiB, which with a page fit L2.
constexpr std::int64_t kAttendQueries = 128;
// Attention tasks per thread.
constexpr std::int64_t kAttendTasksPerThread = 8;
// Sums of pieces that wait to be merged, at most: many threads and long contexts would take
// gigabytes. Tasks beyond it keep their keys to themselves.
constexpr std::size_t kMostPartialFloats = std::size_t{8} << 20;
// Queries of a key up to which reading it takes longer than multiplying by it.
constexpr std::int64_t kFewQueries = 32;
// Values of one task of a row-wise operation; less than this is not worth waking a thread for.
constexpr std::int64_t kRowTaskValues = 1 << 15;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

float* row_of(Tensor x, std::int64_t row) {
  return static_cast<float*>(x.data) + row * x.row_stride;
}

const PackedMatrix& packed(const Matrix& matrix) {
  return static_cast<const PackedMatrix&>(matrix);
}

class CpuBackend final : public Backend {
 public:
  CpuBackend(const Kernels& kernels, int n_threads, bool fast)
      : work_(kernels, n_threads, fast), feed_forward_(work_) {}

  std::string describe() const override {
    const int n = work_.pool.n_threads();
    return cat("cpu: ", work_.kernels.name, ", ", n, n == 1 ? " thread" : " threads");
  }
  std::size_t element_bytes(Role) const override { return sizeof(float); }
  std::int64_t row_stride(std::int64_t dim) const override { return dim; }
  KvType widest_kv() const override { return KvType::kF32; }
  std::size_t available_bytes() const override { return available_memory(); }
  Buffer allocate(std::size_t bytes) override { return {map_memory(bytes), bytes}; }
  Buffer reserve(std::size_t bytes) override { return allocate(bytes); }
  void commit(void*, std::size_t) override {}  // untouched pages cost nothing
  void discard(void* data, std::size_t bytes) override { discard_memory(data, bytes); }
  std::size_t page_bytes(const KvPages& pages) const override {
    if (pages.type == KvType::kFp8) {
      fail(ErrorCode::kUnsupported, "[cpu] kv_cache=\"fp8\" is for GPUs; int8 is as small here.");
    }
    return static_cast<std::size_t>(pages.n_layers * pages.n_kv_heads) * kv_head_bytes(pages);
  }
  std::unique_ptr<Matrix> pack(std::span<const LinearSource> stack,
                               std::span<const PackOptions> options, Stack) override {
    return pack_matrix(stack, options, work_.kernels, work_.pool);
  }
  Buffer upload(std::span<const float> values) override {
    Buffer buffer = allocate(values.size_bytes());
    std::copy(values.begin(), values.end(), static_cast<float*>(buffer.data.get()));
    return buffer;
  }

  void prepare(Experts&) override {}
  // Its own scratch grows with use and is not counted.
  std::size_t prepare_steps(std::int64_t, std::int64_t) override { return 0; }
  std::unique_ptr<Clock> make_clock() override { return std::make_unique<HostClock>(); }

  bool begin(const StepPlan& plan) override {
    plan_ = &plan;
    return true;
  }
  bool end() override { return true; }
  void abandon() override {}
  void embed(Tensor y, const Matrix& table) override;
  void norm(Tensor x, const Norm& norm) override;
  void norm_rows(Tensor x, const Norm& norm) override;
  void layer_norm(Tensor y, Tensor x, const Buffer& gain, const Buffer& bias, float eps) override;
  void add_bias(Tensor y, const Buffer& bias) override;
  void gelu(Tensor y) override;
  void matmul(Tensor y, Tensor x, const Matrix& w) override { multiply(y, x, w, false); }
  void matmul_add(Tensor y, Tensor x, const Matrix& w, const Norm& then) override {
    multiply(y, x, w, true);
    norm(y, then);
  }
  void store_kv(Tensor qkv, const AttentionLayer& layer) override;
  void project_kv(Tensor qkv, Tensor x, const Matrix& w, const AttentionLayer& layer) override {
    multiply(qkv, x, w, false);
    store_kv(qkv, layer);
  }
  void attend(Tensor y, Tensor qkv, const AttentionLayer& layer) override;
  void mlp(Tensor y, Tensor x, const Mlp& w, const Norm& then) override {
    feed_forward_.mlp(y, x, w);
    norm(y, then);
  }
  void experts(Tensor y, Tensor x, const Experts& w, const Norm& then) override {
    feed_forward_.experts(y, x, w);
    norm(y, then);
  }
  void select_rows(Tensor y, Tensor x) override;
  void upload_rows(Tensor y, const float* rows) override;
  void download(float* out, Tensor x) override;
  bool finds_top() const override { return false; }  // reading all logits is as fast
  void find_top(Tensor) override {}
  std::vector<TopLogits> top() override { return {}; }

 private:
  const KvPlan& plan_of(const AttentionLayer& layer) const {
    return layer.local ? plan_->local : plan_->global;
  }
  void multiply(Tensor y, Tensor x, const Matrix& w, bool accumulate);
  void norm_row(const float* x, std::int64_t row, const Norm& norm);  // into `row` of its y
  template <class RowTask>
  void for_rows(std::int64_t n_rows, std::int64_t values_per_row, RowTask task);
  void plan_attention(Tensor y, Tensor qkv, const AttentionLayer& layer);
  // Parts a task of attention is cut into: of its kv heads, each of them into runs of pieces.
  struct Cut {
    std::int64_t heads = 1;
    std::int64_t runs = 1;
  };
  void cut_attention();
  void add_parts(AttendTask task, const Cut& cut);
  std::size_t partial_floats(const AttendTask& task) const;
  void store_row(float* qkv, const AttentionLayer& layer, const KvSpan& span, std::int64_t row);

  Workspace work_;
  FeedForward feed_forward_;
  const StepPlan* plan_ = nullptr;
  std::vector<AttendTask> attend_tasks_;  // rows, all their heads and keys
  std::vector<Cut> cuts_;                 // of each
  std::vector<AttendTask> pieces_;        // what they were cut into
  std::vector<AttendTask> merges_;        // one for each kv head of those with partials
  GrowingFloats partials_;
};

// Runs task(row) for every row, several rows to a thread's task.
template <class RowTask>
void CpuBackend::for_rows(std::int64_t n_rows, std::int64_t values_per_row, RowTask task) {
  const std::int64_t step = std::max<std::int64_t>(1, kRowTaskValues / values_per_row);
  work_.pool.parallel_for((n_rows + step - 1) / step, [&](std::int64_t i, int) {
    for (std::int64_t row = i * step; row < std::min((i + 1) * step, n_rows); ++row) task(row);
  });
}

void CpuBackend::embed(Tensor y, const Matrix& table) {
  const Segment& rows = packed(table).segments.front();
  for_rows(y.n_rows, y.dim, [&](std::int64_t row) {
    work_.kernels.unpack_row(row_of(y, row), rows, plan_->tokens[static_cast<std::size_t>(row)]);
  });
}

void CpuBackend::norm_row(const float* x, std::int64_t row, const Norm& norm) {
  const auto* gain = static_cast<const float*>(norm.gain->data.get());
  work_.kernels.norm_row(row_of(norm.y, row), x, gain, norm.y.dim, norm.eps);
}

void CpuBackend::norm(Tensor x, const Norm& norm) {
  if (norm.gain == nullptr) return;
  for_rows(x.n_rows, x.dim, [&](std::int64_t row) { norm_row(row_of(x, row), row, norm); });
}

void CpuBackend::norm_rows(Tensor x, const Norm& norm) {
  for_rows(norm.y.n_rows, x.dim, [&](std::int64_t row) {
    norm_row(row_of(x, plan_->rows[static_cast<std::size_t>(row)]), row, norm);
  });
}

void CpuBackend::layer_norm(Tensor y, Tensor x, const Buffer& gain, const Buffer& bias, float eps) {
  const auto* gains = static_cast<const float*>(gain.data.get());
  const auto* biases = static_cast<const float*>(bias.data.get());
  for_rows(x.n_rows, x.dim, [&](std::int64_t row) {
    work_.kernels.layer_norm_row(row_of(y, row), row_of(x, row), gains, biases, x.dim, eps);
  });
}

void CpuBackend::add_bias(Tensor y, const Buffer& bias) {
  if (bias.bytes == 0) return;
  const auto* biases = static_cast<const float*>(bias.data.get());
  for_rows(y.n_rows, y.dim,
           [&](std::int64_t row) { work_.kernels.add_row(row_of(y, row), biases, y.dim); });
}

void CpuBackend::gelu(Tensor y) {
  for_rows(y.n_rows, y.dim,
           [&](std::int64_t row) { work_.kernels.gelu_row(row_of(y, row), y.dim); });
}

void CpuBackend::multiply(Tensor y, Tensor x, const Matrix& w, bool accumulate) {
  const Product product{.w = &packed(w),
                        .x = {row_of(x, 0), x.n_rows, x.row_stride},
                        .n_rows = x.n_rows,
                        .y = row_of(y, 0),
                        .y_stride = y.row_stride,
                        .accumulate = accumulate};
  work_.multiply({&product, 1});
}

void CpuBackend::store_row(float* qkv, const AttentionLayer& layer, const KvSpan& span,
                           std::int64_t row) {
  const KvPlan& plan = plan_of(layer);
  const KvPages& pages = plan.pages;
  const std::int64_t index = span.first_index + (row - span.first_row);
  StoreTask task;
  task.pages = &pages;
  task.layer = &layer;
  task.n_heads = plan.n_heads;
  task.qkv = qkv;
  if (layer.rotate) task.rotation = plan_of(layer).rotation.data() + row * pages.head_dim;
  if (layer.scale_queries) task.query_scale = plan_->query_scale[static_cast<std::size_t>(row)];
  task.page = span.pages[index / pages.page_size];
  task.slot = index % pages.page_size;
  work_.kernels.store_kv(task);
}

void CpuBackend::store_kv(Tensor qkv, const AttentionLayer& layer) {
  for (const KvSpan& span : plan_of(layer).spans) {
    for_rows(span.n_rows, qkv.dim, [&](std::int64_t i) {
      const std::int64_t row = span.first_row + i;
      store_row(row_of(qkv, row), layer, span, row);
    });
  }
}

void CpuBackend::plan_attention(Tensor y, Tensor qkv, const AttentionLayer& layer) {
  const KvPlan& plan = plan_of(layer);
  const std::int64_t group = plan.n_heads / plan.pages.n_kv_heads;
  const std::int64_t step = std::max<std::int64_t>(1, kAttendQueries / group);
  attend_tasks_.clear();
  for (const KvSpan& span : plan.spans) {
    for (std::int64_t done = 0; done < span.n_rows; done += step) {
      AttendTask task;
      task.pages = &plan.pages;
      task.span = &span;
      task.kv_layer = layer.kv_layer;
      task.last_kv_head = plan.pages.n_kv_heads;
      task.n_heads = plan.n_heads;
      task.causal = plan.causal;
      task.first_row = span.first_row + done;
      task.n_rows = std::min(step, span.n_rows - done);
      task.q = row_of(qkv, 0);
      task.q_stride = qkv.row_stride;
      task.y = row_of(y, 0);
      task.y_stride = y.row_stride;
      task.n_pieces =
          count_pieces(span.first_index + (plan.causal ? done + task.n_rows : span.n_rows));
      task.last_piece = task.n_pieces;
      attend_tasks_.push_back(task);
    }
  }
}

// Cuts tasks of all heads and keys until there are enough to keep all threads busy. Many queries
// are bound by arithmetic: by heads first, so that each key is used while it is in the cache. Few
// are bound by memory, which is read best in long runs: by keys first.
void CpuBackend::cut_attention() {
  const auto n_tasks = static_cast<std::int64_t>(attend_tasks_.size());
  const std::int64_t wanted =
      work_.pool.n_threads() == 1 ? 1 : kAttendTasksPerThread * work_.pool.n_threads();
  const std::int64_t parts = ceil_div(wanted, std::max<std::int64_t>(n_tasks, 1));  // of each
  std::size_t n_floats = 0;
  cuts_.clear();
  for (const AttendTask& task : attend_tasks_) {
    const std::int64_t n_kv_heads = task.last_kv_head;
    Cut cut;
    if (task.n_rows * task.n_heads / n_kv_heads > kFewQueries) {
      cut = {n_kv_heads, std::min(ceil_div(parts, n_kv_heads), task.n_pieces)};
    } else {
      const std::int64_t runs = std::min(parts, task.n_pieces);
      cut = {std::min(ceil_div(parts, runs), n_kv_heads), runs};
    }
    if (cut.runs > 1 && n_floats + partial_floats(task) > kMostPartialFloats) cut.runs = 1;
    if (cut.runs > 1) n_floats += partial_floats(task);
    cuts_.push_back(cut);
  }
  float* partials = partials_.at_least(n_floats);
  pieces_.clear();
  merges_.clear();
  for (std::size_t i = 0; i < attend_tasks_.size(); ++i) {
    AttendTask& task = attend_tasks_[i];
    if (cuts_[i].runs > 1) {
      task.partials = partials;
      partials += partial_floats(task);
    }
    add_parts(task, cuts_[i]);
  }
}

std::size_t CpuBackend::partial_floats(const AttendTask& task) const {
  return static_cast<std::size_t>(task.pages->n_kv_heads * task.n_pieces) *
         work_.kernels.attend_partial_floats(task);
}

void CpuBackend::add_parts(AttendTask task, const Cut& cut) {
  const std::int64_t n_kv_heads = task.last_kv_head;
  for (std::int64_t part = 0; part < cut.heads; ++part) {
    task.first_kv_head = part * n_kv_heads / cut.heads;
    task.last_kv_head = (part + 1) * n_kv_heads / cut.heads;
    for (std::int64_t run = 0; run < cut.runs; ++run) {
      task.first_piece = run * task.n_pieces / cut.runs;
      task.last_piece = (run + 1) * task.n_pieces / cut.runs;
      pieces_.push_back(task);
    }
  }
  if (task.partials == nullptr) return;
  for (std::int64_t head = 0; head < n_kv_heads; ++head) {
    task.first_kv_head = head;
    task.last_kv_head = head + 1;
    merges_.push_back(task);
  }
}

void CpuBackend::attend(Tensor y, Tensor qkv, const AttentionLayer& layer) {
  plan_attention(y, qkv, layer);
  cut_attention();
  const auto n_tasks = static_cast<std::int64_t>(pieces_.size());
  const Kernels& kernels = work_.kernels;
  const bool in_bf16 =
      work_.fast && kernels.attend_bf16 != nullptr && plan_of(layer).pages.type == KvType::kBf16;
  const auto attend_task = in_bf16 ? kernels.attend_bf16 : kernels.attend;
  work_.pool.parallel_for(n_tasks, [&](std::int64_t i, int worker) {
    // From the end: the later rows of a prompt see more keys, so the long tasks go first.
    const AttendTask& task = pieces_[static_cast<std::size_t>(n_tasks - 1 - i)];
    attend_task(task, work_.scratch(worker, kernels.attend_scratch_floats(task)));
  });
  work_.pool.parallel_for(static_cast<std::int64_t>(merges_.size()), [&](std::int64_t i, int) {
    kernels.merge_attention(merges_[static_cast<std::size_t>(i)]);
  });
}

void CpuBackend::select_rows(Tensor y, Tensor x) {
  for (std::size_t i = 0; i < plan_->rows.size(); ++i) {
    std::memcpy(row_of(y, static_cast<std::int64_t>(i)), row_of(x, plan_->rows[i]),
                static_cast<std::size_t>(x.dim) * sizeof(float));
  }
}

void CpuBackend::upload_rows(Tensor y, const float* rows) {
  for (std::int64_t row = 0; row < y.n_rows; ++row, rows += y.dim) {
    std::memcpy(row_of(y, row), rows, static_cast<std::size_t>(y.dim) * sizeof(float));
  }
}

void CpuBackend::download(float* out, Tensor x) {
  for (std::int64_t row = 0; row < x.n_rows; ++row, out += x.dim) {
    std::memcpy(out, row_of(x, row), static_cast<std::size_t>(x.dim) * sizeof(float));
  }
}

}  // namespace
}  // namespace cpu

std::unique_ptr<Backend> make_cpu_backend(const BackendOptions& options, std::string_view isa) {
  const cpu::Kernels& kernels = isa.empty() ? cpu::select_kernels() : cpu::kernels_by_name(isa);
  const int n_threads = options.threads == 0 ? default_threads() : options.threads;
  // Far above any machine: only there to refuse a mistake before it starts that many threads.
  constexpr int kMostThreads = 1024;
  if (n_threads < 1 || n_threads > kMostThreads) {
    fail(ErrorCode::kInvalidRequest, "[cpu] threads is ", options.threads,
         ", expected 0 (choose) to ", kMostThreads, ".");
  }
  return std::make_unique<cpu::CpuBackend>(kernels, n_threads, options.fast);
}

}  // namespace camelid
