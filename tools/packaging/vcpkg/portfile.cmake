# An overlay port: vcpkg install coordination --overlay-ports=tools/packaging/vcpkg
set(VCPKG_BUILD_TYPE release)  # a header, and CMake files that compile it in the user's own build
get_filename_component(SOURCE_PATH "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
vcpkg_cmake_configure(
  SOURCE_PATH "${SOURCE_PATH}"
  OPTIONS
    -DCOORDINATION_BUILD_TESTS=OFF
    -DCOORDINATION_BUILD_EXAMPLES=OFF
    -DCOORDINATION_BUILD_TOOLS=OFF
    -DCOORDINATION_INSTALL_COMPILED=OFF
)
vcpkg_cmake_install()
vcpkg_cmake_config_fixup(PACKAGE_NAME coordination CONFIG_PATH share/cmake/coordination)
vcpkg_fixup_pkgconfig()
file(REMOVE_RECURSE "${CURRENT_PACKAGES_DIR}/lib")
vcpkg_install_copyright(FILE_LIST "${SOURCE_PATH}/LICENSE")
