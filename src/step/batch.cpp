#include "step/batch.h"

#include <algorithm>
#include <set>

#include "base/error.h"

namespace camelid {

namespace {

void check_features(const StepRequest& request, std::int64_t dim) {
  const auto n_features = static_cast<std::int64_t>(request.features.size()) / dim;
  const bool shaped =
      static_cast<std::int64_t>(request.features.size()) == n_features * dim &&
      (request.feature_rows.empty() || request.feature_rows.size() == request.tokens.size());
  if (!shaped) {
    fail(ErrorCode::kInvalidRequest, "[step] got ", request.features.size(), " values of features ",
         "and ", request.feature_rows.size(), " rows of them, expected a multiple of ", dim,
         " and one row for each of ", request.tokens.size(), " tokens.");
  }
  for (const std::int32_t row : request.feature_rows) {
    if (row >= -1 && row < n_features) continue;
    fail(ErrorCode::kInvalidRequest, "[step] feature row ", row, " is none of ", n_features, ".");
  }
}

}  // namespace

std::vector<StepEntry> check_request(const StepRequest& request, std::int64_t vocab_size,
                                     std::int64_t dim) {
  check_features(request, dim);
  const std::size_t n = request.sequences.size();
  if (n == 0 || request.counts.size() != n || request.outputs.size() != n) {
    fail(ErrorCode::kInvalidRequest, "[step] got ", n, " sequences, ", request.counts.size(),
         " counts and ", request.outputs.size(),
         " outputs, expected the same number, at least one.");
  }
  std::vector<StepEntry> entries;
  std::set<std::int64_t> seen;
  std::size_t first = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const auto count = static_cast<std::size_t>(std::max(request.counts[i], 0));
    if (count == 0 || count > request.tokens.size() - first) {
      fail(ErrorCode::kInvalidRequest, "[step] entry ", i, " has ", request.counts[i], " tokens, ",
           request.tokens.size() - first, " are left in the flat array.");
    }
    if (!seen.insert(request.sequences[i]).second) {
      fail(ErrorCode::kInvalidRequest, "[step] sequence ", request.sequences[i],
           " is in the step twice.");
    }
    entries.push_back({request.sequences[i],
                       request.outputs[i],
                       request.tokens.subspan(first, count),
                       i,
                       nullptr,
                       {}});
    if (!request.feature_rows.empty()) {
      entries.back().feature_rows = request.feature_rows.subspan(first, count);
    }
    first += count;
  }
  if (first != request.tokens.size()) {
    fail(ErrorCode::kInvalidRequest, "[step] counts add up to ", first, ", but there are ",
         request.tokens.size(), " tokens.");
  }
  for (std::int32_t token : request.tokens) {
    if (token >= 0 && token < vocab_size) continue;
    fail(ErrorCode::kInvalidRequest, "[step] token id ", token, " is outside the vocabulary of ",
         vocab_size, ". Was the text encoded with this model's tokenizer?");
  }
  return entries;
}

}  // namespace camelid
