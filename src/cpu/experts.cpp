// Routed experts as one list of matrix products: counting sort by expert, gate and up of everyone,
// SiLU, down of everyone, then each token adds what is its own. The router's factor on an expert's
// input is applied after gate and up, which are linear: all experts read the same rows.
#include "cpu/experts.h"

#include <algorithm>
#include <cmath>

namespace camelid::cpu {
namespace {

const PackedMatrix& packed(const std::unique_ptr<Matrix>& matrix) {
  return static_cast<const PackedMatrix&>(*matrix);
}

const float* row_of(Tensor x, std::int64_t row) {
  return static_cast<const float*>(x.data) + row * x.row_stride;
}

}  // namespace

void FeedForward::mlp(Tensor y, Tensor x, const Mlp& w) {
  groups_.assign(1, {&w, nullptr, x.n_rows, 0});
  factors_.assign(static_cast<std::size_t>(x.n_rows), 1.0f);
  run_groups(x, y.dim);
  add_outputs(y, true, 0);
}

void FeedForward::experts(Tensor y, Tensor x, const Experts& w) {
  const auto n_experts = static_cast<std::int64_t>(w.routed.size());
  route(x, w);
  sort_visits(n_experts);
  groups_.clear();
  factors_.clear();
  const bool has_shared = w.shared.down != nullptr;
  if (has_shared) {
    groups_.push_back({&w.shared, nullptr, x.n_rows, 0});
    factors_.assign(static_cast<std::size_t>(x.n_rows), 1.0f);
  }
  const auto n_shared = static_cast<std::int64_t>(factors_.size());
  for (const Visit& visit : sorted_) factors_.push_back(visit.score);
  for (std::int64_t e = 0; e < n_experts; ++e) {
    const std::int64_t first = first_of_expert_[static_cast<std::size_t>(e)];
    const std::int64_t n = first_of_expert_[static_cast<std::size_t>(e + 1)] - first;
    if (n == 0) continue;
    groups_.push_back(
        {&w.routed[static_cast<std::size_t>(e)], tokens_.data() + first, n, n_shared + first});
  }
  run_groups(x, y.dim);
  add_outputs(y, has_shared, w.top_k);
}

void FeedForward::route(Tensor x, const Experts& w) {
  const PackedMatrix& router = packed(w.router);
  const std::int64_t n_experts = router.out_dim;
  float* logits = logits_.at_least(static_cast<std::size_t>(x.n_rows * n_experts));
  const Product product{.w = &router,
                        .x = {row_of(x, 0), x.n_rows, x.row_stride},
                        .n_rows = x.n_rows,
                        .y = logits,
                        .y_stride = n_experts,
                        .exact = true};
  work_.multiply({&product, 1});
  visits_.clear();
  for (std::int64_t t = 0; t < x.n_rows; ++t) {
    choose(logits + t * n_experts, n_experts, w.top_k, static_cast<std::int32_t>(t));
  }
}

// Appends the top_k experts of one token in ascending order of expert. Of equal logits the lower
// index wins.
void FeedForward::choose(const float* logits, std::int64_t n_experts, std::int64_t top_k,
                         std::int32_t token) {
  const auto begin = static_cast<std::ptrdiff_t>(visits_.size());
  for (std::int64_t k = 0; k < top_k; ++k) {
    std::int64_t best = -1;
    for (std::int64_t e = 0; e < n_experts; ++e) {
      const bool taken = std::any_of(visits_.begin() + begin, visits_.end(),
                                     [e](const Visit& v) { return v.expert == e; });
      if (!taken && (best < 0 || logits[e] > logits[best])) best = e;
    }
    visits_.push_back(
        {static_cast<std::int32_t>(best), token, 1.0f / (1.0f + std::exp(-logits[best]))});
  }
  std::sort(visits_.begin() + begin, visits_.end(),
            [](const Visit& a, const Visit& b) { return a.expert < b.expert; });
}

void FeedForward::sort_visits(std::int64_t n_experts) {
  first_of_expert_.assign(static_cast<std::size_t>(n_experts + 1), 0);
  for (const Visit& v : visits_) ++first_of_expert_[static_cast<std::size_t>(v.expert + 1)];
  for (std::size_t e = 1; e < first_of_expert_.size(); ++e) {
    first_of_expert_[e] += first_of_expert_[e - 1];
  }
  next_of_expert_ = first_of_expert_;
  sorted_.resize(visits_.size());
  tokens_.resize(visits_.size());
  row_of_visit_.resize(visits_.size());
  for (std::size_t i = 0; i < visits_.size(); ++i) {
    const std::int64_t row = next_of_expert_[static_cast<std::size_t>(visits_[i].expert)]++;
    sorted_[static_cast<std::size_t>(row)] = visits_[i];
    row_of_visit_[i] = static_cast<std::int32_t>(row);
    tokens_[static_cast<std::size_t>(row)] = visits_[i].token;
  }
}

// Writes down(silu(gate x) * up x) of every group's rows to out_.
void FeedForward::run_groups(Tensor x, std::int64_t dim) {
  const auto n_rows = static_cast<std::int64_t>(factors_.size());
  const std::int64_t ffn_dim =
      groups_.front().mlp->down->in_dim;  // shared and routed have one size
  float* hidden = hidden_.at_least(static_cast<std::size_t>(n_rows * 2 * ffn_dim));
  float* act = act_.at_least(static_cast<std::size_t>(n_rows * ffn_dim));
  float* out = out_.at_least(static_cast<std::size_t>(n_rows * dim));
  const Rows input{row_of(x, 0), x.n_rows, x.row_stride};
  products_.clear();
  for (const Group& g : groups_) {
    products_.push_back({.w = &packed(g.mlp->gate_up),
                         .x = input,
                         .rows = g.rows,
                         .n_rows = g.n_rows,
                         .y = hidden + g.first_row * 2 * ffn_dim,
                         .y_stride = 2 * ffn_dim});
  }
  work_.multiply(products_);
  work_.activate(act, hidden, factors_.data(), n_rows, ffn_dim);
  products_.clear();
  const Rows acts{act, n_rows, ffn_dim};
  for (const Group& g : groups_) {
    products_.push_back({.w = &packed(g.mlp->down),
                         .x = acts,
                         .first_row = g.first_row,
                         .n_rows = g.n_rows,
                         .y = out + g.first_row * dim,
                         .y_stride = dim});
  }
  work_.multiply(products_);
}

// y[t] += shared + experts in ascending order: the sum is finished before it meets the residual.
void FeedForward::add_outputs(Tensor y, bool has_shared, std::int64_t top_k) {
  const float* out = out_.at_least(0);
  const std::int64_t n_shared = has_shared ? y.n_rows : 0;
  work_.pool.parallel_for(y.n_rows, [&](std::int64_t t, int) {
    const float* first = has_shared ? out + t * y.dim : nullptr;
    float* to = static_cast<float*>(y.data) + t * y.row_stride;
    const auto visit_row = [&](std::int64_t k) {
      return out + (n_shared + row_of_visit_[static_cast<std::size_t>(t * top_k + k)]) * y.dim;
    };
    for (std::int64_t c = 0; c < y.dim; ++c) {
      float sum = has_shared ? first[c] : 0.0f;
      for (std::int64_t k = 0; k < top_k; ++k) sum += visit_row(k)[c];
      to[c] += sum;
    }
  });
}

}  // namespace camelid::cpu
