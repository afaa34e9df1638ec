// The product of few tokens with the weights of queries, keys and values, and store_kv of what it
// gives, in one launch. Needs sm_80.
#pragma once

#include "ops/matmul_few.h"
#include "ops/store_kv.h"

namespace camelid::cuda {

constexpr int kMostProjectedTokens = 8;

// Whether heads lie in the rows that one block completes: head_dim divides 128.
bool project_kv_fits(const StoreKv& store);
WorkspaceNeed project_kv_needs(const TileShape& shape);  // on this GPU

// `product` has up to 8 tokens and Output::kStore, its y is the qkv of `store`. The same bits as
// from matmul_few() and store_kv(). Throws kInternal where the call cannot be or its launch fails;
// waits for nothing.
void project_kv(const MatmulFew& product, const StoreKv& store, const Workspace& workspace,
                cudaStream_t stream);

}  // namespace camelid::cuda
