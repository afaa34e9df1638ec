// Everything the model may ask of a machine, at the grain the model speaks. Calls run in order;
// only download() and top() wait. Callers (model/, step/) pass checked shapes, so a backend may
// trust them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "backend/step_plan.h"
#include "base/tensor.h"
#include "base/top_logits.h"
#include "quant/format.h"

namespace camelid {

class Clock;

// Device memory that frees itself. On the CPU untouched pages cost nothing.
struct Buffer {
  std::shared_ptr<void> data;
  std::size_t bytes = 0;
};

// One or more linears that share an input, stacked along out_dim, packed as the backend likes them.
class Matrix {
 public:
  virtual ~Matrix() = default;
  std::int64_t out_dim = 0;
  std::int64_t in_dim = 0;
  std::size_t bytes = 0;  // resident
};

struct Mlp {
  std::unique_ptr<Matrix> gate_up;  // [2 * ffn_dim, dim]: gate over up
  std::unique_ptr<Matrix> down;     // [dim, ffn_dim]
};

struct Experts {
  std::unique_ptr<Matrix> router;  // [n_experts, dim]
  std::vector<Mlp> routed;
  Mlp shared;
  std::int64_t top_k = 1;
  std::shared_ptr<void> prepared;  // what the backend's prepare() keeps of them
};

// An RMS norm of rows x into operands: y = x / sqrt(mean(x^2) + eps) * gain. Only products may read
// y: a backend may leave it to them to finish it.
struct Norm {
  Tensor y;
  const Buffer* gain = nullptr;  // null: none
  float eps = 0.0f;
};

// Why linears are stacked. Of gate over up (two of the same size) a backend may mix the rows, since
// both meet in SwiGLU: only mlp() and experts() take such a matrix.
enum class Stack : std::uint8_t { kPlain, kGateUp };

class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string describe() const = 0;                // "cpu: avx512, 2 threads"
  virtual std::size_t element_bytes(Role role) const = 0;  // of a Tensor
  // Of a Tensor whose rows products take: from row to row, in elements, at least dim.
  virtual std::int64_t row_stride(std::int64_t dim) const = 0;
  virtual KvType widest_kv() const = 0;             // what loses least
  virtual std::size_t available_bytes() const = 0;  // memory this process may still take
  virtual Buffer allocate(std::size_t bytes) = 0;   // throws kCapacity
  // Address space of which only what commit() names takes memory, until discard() does.
  virtual Buffer reserve(std::size_t bytes) = 0;
  virtual void commit(void* data, std::size_t bytes) = 0;   // throws kCapacity
  virtual void discard(void* data, std::size_t bytes) = 0;  // contents no longer needed
  virtual std::size_t page_bytes(const KvPages& pages) const = 0;

  // Packs a stack of linears; each source keeps its own format where options do not change it.
  virtual std::unique_ptr<Matrix> pack(std::span<const LinearSource> stack,
                                       std::span<const PackOptions> options,
                                       Stack kind = Stack::kPlain) = 0;
  virtual Buffer upload(std::span<const float> values) = 0;
  // Once, when all weights of a layer's experts are packed. Throws kUnsupported.
  virtual void prepare(Experts& experts) = 0;
  // Takes what steps of up to so many tokens need beyond their tensors, once all weights are there,
  // so that none has to wait for it. Returns its bytes; throws kCapacity.
  virtual std::size_t prepare_steps(std::int64_t n_tokens, std::int64_t query_dim) = 0;
  virtual std::unique_ptr<Clock> make_clock() = 0;  // of the calls from here on

  // Starts a step; `plan` outlives it. False where the calls up to end() need not be made: they
  // were recorded at an earlier step of the same kind, and end() makes them again.
  virtual bool begin(const StepPlan& plan) = 0;
  virtual bool end() = 0;      // false where the step must be begun again: nothing has run
  virtual void abandon() = 0;  // instead of end(), after a call that threw
  virtual void embed(Tensor y, const Matrix& table) = 0;  // of the plan's tokens
  virtual void norm(Tensor x, const Norm& norm) = 0;
  virtual void norm_rows(Tensor x, const Norm& norm) = 0;  // of x[plan.rows[i]]
  virtual void layer_norm(Tensor y, Tensor x, const Buffer& gain, const Buffer& bias,
                          float eps) = 0;
  virtual void add_bias(Tensor y, const Buffer& bias) = 0;  // to every row; none where it is empty
  virtual void gelu(Tensor y) = 0;                          // in place, by erf
  virtual void matmul(Tensor y, Tensor x, const Matrix& w) = 0;  // y = x w^T
  // y += x w^T, and then a norm of y, if any.
  virtual void matmul_add(Tensor y, Tensor x, const Matrix& w, const Norm& then) = 0;
  // qkv: [n_tokens, (n_heads + 2 n_kv_heads) * head_dim]. Finishes q in place; k, v go to pages.
  virtual void store_kv(Tensor qkv, const AttentionLayer& layer) = 0;
  // matmul(qkv, x, w), then store_kv(qkv, layer).
  virtual void project_kv(Tensor qkv, Tensor x, const Matrix& w, const AttentionLayer& layer) = 0;
  virtual void attend(Tensor y, Tensor qkv, const AttentionLayer& layer) = 0;  // y: [n, heads * hd]
  // y += down(silu(gate x) * up x), and y += shared(x) + routed experts of sigmoid(router x) * x,
  // and then a norm of y, if any; its y may be x.
  virtual void mlp(Tensor y, Tensor x, const Mlp& w, const Norm& then) = 0;
  virtual void experts(Tensor y, Tensor x, const Experts& w, const Norm& then) = 0;
  virtual void select_rows(Tensor y, Tensor x) = 0;           // y[i] = x[plan.rows[i]]
  virtual void upload_rows(Tensor y, const float* rows) = 0;  // [n_rows, dim] float32
  virtual void download(float* out, Tensor x) = 0;            // [n_rows, dim] float32, waits
  // Backends whose memory the host cannot read: find_top() looks at the logits of the plan's rows,
  // and top() waits for what it found; it holds until the next find_top().
  virtual bool finds_top() const = 0;
  virtual void find_top(Tensor logits) = 0;
  virtual std::vector<TopLogits> top() = 0;
};

// Makes the calls of one step.
template <class Calls>
void run_step(Backend& backend, const StepPlan& plan, const Calls& calls) {
  try {
    do {
      if (backend.begin(plan)) calls();
    } while (!backend.end());
  } catch (...) {
    backend.abandon();
    throw;
  }
}

struct BackendOptions {
  std::string device = "auto";  // auto | cpu | cuda | cuda:N
  int threads = 0;              // 0: physical cores this process may use
  bool fast = false;            // activations may be rounded to what multiplies fastest
};
// The table of backends (registry.cpp). Throws kUnsupported with one sentence.
std::unique_ptr<Backend> make_backend(const BackendOptions& options);

}  // namespace camelid
