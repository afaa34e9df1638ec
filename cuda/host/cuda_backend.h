// The Backend on one GPU. Sums are float32, operands bf16; every call is a launch or a few, in the
// order of one stream.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "base/threads.h"
#include "device/gpu.h"
#include "device/memory.h"
#include "device/reservation.h"
#include "device/uploader.h"
#include "host/feed_forward.h"
#include "host/norms.h"
#include "host/products.h"
#include "host/recordings.h"
#include "host/step_arrays.h"
#include "ops/store_kv.h"

namespace camelid::cuda {

class CudaBackend final : public Backend {
 public:
  // GPU number `ordinal`, which exists; n_threads pack weights.
  CudaBackend(int ordinal, int n_threads);

  std::string describe() const override;
  std::size_t element_bytes(Role role) const override;
  std::int64_t row_stride(std::int64_t dim) const override;
  KvType widest_kv() const override { return KvType::kBf16; }
  std::size_t available_bytes() const override;
  Buffer allocate(std::size_t bytes) override;
  Buffer reserve(std::size_t bytes) override;
  void commit(void* data, std::size_t bytes) override;
  void discard(void* data, std::size_t bytes) override;
  std::size_t page_bytes(const KvPages& pages) const override;
  std::unique_ptr<Matrix> pack(std::span<const LinearSource> stack,
                               std::span<const PackOptions> options, Stack kind) override;
  Buffer upload(std::span<const float> values) override;
  void prepare(Experts& experts) override;
  std::size_t prepare_steps(std::int64_t n_tokens, std::int64_t query_dim) override;
  std::unique_ptr<Clock> make_clock() override;

  bool begin(const StepPlan& plan) override;
  bool end() override { return recordings_.end(); }
  void abandon() override { recordings_.abandon(); }
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
  void download(float* out, Tensor x) override;
  bool finds_top() const override { return true; }
  void find_top(Tensor logits) override;
  std::vector<camelid::TopLogits> top() override;

 private:
  StoreKv store_of(const Tensor& qkv, const AttentionLayer& layer);
  void use() const { use_gpu(ordinal_); }  // callers come from any thread
  Reservation& reservation_of(void* data);
  std::size_t backed_bytes() const;  // of all reservations
  std::size_t reclaim();             // memory of discarded pages

  int ordinal_;
  Stream stream_;  // the first of what follows, and so the last to go
  Gpu gpu_;
  std::string name_;
  ThreadPool pool_;  // for packing
  Uploader uploader_;
  Norms norms_;
  Products products_;
  FeedForward feed_forward_;
  StepArrays step_;
  GrowingMemory q_, staged_rows_;  // queries between store_kv and attend; what upload_rows sends
  GrowingMemory top_, top_scratch_, top_counters_;
  std::int32_t top_rows_ = 0;  // of the last step that looked for them
  PinnedMemory downloaded_;
  std::size_t downloaded_bytes_ = 0;
  PinnedMemory top_on_host_;
  std::int32_t top_capacity_ = 0;                             // rows
  std::map<void*, std::weak_ptr<Reservation>> reservations_;  // by where they begin
  Recordings recordings_;
};

}  // namespace camelid::cuda
