#!/usr/bin/env bash
# check.sh WAY: one way in which another project can take the library in, built and run. Exit code
# 77 = skipped. From the environment: PREFIX, where the library is installed (for what needs that),
# CXX, and CMAKE, if not the one on the PATH.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
way=$1
cmake=${CMAKE:-cmake}
export CXX=${CXX:-g++}
# Warnings that the header does not promise to be free of: they must not reach its users.
strict="-Wall -Wextra -Wold-style-cast -Wsign-conversion -Weffc++ -Werror"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

need() { command -v "$1" > /dev/null || { echo "SKIPPED: no $1"; exit 77; }; }
version() {
  sed -n 's/^#define COORDINATION_VERSION_[A-Z]* //p' "$root/coordination.hpp" | paste -sd.
}
run_all() {  # FOLDER: every app in it, at least one
  local app apps
  apps=$(find "$1" -type f -name 'app*' -perm -u+x | grep .)
  for app in $apps; do
    echo "${app##*/}"
    "$app"
  done
}
with_cmake() {  # [OPTION...]
  "$cmake" -S "$here/$way" -B "$out/build" "-DCMAKE_CXX_FLAGS=$strict" \
    "-DCOORDINATION_SOURCE=$root" "-DCOORDINATION_VERSION=$(version)" "$@"
  "$cmake" --build "$out/build"
  run_all "$out/build"
}
with_meson() {  # [OPTION...]
  need meson
  cp "$here"/meson/* "$here/main.cpp" "$out"
  meson setup "$out/build" "$out" "$@"
  ninja -C "$out/build" app
  run_all "$out/build"
}

case $way in
  add_subdirectory | siblings) with_cmake ;;
  fetch_content)  # as where nothing is installed
    with_cmake -DCMAKE_DISABLE_FIND_PACKAGE_{nlohmann_json,httplib}=ON
    ;;
  find_package | siblings_installed) with_cmake "-DCMAKE_PREFIX_PATH=$PREFIX" ;;
  pkg_config)
    need pkg-config
    need make
    export PKG_CONFIG_PATH
    PKG_CONFIG_PATH=$(dirname "$(find "$PREFIX" -name coordination.pc)")
    make -C "$out" -f "$here/pkg_config/Makefile" "SOURCE=$here/main.cpp"
    run_all "$out"
    ;;
  plain)  # as the README has it
    need pkg-config
    # shellcheck disable=SC2046
    "$CXX" -std=c++17 "-I$root" "$here/main.cpp" $(pkg-config --cflags --libs cpp-httplib) \
      -lssl -lcrypto -pthread -o "$out/app"
    run_all "$out"
    ;;
  meson_wrap)
    mkdir "$out/subprojects"
    ln -s "$root" "$out/subprojects/coordination"
    with_meson
    ;;
  meson_cmake) with_meson -Dinstalled=true "--cmake-prefix-path=$PREFIX" ;;
  conan | vcpkg) "$root/tools/packaging/$way/check.sh" "$out" ;;
  *) echo "no such way: $way" >&2; exit 1 ;;
esac
