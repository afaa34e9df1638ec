#include "backend/timed.h"

#include <utility>

#include "base/error.h"

namespace camelid {
namespace {

// Tells matrices of one model apart, and what became slow when their shapes change.
std::string product(const char* what, const Matrix& w) {
  return cat(what, " ", w.out_dim, " x ", w.in_dim);
}

std::string of_kind(const char* what, const AttentionLayer& layer) {
  return cat(what, layer.local ? " local" : " global");
}

}  // namespace

void TimedBackend::start(Grain grain) {
  static_cast<void>(stop());
  grain_ = grain;
}

std::vector<TimedCall> TimedBackend::stop() {
  close_step();
  grain_ = Grain::kNothing;
  const std::vector<double> us = clock_->take();
  std::vector<TimedCall> calls;
  for (std::size_t i = 0; i < us.size(); ++i) {
    if (!names_[i + 1].empty()) calls.push_back({std::move(names_[i + 1]), us[i]});
  }
  names_.clear();
  return calls;
}

void TimedBackend::mark(std::string name) {
  clock_->mark();
  names_.push_back(std::move(name));
}

void TimedBackend::open_step() {
  if (grain_ == Grain::kNothing) return;
  in_step_ = true;
  clock_->hold();
  mark("");
}

void TimedBackend::close_step() {
  if (!std::exchange(in_step_, false)) return;
  if (grain_ == Grain::kSteps) mark("step");
  clock_->release();
}

bool TimedBackend::begin(const StepPlan& plan) {
  open_step();
  if (grain_ != Grain::kCalls) return backend_->begin(plan);
  plan_ = plan;
  plan_.repeatable = false;
  const bool must_call = backend_->begin(plan_);
  called([] { return "begin"; });
  return must_call;
}

bool TimedBackend::end() {
  const bool is_done = backend_->end();
  close_step();
  return is_done;
}

void TimedBackend::abandon() {
  backend_->abandon();
  close_step();
}

void TimedBackend::embed(Tensor y, const Matrix& table) {
  backend_->embed(y, table);
  called([] { return "embed"; });
}

void TimedBackend::norm(Tensor x, const Norm& norm) {
  backend_->norm(x, norm);
  called([] { return "norm"; });
}

void TimedBackend::norm_rows(Tensor x, const Norm& norm) {
  backend_->norm_rows(x, norm);
  called([] { return "norm_rows"; });
}

void TimedBackend::layer_norm(Tensor y, Tensor x, const Buffer& gain, const Buffer& bias,
                              float eps) {
  backend_->layer_norm(y, x, gain, bias, eps);
  called([] { return "layer_norm"; });
}

void TimedBackend::add_bias(Tensor y, const Buffer& bias) {
  backend_->add_bias(y, bias);
  called([] { return "add_bias"; });
}

void TimedBackend::gelu(Tensor y) {
  backend_->gelu(y);
  called([] { return "gelu"; });
}

void TimedBackend::matmul(Tensor y, Tensor x, const Matrix& w) {
  backend_->matmul(y, x, w);
  called([&] { return product("matmul", w); });
}

void TimedBackend::matmul_add(Tensor y, Tensor x, const Matrix& w, const Norm& then) {
  backend_->matmul_add(y, x, w, then);
  called([&] { return product("matmul_add", w); });
}

void TimedBackend::store_kv(Tensor qkv, const AttentionLayer& layer) {
  backend_->store_kv(qkv, layer);
  called([&] { return of_kind("store_kv", layer); });
}

void TimedBackend::project_kv(Tensor qkv, Tensor x, const Matrix& w, const AttentionLayer& layer) {
  backend_->project_kv(qkv, x, w, layer);
  called([&] { return of_kind("project_kv", layer); });
}

void TimedBackend::attend(Tensor y, Tensor qkv, const AttentionLayer& layer) {
  backend_->attend(y, qkv, layer);
  called([&] { return of_kind("attend", layer); });
}

void TimedBackend::mlp(Tensor y, Tensor x, const Mlp& w, const Norm& then) {
  backend_->mlp(y, x, w, then);
  called([] { return "mlp"; });
}

void TimedBackend::experts(Tensor y, Tensor x, const Experts& w, const Norm& then) {
  backend_->experts(y, x, w, then);
  called([] { return "experts"; });
}

void TimedBackend::select_rows(Tensor y, Tensor x) {
  backend_->select_rows(y, x);
  called([] { return "select_rows"; });
}

void TimedBackend::upload_rows(Tensor y, const float* rows) {
  backend_->upload_rows(y, rows);
  called([] { return "upload_rows"; });
}

void TimedBackend::find_top(Tensor logits) {
  backend_->find_top(logits);
  called([] { return "find_top"; });
}

}  // namespace camelid
