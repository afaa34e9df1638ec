# Finds CUTLASS's headers, which cuda/sm90 is written with: CAMELID_CUTLASS, as a CMake or an environment
# variable, or in the wheel nvidia-cutlass of the Python that CMake finds.
find_package(Python COMPONENTS Interpreter QUIET)
set(CAMELID_CUTLASS_WHEEL)
if(Python_EXECUTABLE)
  # Asked for without being imported: its programs want more than its headers do.
  execute_process(COMMAND ${Python_EXECUTABLE} -c
    "import importlib.util; print(importlib.util.find_spec('cutlass_library').submodule_search_locations[0])"
    OUTPUT_VARIABLE CAMELID_CUTLASS_WHEEL OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
find_path(CAMELID_CUTLASS cutlass/cutlass.h NO_CACHE
  HINTS ENV CAMELID_CUTLASS ${CAMELID_CUTLASS_WHEEL}/source/include)
