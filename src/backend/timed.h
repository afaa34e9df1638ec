// Any backend, with a clock around its calls: a timeline of each step without a profiler. While
// nobody asks for one, every call goes straight through.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "backend/clock.h"

namespace camelid {

// What is measured: nothing, each call of a step by itself, or the step as a whole, which leaves
// the device all its ways of letting neighbours overlap.
enum class Grain : std::uint8_t { kNothing, kCalls, kSteps };

// On the device's timeline, without the time it waited for the host.
struct TimedCall {
  std::string name;  // "matmul 7168 x 5120", "attend local", "step"
  double us = 0.0;
};

class TimedBackend final : public Backend {
 public:
  explicit TimedBackend(std::unique_ptr<Backend> backend)
      : backend_(std::move(backend)), clock_(backend_->make_clock()) {}

  // What was measured before is forgotten.
  void start(Grain grain);
  // In the order of the calls. Waits for the device.
  std::vector<TimedCall> stop();

  std::string describe() const override { return backend_->describe(); }
  std::size_t element_bytes(Role role) const override { return backend_->element_bytes(role); }
  std::int64_t row_stride(std::int64_t dim) const override { return backend_->row_stride(dim); }
  KvType widest_kv() const override { return backend_->widest_kv(); }
  std::size_t available_bytes() const override { return backend_->available_bytes(); }
  Buffer allocate(std::size_t bytes) override { return backend_->allocate(bytes); }
  Buffer reserve(std::size_t bytes) override { return backend_->reserve(bytes); }
  void commit(void* data, std::size_t bytes) override { backend_->commit(data, bytes); }
  void discard(void* data, std::size_t bytes) override { backend_->discard(data, bytes); }
  std::size_t page_bytes(const KvPages& pages) const override {
    return backend_->page_bytes(pages);
  }
  std::unique_ptr<Matrix> pack(std::span<const LinearSource> stack,
                               std::span<const PackOptions> options, Stack kind) override {
    return backend_->pack(stack, options, kind);
  }
  Buffer upload(std::span<const float> values) override { return backend_->upload(values); }
  void prepare(Experts& experts) override { backend_->prepare(experts); }
  std::size_t prepare_steps(std::int64_t n_tokens, std::int64_t query_dim) override {
    return backend_->prepare_steps(n_tokens, query_dim);
  }
  std::unique_ptr<Clock> make_clock() override { return backend_->make_clock(); }
  void download(float* out, Tensor x) override { backend_->download(out, x); }
  bool finds_top() const override { return backend_->finds_top(); }
  std::vector<TopLogits> top() override { return backend_->top(); }

  bool begin(const StepPlan& plan) override;
  bool end() override;
  void abandon() override;
  void embed(Tensor y, const Matrix& table) override;
  void norm(Tensor x, const Norm& norm) override;
  void norm_rows(Tensor x, const Norm& norm) override;
  void layer_norm(Tensor y, Tensor x, const Buffer& gain, const Buffer& bias, float eps) override;
  void add_bias(Tensor y, const Buffer& bias) override;
  void gelu(Tensor y) override;
  void matmul(Tensor y, Tensor x, const Matrix& w) override;
  void matmul_add(Tensor y, Tensor x, const Matrix& w, const Norm& then) override;
  void store_kv(Tensor qkv, const AttentionLayer& layer) override;
  void project_kv(Tensor qkv, Tensor x, const Matrix& w, const AttentionLayer& layer) override;
  void attend(Tensor y, Tensor qkv, const AttentionLayer& layer) override;
  void mlp(Tensor y, Tensor x, const Mlp& w, const Norm& then) override;
  void experts(Tensor y, Tensor x, const Experts& w, const Norm& then) override;
  void select_rows(Tensor y, Tensor x) override;
  void upload_rows(Tensor y, const float* rows) override;
  void find_top(Tensor logits) override;

 private:
  void open_step();
  void close_step();
  void mark(std::string name);  // of what lies between the last mark and this one
  template <class Name>
  void called(const Name& name) {  // what returns a name: none is made where nobody asks
    if (grain_ == Grain::kCalls) mark(name());
  }

  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Clock> clock_;
  Grain grain_ = Grain::kNothing;
  bool in_step_ = false;
  StepPlan plan_;                   // of the step under way, as one that nothing may have recorded
  std::vector<std::string> names_;  // of the times between marks; empty: between two steps
};

}  // namespace camelid
