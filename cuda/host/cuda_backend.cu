// Every call of the seam, in terms of kernels. It decides no kernel but attention's.
#include "host/cuda_backend.h"

#include <cstring>
#include <utility>

#include "base/error.h"
#include "host/stream_clock.h"
#include "ops/attention.h"
#include "ops/top_logits.h"
#include "sm90/attention_many.h"

namespace camelid::cuda {
namespace {

const DeviceMatrix& on_device(const Matrix& matrix) {
  return static_cast<const DeviceMatrix&>(matrix);
}

const float* floats(const Buffer& buffer) { return static_cast<const float*>(buffer.data.get()); }

}  // namespace

CudaBackend::CudaBackend(int ordinal, int n_threads)
    : ordinal_((use_gpu(ordinal), ordinal)),
      gpu_{multiprocessors(), compute_capability(), stream_.get()},
      name_(
          cat("cuda:", ordinal, ": ", gpu_name(), ", ", gpu_.multiprocessors, " multiprocessors")),
      pool_(n_threads),
      uploader_(gpu_.stream),
      norms_(gpu_.stream),
      products_(gpu_, norms_),
      feed_forward_(gpu_, products_, norms_),
      step_(gpu_),
      recordings_(gpu_.stream) {}

std::string CudaBackend::describe() const {
  const std::string& why_not = recordings_.why_not();
  return why_not.empty()
             ? name_
             : cat(name_, "; slower than it should be, steps are not recorded: ", why_not);
}

std::size_t CudaBackend::element_bytes(Role role) const {
  return role == Role::kSum ? sizeof(float) : sizeof(std::uint16_t);
}

// Rows of operands begin at multiples of 16 bytes.
std::int64_t CudaBackend::row_stride(std::int64_t dim) const { return (dim + 7) / 8 * 8; }

// ---- memory ----

std::size_t CudaBackend::available_bytes() const {
  use();
  return free_bytes();
}

std::size_t CudaBackend::reclaim() {
  finish(gpu_.stream);
  std::size_t n = 0;
  for (auto& [base, weak] : reservations_) {
    if (const auto reservation = weak.lock()) n += reservation->reclaim() ? 1 : 0;
  }
  return n;
}

Buffer CudaBackend::allocate(std::size_t bytes) {
  use();
  const auto take = [&] {
    DeviceMemory memory = allocate_device(bytes);
    std::byte* at = memory.get();
    return Buffer{
        std::shared_ptr<void>(at, [memory = std::move(memory)](void*) mutable { memory.reset(); }),
        bytes};
  };
  try {
    return take();
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kCapacity || reclaim() == 0) throw;
  }
  return take();
}

Buffer CudaBackend::reserve(std::size_t bytes) {
  use();
  auto reservation = std::make_shared<Reservation>(bytes);
  reservations_[reservation->data()] = reservation;
  return {std::shared_ptr<void>(reservation, reservation->data()), bytes};
}

std::size_t CudaBackend::backed_bytes() const {
  std::size_t bytes = 0;
  for (const auto& [base, weak] : reservations_) {
    if (const auto reservation = weak.lock()) bytes += reservation->backed_bytes();
  }
  return bytes;
}

Reservation& CudaBackend::reservation_of(void* data) {
  const auto after = reservations_.upper_bound(data);
  return *std::prev(after)->second.lock();
}

void CudaBackend::commit(void* data, std::size_t bytes) {
  use();
  Reservation& reservation = reservation_of(data);
  try {
    reservation.commit(data, bytes);
    if (backed_bytes() > reservation.bytes()) reclaim();
    return;
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kCapacity || reclaim() == 0) throw;
  }
  reservation.commit(data, bytes);
}

void CudaBackend::discard(void* data, std::size_t bytes) {
  reservation_of(data).discard(data, bytes);
}

std::size_t CudaBackend::page_bytes(const KvPages& pages) const {
  return static_cast<std::size_t>(kv_shape(pages).page_bytes());
}

// ---- weights ----

std::unique_ptr<Matrix> CudaBackend::pack(std::span<const LinearSource> stack,
                                          std::span<const PackOptions> options, Stack kind) {
  use();
  auto matrix = pack_matrix(stack, options, kind, uploader_, pool_);
  products_.prepare(*matrix);
  if (kind == Stack::kGateUp) feed_forward_.expect(*matrix);
  return matrix;
}

Buffer CudaBackend::upload(std::span<const float> values) {
  Buffer buffer = allocate(values.size_bytes());
  uploader_.copy(static_cast<std::byte*>(buffer.data.get()), values.data(), values.size_bytes());
  return buffer;
}

