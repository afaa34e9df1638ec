// Attention of many queries on Hopper: ops/attention.h with wgmma, and items of twice the queries.
#pragma once

#include "ops/attention.h"

namespace camelid::cuda::sm90 {

constexpr int kManyQueries = 128;  // of an item, at most

// Which caches attend_many below reads: those of head_dim up to 128. The others are for the one
// that any GPU runs, with its smaller items.
bool attend_many_fits(const KvShape& shape);

// As camelid::cuda::attend_many.
void attend_many(const Attention& call, int n_items, int multiprocessors, cudaStream_t stream);

}  // namespace camelid::cuda::sm90
