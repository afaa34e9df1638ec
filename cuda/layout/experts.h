// How many experts a layer may have, and how many of them a token may visit.
#pragma once

namespace camelid::cuda {

constexpr int kMaxExperts = 256;
constexpr int kMaxTopK = 8;

}  // namespace camelid::cuda
