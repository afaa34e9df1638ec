# Finds nvcc where CMake would not: in the wheels nvidia-cuda-nvcc (13 or later), nvidia-cuda-runtime and
# nvidia-cuda-cccl of the Python that CMake finds, which together are a toolkit, in nvidia/cu13/. Whoever says
# CMAKE_CUDA_COMPILER or CUDACXX is heard first, then PATH, CUDA_PATH, CUDA_HOME and /usr/local/cuda.
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(CAMELID_NVCC_ON_PATH nvcc NO_CACHE
    HINTS ENV CUDA_PATH ENV CUDA_HOME PATH_SUFFIXES bin PATHS /usr/local/cuda)
  find_package(Python COMPONENTS Interpreter QUIET)
  set(CAMELID_NVCC_WHEEL)
  if(NOT CAMELID_NVCC_ON_PATH AND Python_EXECUTABLE)
    # Wheels of CUDA 12 have parts of a toolkit in many folders, and no nvcc: no headers, no toolkit.
    execute_process(COMMAND ${Python_EXECUTABLE} -c
      "import importlib.util, pathlib
spec = importlib.util.find_spec('nvidia')
tops = [top for folder in spec.submodule_search_locations for top in sorted(pathlib.Path(folder).glob('cu[0-9]*'))]
print([top for top in tops if (top / 'bin/nvcc').exists() and (top / 'include/cuda_runtime.h').exists()][-1])"
      OUTPUT_VARIABLE CAMELID_NVCC_WHEEL OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  endif()
  if(CAMELID_NVCC_ON_PATH)
    set(CMAKE_CUDA_COMPILER ${CAMELID_NVCC_ON_PATH})
  elseif(CAMELID_NVCC_WHEEL)
    message(STATUS "nvcc of a wheel: ${CAMELID_NVCC_WHEEL}/bin/nvcc")
    set(CMAKE_CUDA_COMPILER ${CAMELID_NVCC_WHEEL}/bin/nvcc)
    # Where nvcc looks for the runtime, lib64, is lib in wheels.
    string(APPEND CMAKE_CUDA_FLAGS_INIT " -L${CAMELID_NVCC_WHEEL}/lib")
  endif()
endif()
