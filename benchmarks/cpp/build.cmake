# The microbenchmarks: one program, for developers, never installed. Included by CMakeLists.txt when
# Google Benchmark was found.
file(GLOB CAMELID_BENCHMARK_SOURCES CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/*.cpp)
add_executable(camelid_benchmarks ${CAMELID_BENCHMARK_SOURCES})
target_link_libraries(camelid_benchmarks PRIVATE camelid_core camelid_flags benchmark::benchmark)
