// The feed-forward half of a layer: dense blocks, and experts with their router, for few tokens in
// one launch and for many as grouped products.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "backend/backend.h"
#include "host/products.h"
#include "ops/experts_few.h"
#include "ops/route_many.h"

namespace camelid::cuda {

class FeedForward {
 public:
  FeedForward(const Gpu& gpu, Products& products, Norms& norms)
      : gpu_(gpu), products_(products), norms_(norms) {}

  void prepare(Experts& experts, Uploader& uploader);  // see Backend::prepare
  void expect(const DeviceMatrix& gate_up);            // in an mlp()
  void prepare_steps(std::int64_t n_tokens);           // of what was prepared and is expected
  std::size_t bytes() const;                           // of all that it took
  // See Backend.
  void mlp(const Tensor& y, const Tensor& x, const Mlp& w, const Norm& then);
  void experts(const Tensor& y, const Tensor& x, const Experts& w, const Norm& then);

 private:
  struct Prepared;
  // Where the visits of a step go, and in what memory.
  struct Visits {
    RouteShape shape;
    Routes routes;
    Tensor logits;  // of the router
  };
  Visits place_visits(std::int64_t n_tokens, const Prepared& prepared);
  float* visit_rows(const Visits& visits, std::int64_t stride);  // of as many as the visits
  Visits route(const Tensor& x, const Experts& w, const Prepared& prepared);
  Tensor activations(std::int64_t n_rows, std::int64_t dim);
  void run_few(const Tensor& y, const Tensor& x, const Prepared& prepared, const Norm& then);
  // The product of each visit with the matrix of its group; `product` says all but the matrices.
  void multiply(const Segment& like, const DeviceMemory& groups, GroupedProduct product);
  void run_visits(const Tensor& y, const Tensor& x, const Prepared& p, const Visits& visits);
  void combine(const Tensor& y, const Visits& visits);

  Gpu gpu_;
  Products& products_;
  Norms& norms_;
  std::int64_t widest_mlp_ = 0;  // activations of a token
  std::vector<std::shared_ptr<const Prepared>> layers_;
  GrowingMemory act_, logits_, routes_, rows_, scratch_;
};

}  // namespace camelid::cuda