void CudaBackend::prepare(Experts& experts) {
  use();
  feed_forward_.prepare(experts, uploader_);
}

std::size_t CudaBackend::prepare_steps(std::int64_t n_tokens, std::int64_t query_dim) {
  use();
  uploader_.release();  // nothing is packed any more
  feed_forward_.prepare_steps(n_tokens);
  q_.at_least(static_cast<std::size_t>(n_tokens * query_dim) * sizeof(std::uint16_t));
  return norms_.bytes() + products_.bytes() + feed_forward_.bytes() + q_.bytes();
}

std::unique_ptr<Clock> CudaBackend::make_clock() {
  use();
  return std::make_unique<StreamClock>(ordinal_, gpu_.stream);
}

// ---- a step ----

bool CudaBackend::begin(const StepPlan& plan) {
  use();
  step_.set(plan);
  norms_.forget();
  if (!plan.sampling_scale.empty()) top_rows_ = step_.n_rows();
  const KindArrays &local = step_.kind(true), &global = step_.kind(false);
  const StepKind kind{step_.n_tokens(), step_.n_rows(), local.pool.base, global.pool.base};
  const bool repeatable = plan.repeatable && local.n_many == 0 && global.n_many == 0;
  return recordings_.begin(repeatable ? &kind : nullptr);
}

void CudaBackend::embed(Tensor y, const Matrix& table) {
  const Segment& segment = on_device(table).segments.front();
  Table rows;
  if (segment.is_tiled) {
    rows.tiled = segment.tiled;
  } else {
    rows.plain = segment.plain.at;
    rows.stride = segment.plain.stride;
  }
  cuda::embed(rows_of(y), step_.tokens(), rows, gpu_.stream);
}

void CudaBackend::norm(Tensor x, const Norm& norm) { norms_.run(norm, x); }

void CudaBackend::norm_rows(Tensor x, const Norm& norm) { norms_.run(norm, x, step_.rows()); }

void CudaBackend::layer_norm(Tensor y, Tensor x, const Buffer& gain, const Buffer& bias,
                             float eps) {
  cuda::layer_norm(rows_of(y), rows_of(x), floats(gain), floats(bias), eps, gpu_.stream);
}

void CudaBackend::add_bias(Tensor y, const Buffer& bias) {
  if (bias.bytes > 0) cuda::add_bias(rows_of(y), floats(bias), gpu_.stream);
}

void CudaBackend::gelu(Tensor y) { cuda::gelu(rows_of(y), gpu_.stream); }

void CudaBackend::matmul(Tensor y, Tensor x, const Matrix& w) {
  products_.multiply(y, x, on_device(w));
}

void CudaBackend::matmul_add(Tensor y, Tensor x, const Matrix& w, const Norm& then) {
  products_.multiply_add(y, x, on_device(w), then);
}

StoreKv CudaBackend::store_of(const Tensor& qkv, const AttentionLayer& layer) {
  const KindArrays& kind = step_.kind(layer.local);
  StoreKv call;
  call.pool = kind.pool;
  call.kv_layer = static_cast<std::int32_t>(layer.kv_layer);
  call.n_heads = kind.n_heads;
  call.n_tokens = static_cast<std::int32_t>(qkv.n_rows);
  call.qkv = static_cast<const float*>(qkv.data);
  call.qkv_stride = qkv.row_stride;
  call.q_stride = std::int64_t{kind.n_heads} * kind.pool.shape.head_dim;
  const auto n_values = static_cast<std::size_t>(qkv.n_rows * call.q_stride);
  call.q = reinterpret_cast<std::uint16_t*>(q_.at_least(n_values * sizeof(std::uint16_t)));
  call.places = kind.places;
  if (layer.rotate) call.rotation = kind.rotation;
  call.qk_norm = layer.qk_norm;
  call.eps = layer.eps;
  if (layer.scale_queries) call.query_scale = step_.query_scale();
  return call;
}

void CudaBackend::store_kv(Tensor qkv, const AttentionLayer& layer) {
  cuda::store_kv(store_of(qkv, layer), gpu_.stream);
}

void CudaBackend::project_kv(Tensor qkv, Tensor x, const Matrix& w, const AttentionLayer& layer) {
  products_.project(qkv, x, on_device(w), store_of(qkv, layer));
}

