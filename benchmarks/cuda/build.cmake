# What tools/gpu_check takes to a GPU: one library of all kernels and of the C functions that tests and
# benchmarks call, for any Python there. Built when asked for by name. Included by CMakeLists.txt where
# CUDA is built.
file(GLOB CAMELID_GPU_CHECK_SOURCES CONFIGURE_DEPENDS tests/cuda/*.cu benchmarks/cuda/*.cu)
add_library(camelid_gpu_check SHARED EXCLUDE_FROM_ALL ${CAMELID_GPU_CHECK_SOURCES})
target_include_directories(camelid_gpu_check PRIVATE tests/cuda)
target_link_libraries(camelid_gpu_check PRIVATE camelid_cuda_flags camelid_cuda camelid_core)
set_target_properties(camelid_gpu_check PROPERTIES CUDA_VISIBILITY_PRESET default)
