# How the CUDA backend is built. The root includes this file, in its own scope because the extension is
# linked there, only when it found a working nvcc; nothing outside this folder knows that a GPU exists.

# 90a: Hopper with its own instructions (wgmma, TMA), which run on nothing else. 80: Ampere, and the PTX
# that any other later GPU can compile for itself.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES "80;90a-real")
endif()
# Static: the runtime opens the driver when it is first used, so the module also imports where there
# is no driver, and nothing of NVIDIA's appears among the libraries it needs.
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
# CMake before 3.25.2 does not know how to ask nvcc for C++20.
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
endif()
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_EXTENSIONS OFF)

file(GLOB_RECURSE CAMELID_CUDA_SOURCES CONFIGURE_DEPENDS cuda/*.cu)
list(FILTER CAMELID_CUDA_SOURCES EXCLUDE REGEX "/cuda/sm90/")
add_library(camelid_cuda STATIC ${CAMELID_CUDA_SOURCES})
target_link_libraries(camelid_cuda PRIVATE camelid_core)
target_include_directories(camelid_cuda PRIVATE cuda)
# -v: ptxas prints registers and spills of every kernel; .ci/run reads them.
target_compile_options(camelid_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CUDA>:-Xfatbin=-compress-all;--expt-relaxed-constexpr;-Xptxas=-v;-Xcompiler=-Wall,-Wextra>)
