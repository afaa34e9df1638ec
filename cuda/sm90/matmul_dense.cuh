// CUTLASS 3's warp-specialised persistent kernels, put together for what the engine asks of them.
// Tokens are the M side, rows of the weights the N side. The instances are compiled file by file.
#pragma once

#include <type_traits>

#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "sm90/matmul_dense.h"

namespace camelid::cuda {

using cute::_1;
using cute::_128;
using cute::_2;
using cute::_256;
using cute::_64;
using cute::Int;
using cute::Shape;

namespace fusion = cutlass::epilogue::fusion;
constexpr auto kNearest = cutlass::FloatRoundStyle::round_to_nearest;

// The tile of one block, how many blocks share their loads, and who of them multiplies when.
struct ManyTokens {
  static constexpr int kTokens = 128;
  static constexpr bool kCooperative = true;
  using Cluster = Shape<_2, _1, _1>;
};
struct FewTokens {
  static constexpr int kTokens = 64;
  static constexpr bool kCooperative = false;
  using Cluster = Shape<_1, _2, _1>;
};

// y = sums, or y + sums.
template <class ElementY, class Tile>
struct PlainEpilogue {
  using Fusion = fusion::LinearCombination<ElementY, float, ElementY, float>;
  template <class Arguments>
  static void set(Arguments& arguments, const MatmulDense& call) {
    arguments.alpha = 1.0f;
    arguments.beta = call.output == Output::kAdd ? 1.0f : 0.0f;
  }
};

// y = token's scale * row's scale * sums; where y is float32, added to what is there.
template <class ElementY, class Tile>
struct ScaledEpilogue {
  static constexpr bool kAdds = std::is_same_v<ElementY, float>;
  template <template <class> class F, class Out>
  using Compute = fusion::Sm90Compute<F, Out, float, kNearest>;
  using TokenScale = fusion::Sm90ColBroadcast<0, Tile, float>;
  using RowScale = fusion::Sm90RowBroadcast<0, Tile, float>;
  using ByRow =
      fusion::Sm90EVT<Compute<cutlass::multiplies, float>, RowScale, fusion::Sm90AccFetch>;
  using Stored = fusion::Sm90EVT<Compute<cutlass::multiplies, ElementY>, TokenScale, ByRow>;
  using Added = fusion::Sm90EVT<Compute<cutlass::homogeneous_multiply_add, ElementY>, TokenScale,
                                ByRow, fusion::Sm90SrcFetch<ElementY>>;
  using Fusion = std::conditional_t<kAdds, Added, Stored>;
  template <class Arguments>
  static void set(Arguments& arguments, const MatmulDense& call) {
    // A tree's arguments are those of its children, then its own.
    if constexpr (kAdds) {
      arguments = {{call.x_scales}, {{call.w_scales}, {}, {}}, {}, {}};
    } else {
      arguments = {{call.x_scales}, {{call.w_scales}, {}, {}}, {}};
    }
  }
};

template <class Element, class ElementY, class Config, template <class, class> class EpilogueOf>
struct Gemm {
  static constexpr int kAlignment = 16 / sizeof(Element);
  static constexpr int kAlignmentY = 16 / sizeof(ElementY);
  // 128 bytes of inputs a step. FP8 keeps two sets of sums, so its tiles are narrower.
  static constexpr int kRows = Config::kCooperative && sizeof(Element) == 2 ? 256 : 128;
  using Tile = Shape<Int<Config::kTokens>, Int<kRows>, Int<128 / sizeof(Element)>>;
  using Schedule =
      std::conditional_t<Config::kCooperative, cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                         cutlass::gemm::KernelTmaWarpSpecializedPingpong>;
  using EpilogueSchedule =
      std::conditional_t<Config::kCooperative, cutlass::epilogue::TmaWarpSpecializedCooperative,
                         cutlass::epilogue::TmaWarpSpecialized>;
  using EpilogueKind = EpilogueOf<ElementY, Tile>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, typename Config::Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, ElementY,
      cutlass::layout::RowMajor, kAlignmentY, ElementY, cutlass::layout::RowMajor, kAlignmentY,
      EpilogueSchedule, typename EpilogueKind::Fusion>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor,
      kAlignment, Element, cutlass::layout::ColumnMajor, kAlignment, float, Tile,
      typename Config::Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      Schedule>::CollectiveOp;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>;
  using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static typename Device::Arguments arguments_of(const MatmulDense& call) {
    using StrideA = typename Kernel::StrideA;
    using StrideD = typename Kernel::StrideD;
    const auto* x = static_cast<const Element*>(call.x);
    const auto* w = static_cast<const Element*>(call.w);
    auto* y = static_cast<ElementY*>(call.y);
    const StrideA x_stride{call.x_stride, {}, 0};
    const typename Kernel::StrideB w_stride{call.w_stride, {}, 0};
    const StrideD y_stride{call.y_stride, {}, 0};
    typename Device::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm,
                                         {call.n_tokens, call.rows, call.inputs, 1},
                                         {x, x_stride, w, w_stride},
                                         {{}, y, y_stride, y, y_stride}};
    EpilogueKind::set(arguments.epilogue.thread, call);
    arguments.hw_info.sm_count = multiprocessors();
    return arguments;
  }

  static std::size_t workspace_bytes(const MatmulDense& call) {
    return Device::get_workspace_size(arguments_of(call));
  }

  static void run(const MatmulDense& call, void* workspace, cudaStream_t stream) {
    Device device;
    const auto arguments = arguments_of(call);
    cutlass::Status status = Device::can_implement(arguments);
    if (status == cutlass::Status::kSuccess) {
      status = device.initialize(arguments, workspace, stream);
    }
    if (status == cutlass::Status::kSuccess) status = device.run(stream);
    if (status != cutlass::Status::kSuccess) {
      fail(ErrorCode::kInternal, "[cuda] dense matmul of ", call.n_tokens, " tokens, ", call.rows,
           " x ", call.inputs, ": ", cutlass::cutlassGetStatusString(status), ".");
    }
    check(cudaGetLastError(), "dense matmul");
  }
};

// Calls f(Gemm<...>{}) with the instance for the call.
template <class Element, template <class, class> class EpilogueOf, class F>
auto with_gemm(const MatmulDense& call, const F& f) {
  if (call.n_tokens <= FewTokens::kTokens) {
    return call.output == Output::kStoreBf16
               ? f(Gemm<Element, cutlass::bfloat16_t, FewTokens, EpilogueOf>{})
               : f(Gemm<Element, float, FewTokens, EpilogueOf>{});
  }
  return call.output == Output::kStoreBf16
             ? f(Gemm<Element, cutlass::bfloat16_t, ManyTokens, EpilogueOf>{})
             : f(Gemm<Element, float, ManyTokens, EpilogueOf>{});
}

}  // namespace camelid::cuda
