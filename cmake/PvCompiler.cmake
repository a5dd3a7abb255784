# Settings of the compiler that hold for every target: ccache, sanitizers, reproducible paths.

# Debug information and __FILE__ name files relative to the top of the tree, so that two clones
# (and the wheel's build directory beside the default one) give the same objects and share a cache.
add_compile_options(-ffile-prefix-map=${PROJECT_SOURCE_DIR}/=)

find_program(PV_CCACHE ccache)
if(PV_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(launcher env CCACHE_BASEDIR=${PROJECT_SOURCE_DIR} CCACHE_NOHASHDIR=1 ${PV_CCACHE})
  set(CMAKE_C_COMPILER_LAUNCHER ${launcher})
  set(CMAKE_CXX_COMPILER_LAUNCHER ${launcher})
endif()

if(PV_SANITIZE)
  add_compile_options(-fsanitize=${PV_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all)
  add_link_options(-fsanitize=${PV_SANITIZE})
endif()