void CudaBackend::attend(Tensor y, Tensor qkv, const AttentionLayer& layer) {
  const KindArrays& kind = step_.kind(layer.local);
  Attention call;
  call.pool = kind.pool;
  call.kv_layer = static_cast<std::int32_t>(layer.kv_layer);
  call.n_heads = kind.n_heads;
  call.causal = kind.causal;
  call.page_table = kind.page_table;
  call.q = reinterpret_cast<const std::uint16_t*>(q_.get());
  call.q_stride = std::int64_t{kind.n_heads} * kind.pool.shape.head_dim;
  call.y = static_cast<std::uint16_t*>(y.data);
  call.y_stride = y.row_stride;
  call.partials = kind.partials;
  call.counters = kind.counters;
  static_cast<void>(qkv);  // its queries went to q_
  if (kind.few_count > 0) {
    call.items = kind.few;
    call.n_items = kind.n_few;
    attend_few(call, gpu_.multiprocessors, gpu_.stream);
  }
  if (kind.n_many > 0) {
    call.items = kind.many;
    const auto attend = kind.hopper_many ? sm90::attend_many : attend_many;
    attend(call, kind.n_many, gpu_.multiprocessors, gpu_.stream);
  }
}

void CudaBackend::mlp(Tensor y, Tensor x, const Mlp& w, const Norm& then) {
  feed_forward_.mlp(y, x, w, then);
}

void CudaBackend::experts(Tensor y, Tensor x, const Experts& w, const Norm& then) {
  feed_forward_.experts(y, x, w, then);
}

void CudaBackend::select_rows(Tensor y, Tensor x) {
  copy_rows(rows_of(y), rows_of(x), step_.rows(), gpu_.stream);
}

void CudaBackend::upload_rows(Tensor y, const float* rows) {
  const auto row_bytes = static_cast<std::size_t>(y.dim) * sizeof(float);
  const std::size_t bytes = static_cast<std::size_t>(y.n_rows) * row_bytes;
  std::byte* to = staged_rows_.at_least(bytes);
  uploader_.copy(to, rows, bytes);
  const Tensor staged{to, y.n_rows, y.dim, y.dim, Role::kSum};
  copy_rows(rows_of(y), rows_of(staged), nullptr, gpu_.stream);
}

void CudaBackend::find_top(Tensor logits) {
  const auto vocab = static_cast<std::int32_t>(logits.dim);
  const auto n_rows = static_cast<std::size_t>(logits.n_rows);
  const std::size_t bytes = n_rows * sizeof(TopLogits);
  auto* found = reinterpret_cast<TopLogits*>(top_.at_least(bytes));
  std::byte* scratch = top_scratch_.at_least(top_logits_scratch_bytes(top_rows_, vocab));
  auto* counters = reinterpret_cast<unsigned*>(
      top_counters_.at_least_zeroed(n_rows * sizeof(unsigned), gpu_.stream));
  top_logits(found, static_cast<const float*>(logits.data), logits.row_stride, step_.sampling(),
             top_rows_, vocab, scratch, counters, gpu_.stream);
}

std::vector<camelid::TopLogits> CudaBackend::top() {
  use();
  if (top_capacity_ < top_rows_) {
    top_capacity_ = top_rows_;
    top_on_host_ = allocate_pinned(static_cast<std::size_t>(top_capacity_) * sizeof(TopLogits));
  }
  const std::size_t bytes = static_cast<std::size_t>(top_rows_) * sizeof(TopLogits);
  copy_to_host(top_on_host_.get(), top_.get(), bytes, gpu_.stream);
  finish(gpu_.stream);
  const auto* found = reinterpret_cast<const TopLogits*>(top_on_host_.get());
  std::vector<camelid::TopLogits> result;
  for (std::int32_t row = 0; row < top_rows_; ++row) {
    const TopLogits& t = found[row];
    const auto n = static_cast<std::size_t>(t.n);
    result.push_back(
        {{t.logits, n}, {t.tokens, n}, t.sum, t.scaled_sum, t.not_finite, t.drawn, t.drawn_logit});
  }
  return result;
}

void CudaBackend::download(float* out, Tensor x) {
  const auto stride_bytes = static_cast<std::size_t>(x.row_stride) * sizeof(float);
  const std::size_t bytes = static_cast<std::size_t>(x.n_rows) * stride_bytes;
  if (downloaded_bytes_ < bytes) {
    downloaded_ = allocate_pinned(bytes);
    downloaded_bytes_ = bytes;
  }
  copy_to_host(downloaded_.get(), static_cast<const std::byte*>(x.data), bytes, gpu_.stream);
  finish(gpu_.stream);
  for (std::int64_t row = 0; row < x.n_rows; ++row, out += x.dim) {
    std::memcpy(out, downloaded_.get() + static_cast<std::size_t>(row) * stride_bytes,
                static_cast<std::size_t>(x.dim) * sizeof(float));
  }
}

}  // namespace camelid::cuda
