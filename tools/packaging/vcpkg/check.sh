#!/usr/bin/env bash
# check.sh FOLDER: runs the port there with stand-ins for vcpkg's own functions, and builds a
# consumer on what it has installed. vcpkg itself is not needed.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../../.." && pwd)
cmake=${CMAKE:-cmake}

python3 - "$here/vcpkg.json" << 'PYTHON'
import json
import re
import sys

def expect(good, what):
    if not good:
        sys.exit(f"vcpkg.json: {what}")

port = json.load(open(sys.argv[1]))
known = {"name", "version", "description", "homepage", "license", "dependencies"}
expect(set(port) <= known, f"not known: {set(port) - known}")
expect(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", port["name"]), "name")
expect(re.fullmatch(r"\d+(\.\d+)*", port["version"]), "version")
for need in port["dependencies"]:
    need = {"name": need} if isinstance(need, str) else need
    expect(set(need) <= {"name", "features", "host", "default-features", "platform"}, need)
PYTHON

cat > "$1/port.cmake" << 'CMAKE'
set(CURRENT_PACKAGES_DIR ${folder}/packages)
function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE status)
  if(status)
    message(FATAL_ERROR "${ARGN}: ${status}")
  endif()
endfunction()
function(vcpkg_cmake_configure)
  cmake_parse_arguments(arg "" SOURCE_PATH OPTIONS ${ARGN})
  run(${CMAKE_COMMAND} -S ${arg_SOURCE_PATH} -B ${folder}/port -DCMAKE_INSTALL_LIBDIR=lib
      ${arg_OPTIONS})
endfunction()
function(vcpkg_cmake_install)
  run(${CMAKE_COMMAND} --build ${folder}/port)
  run(${CMAKE_COMMAND} --install ${folder}/port --prefix ${CURRENT_PACKAGES_DIR})
endfunction()
function(must_exist)
  foreach(file IN LISTS ARGN)
    if(NOT EXISTS ${file})
      message(FATAL_ERROR "there is no ${file}")
    endif()
  endforeach()
endfunction()
function(vcpkg_cmake_config_fixup)
  cmake_parse_arguments(arg "" "PACKAGE_NAME;CONFIG_PATH" "" ${ARGN})
  must_exist(${CURRENT_PACKAGES_DIR}/${arg_CONFIG_PATH}/${arg_PACKAGE_NAME}-config.cmake)
endfunction()
function(vcpkg_fixup_pkgconfig)
  must_exist(${CURRENT_PACKAGES_DIR}/lib/pkgconfig/coordination.pc)
endfunction()
function(vcpkg_install_copyright)
  cmake_parse_arguments(arg "" "" FILE_LIST ${ARGN})
  must_exist(${arg_FILE_LIST})
endfunction()
include(${port}/portfile.cmake)
if(EXISTS ${CURRENT_PACKAGES_DIR}/lib/libcoordination_compiled.a)
  message(FATAL_ERROR "compiled for one system")
endif()
CMAKE
"$cmake" "-Dfolder=$1" "-Dport=$here" -P "$1/port.cmake"

"$cmake" -S "$root/tools/packaging/conan/test_package" -B "$1/build" \
  "-DCMAKE_PREFIX_PATH=$1/packages"
"$cmake" --build "$1/build"
"$1/build/app"
