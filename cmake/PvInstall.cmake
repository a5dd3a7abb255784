# What `cmake --install` gives: component `cpp` is the core for C++ programs (headers, static
# libraries, find_package(polyvisor)), component `python` the files that belong in the wheel.
include(CMakePackageConfigHelpers)

get_property(modules GLOBAL PROPERTY PV_MODULES)
set(package_dir lib/cmake/polyvisor)

install(TARGETS ${modules} EXPORT polyvisorTargets
  ARCHIVE DESTINATION lib/polyvisor COMPONENT cpp)
install(DIRECTORY native/ DESTINATION include/polyvisor COMPONENT cpp
  FILES_MATCHING PATTERN "*.hpp" PATTERN "*.inc")
install(EXPORT polyvisorTargets NAMESPACE polyvisor:: DESTINATION ${package_dir} COMPONENT cpp)

configure_package_config_file(cmake/polyvisorConfig.cmake.in
  ${PROJECT_BINARY_DIR}/polyvisorConfig.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/polyvisorConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/polyvisorConfig.cmake
  ${PROJECT_BINARY_DIR}/polyvisorConfigVersion.cmake
  DESTINATION ${package_dir} COMPONENT cpp)
