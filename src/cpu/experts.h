// The feed-forward part of a layer: a dense MLP, or routed experts beside a shared one. Every
// token's result is formed in an order that does not depend on the other tokens of the step.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/backend.h"
#include "cpu/workspace.h"

namespace camelid::cpu {

class FeedForward {
 public:
  explicit FeedForward(Workspace& workspace) : work_(workspace) {}

  // y += down(silu(gate x) * up x).
  void mlp(Tensor y, Tensor x, const Mlp& w);
  // y += shared(x) + sum over the top_k experts e of expert_e(sigmoid(logit_e) * x).
  void experts(Tensor y, Tensor x, const Experts& w);

 private:
  // A token sent to an expert. Sorted by expert, so an expert's rows are neighbours.
  struct Visit {
    std::int32_t expert = 0;
    std::int32_t token = 0;
    float score = 0.0f;
  };
  // The rows of x that one MLP takes; their results are rows first_row.. of hidden_, act_ and out_.
  struct Group {
    const Mlp* mlp;
    const std::int32_t* rows;  // null: all, in order
    std::int64_t n_rows;
    std::int64_t first_row;
  };

  void route(Tensor x, const Experts& w);
  void choose(const float* logits, std::int64_t n_experts, std::int64_t top_k, std::int32_t token);
  void sort_visits(std::int64_t n_experts);
  void run_groups(Tensor x, std::int64_t dim);
  void add_outputs(Tensor y, bool has_shared, std::int64_t top_k);

  Workspace& work_;
  std::vector<Visit> visits_;                  // by token, then expert
  std::vector<Visit> sorted_;                  // by expert, then token
  std::vector<std::int32_t> row_of_visit_;     // where visits_[i] lies in sorted_
  std::vector<std::int64_t> first_of_expert_;  // [n_experts + 1]: rows of sorted_
  std::vector<std::int64_t> next_of_expert_;
  std::vector<Group> groups_;
  std::vector<Product> products_;
  std::vector<std::int32_t> tokens_;  // of sorted_
  std::vector<float> factors_;        // of each result row: the router's, 1 for the shared
  GrowingFloats logits_, hidden_, act_, out_;
};

}  // namespace camelid::cpu
