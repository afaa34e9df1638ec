# How the CUDA backend is built. The root includes this file, in its own scope because the extension is
# linked there, only when it found a working nvcc and CUTLASS; nothing outside this folder knows that a GPU
# exists.

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

# -v: ptxas prints registers and spills of every kernel; tools/check_sass.py reads them. Relaxed: device
# code may call constexpr functions, which is how it shares cuda/layout with the host.
add_library(camelid_cuda_flags INTERFACE)
target_include_directories(camelid_cuda_flags INTERFACE src cuda)
target_compile_options(camelid_cuda_flags INTERFACE $<$<COMPILE_LANGUAGE:CUDA>:
  --expt-relaxed-constexpr;-Xfatbin=-compress-all;-Xptxas=-v;-Xcompiler=-Wall,-Wextra>
  $<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${CAMELID_WERROR}>>:-Werror=all-warnings;-Xcompiler=-Werror>)

# What Hopper alone can run has no PTX either: another GPU must never try.
file(GLOB CAMELID_SM90_SOURCES CONFIGURE_DEPENDS cuda/sm90/*.cu)
add_library(camelid_sm90 OBJECT ${CAMELID_SM90_SOURCES})
set_target_properties(camelid_sm90 PROPERTIES CUDA_ARCHITECTURES 90a-real)
target_include_directories(camelid_sm90 SYSTEM PRIVATE ${CAMELID_CUTLASS})
target_link_libraries(camelid_sm90 PRIVATE camelid_cuda_flags)

file(GLOB CAMELID_CUDA_SOURCES CONFIGURE_DEPENDS cuda/host/*.cu cuda/ops/*.cu)
add_library(camelid_cuda STATIC ${CAMELID_CUDA_SOURCES} $<TARGET_OBJECTS:camelid_sm90>)
target_link_libraries(camelid_cuda PRIVATE camelid_cuda_flags camelid_core)
