# CUDA: looked for once. OPD_CUDA is true where nvcc (in PATH or under /usr/local/cuda), the runtime's headers and libcudart_static are there; else a message says what is missing, and
# modules that need them are left out. Nothing of CUDA is needed to run the daemon: the runtime is linked into each module, and opens the driver when the module is opened.
set(OPD_CUDA FALSE)
if(NOT OPD_WITH_CUDA)
  message(STATUS "opd: the providers on CUDA aren't built: OPD_WITH_CUDA is off")
  return()
endif()
find_program(OPD_NVCC nvcc HINTS /usr/local/cuda/bin)
# Not in builds for AddressSanitizer, ThreadSanitizer or coverage: nvcc instruments nothing, the driver can't live beside shadow memory, and compiling these kernels took a third of such a build. What the
# daemon does with devices is tested there by tests/modules/device; the kernels have compute-sanitizer (cuda/README.md).
if(OPD_SANITIZE OR OPD_COVERAGE)
  message(STATUS "opd: the providers on CUDA aren't built with sanitizers or for coverage")
  return()
endif()
if(OPD_NVCC)
  get_filename_component(nvcc ${OPD_NVCC} REALPATH)
  get_filename_component(cuda_root ${nvcc}/../.. ABSOLUTE)
  find_path(OPD_CUDA_INCLUDE cuda_runtime_api.h HINTS ${cuda_root}/include ${cuda_root}/targets/${CMAKE_SYSTEM_PROCESSOR}-linux/include)
  find_library(OPD_CUDART cudart_static HINTS ${cuda_root}/lib64 ${cuda_root}/targets/${CMAKE_SYSTEM_PROCESSOR}-linux/lib)
  if(OPD_CUDA_INCLUDE AND OPD_CUDART)
    set(OPD_CUDA TRUE)
  endif()
endif()
if(NOT OPD_CUDA)
  message(STATUS "opd: the providers on CUDA aren't built: nvcc ${OPD_NVCC}, headers ${OPD_CUDA_INCLUDE}, runtime ${OPD_CUDART}")
endif()

# Machine code for Hopper, whose clusters are used, and PTX that later drivers compile for any device since Ampere.
set(OPD_CUDA_CODE -gencode=arch=compute_90a,code=sm_90a -gencode=arch=compute_80,code=compute_80)

# opd_cuda_object(variable source): a rule that compiles source.cu; the object's path in `variable`. nvcc by hand instead of CMake's CUDA language: that one compiles and runs a
# program to know the compiler, and passes it C's warnings.
function(opd_cuda_object variable source)
  set(object ${CMAKE_CURRENT_BINARY_DIR}/${source}.o)
  get_filename_component(folder ${object} DIRECTORY)
  file(MAKE_DIRECTORY ${folder})
  add_custom_command(OUTPUT ${object}
    COMMAND ${OPD_NVCC} -c ${CMAKE_CURRENT_SOURCE_DIR}/${source} -o ${object} -O3 -std=c++17 ${OPD_CUDA_CODE}
            -Xcompiler -fPIC,-fno-exceptions,-fno-threadsafe-statics,-Wall -I${CMAKE_SOURCE_DIR} -I${CMAKE_SOURCE_DIR}/proto -MD -MF ${object}.d
    DEPENDS ${source} DEPFILE ${object}.d VERBATIM COMMENT "nvcc ${source}")
  set(${variable} ${object} PARENT_SCOPE)
endfunction()

# opd_cuda_module(name C sources and objects): a provider module on CUDA's runtime, whose symbols stay inside.
function(opd_cuda_module name)
  opd_provider_module(${name} ${ARGN} ${CMAKE_SOURCE_DIR}/providers/cudart.c)
  target_include_directories(opd-provider-${name} SYSTEM PRIVATE ${OPD_CUDA_INCLUDE})
  target_link_libraries(opd-provider-${name} PRIVATE ${OPD_CUDART} Threads::Threads rt)
  target_link_options(opd-provider-${name} PRIVATE -Wl,--exclude-libs,ALL)
endfunction()
