// C functions over what Hopper alone can run, and no emulated device: for tests on a GPU.
#include "case.h"
#include "sm90/matmul_dense.h"

using namespace camelid::cuda;

extern "C" {

// 90 for sm_90.
int compute_capability() {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return 10 * major + minor;
}

struct CDense {
  const void *x, *w;
  void* y;
  const void *x_scales, *w_scales;
  int type, n_tokens, rows, inputs, x_stride, w_stride, y_stride, output;
};

static MatmulDense dense_of(const CDense& c) {
  MatmulDense call;
  call.type = static_cast<Plain>(c.type);
  call.x = c.x;
  call.w = c.w;
  call.y = c.y;
  call.n_tokens = c.n_tokens;
  call.rows = c.rows;
  call.inputs = c.inputs;
  call.x_stride = c.x_stride;
  call.w_stride = c.w_stride;
  call.y_stride = c.y_stride;
  call.output = static_cast<Output>(c.output);
  call.x_scales = static_cast<const float*>(c.x_scales);
  call.w_scales = static_cast<const float*>(c.w_scales);
  return call;
}

std::int64_t matmul_dense_need(const CDense* c) {
  return static_cast<std::int64_t>(matmul_dense_workspace_bytes(dense_of(*c)));
}

int run_matmul_dense(const CDense* c, void* workspace) {
  return caught([&] { matmul_dense(dense_of(*c), workspace, stream); });
}
}
