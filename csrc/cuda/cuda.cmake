# The module _cuda, where there is an nvcc that works. It has no torch in it and no dependency on the
# CUDA libraries: the runtime is linked statically, and nothing of it is called at import.
set(PPO_KERNELS_CUDA AUTO CACHE STRING "The CUDA backend: AUTO (if nvcc works), ON (or fail), OFF")
set(PPO_KERNELS_CUDA_ARCHS AUTO CACHE STRING
  "GPU architectures, as 80-real;90 (or fail); AUTO: the GPUs of this machine, else 80 and its PTX")

if(NOT PPO_KERNELS_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "PPO_KERNELS_CUDA=${PPO_KERNELS_CUDA}: expected AUTO, ON or OFF")
endif()
if(NOT "${PPO_KERNELS_CUDA_ARCHS}" MATCHES "^(AUTO|[0-9]+[af]?(-real|-virtual)?(;[0-9]+[af]?(-real|-virtual)?)*)$")
  message(FATAL_ERROR "PPO_KERNELS_CUDA_ARCHS=${PPO_KERNELS_CUDA_ARCHS}: expected AUTO or a list of "
    "architectures such as 80-real;90-real;120 (-real: no PTX, -virtual: PTX alone)")
endif()

set(CUDA_OFF "")
if(PPO_KERNELS_CUDA STREQUAL "OFF")
  set(CUDA_OFF "ppo_kernels was built with PPO_KERNELS_CUDA=OFF")
  return()
elseif(PPO_KERNELS_SANITIZE)
  set(CUDA_OFF "ppo_kernels was built with sanitizers")
  return()
endif()

set(CMAKE_CUDA_ARCHITECTURES ${PPO_KERNELS_CUDA_ARCHS})
if(PPO_KERNELS_CUDA_ARCHS STREQUAL "AUTO")
  set(CMAKE_CUDA_ARCHITECTURES 80)
  find_program(NVIDIA_SMI nvidia-smi)
  if(NVIDIA_SMI)
    execute_process(COMMAND ${NVIDIA_SMI} --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE capabilities ERROR_QUIET)
    string(REGEX MATCHALL "[0-9]+[.][0-9]" capabilities "${capabilities}")
    list(REMOVE_DUPLICATES capabilities)
    if(capabilities)
      string(REPLACE "." "" CMAKE_CUDA_ARCHITECTURES "${capabilities}")
    endif()
  endif()
endif()

string(REPLACE ";" ", " ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}")  # in a definition ; would end it

include(CheckLanguage)
set(ENV{CUDAARCHS} "${CMAKE_CUDA_ARCHITECTURES}")  # the check is for these
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  set(CUDA_OFF
    "no nvcc that compiles for ${ARCHITECTURES} was found when ppo_kernels was built")
  if(PPO_KERNELS_CUDA STREQUAL "ON" OR NOT PPO_KERNELS_CUDA_ARCHS STREQUAL "AUTO")
    message(FATAL_ERROR "PPO_KERNELS_CUDA=${PPO_KERNELS_CUDA}, "
      "PPO_KERNELS_CUDA_ARCHS=${PPO_KERNELS_CUDA_ARCHS}, but ${CUDA_OFF}; "
      "put nvcc on PATH or name it in CUDACXX")
  endif()
  message(STATUS "CUDA backend: off, ${CUDA_OFF}")
  return()
endif()

enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
# Nothing may be fused behind our back: the same device function gives the same bits wherever it is
# inlined. Where fusing pays, kernels say fma.
set(CUDA_FLAGS --fmad=false)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
  list(APPEND CUDA_FLAGS --compress-mode=size)
endif()

add_library(kernels_cuda OBJECT
  csrc/cuda/categorical_kl.cu
  csrc/cuda/kept.cu
  csrc/cuda/kl.cu
  csrc/cuda/logprob.cu
  csrc/cuda/losses.cu
  csrc/cuda/moments.cu
  csrc/cuda/ppo_rows.cu
  csrc/cuda/scan.cu)
pybind11_add_module(_cuda csrc/cuda/bindings.cpp)
foreach(target kernels_cuda _cuda)
  target_include_directories(${target} PRIVATE csrc)
  target_compile_definitions(${target} PRIVATE PPOK_ISA=cuda)
endforeach()
target_compile_options(kernels_cuda PRIVATE ${CUDA_FLAGS})
set_target_properties(kernels_cuda PROPERTIES CUDA_STANDARD 17 CUDA_VISIBILITY_PRESET hidden)
target_compile_options(_cuda PRIVATE -Wall -Wextra)
target_compile_definitions(_cuda PRIVATE
  PPOK_MODULE=_cuda
  PPOK_COMPILER="nvcc ${CMAKE_CUDA_COMPILER_VERSION}"
  PPOK_ARCHITECTURES="${ARCHITECTURES}")
target_link_libraries(_cuda PRIVATE kernels_cuda CUDA::cudart_static)
install(TARGETS _cuda DESTINATION ppo_kernels)
message(STATUS "CUDA backend: ${CMAKE_CUDA_COMPILER} for ${ARCHITECTURES}")
