#!/usr/bin/env bash
# demo.sh [ENDPOINT]: builds examples/quickstart.cpp and runs it, on the etcd at ENDPOINT or, without
# one, on an etcd in memory. Installs what that needs: a compiler and four packages.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=${COORDINATION_BUILD_DIR:-$root/build}
source=$root/examples/quickstart.cpp
program=$build/quickstart

"$root/tools/install.sh" g++ pkg-config libcpp-httplib-dev nlohmann-json3-dev libssl-dev

mkdir -p "$build"
if [[ ! $program -nt $source || ! $program -nt $root/coordination.hpp ]]; then
  read -ra httplib <<< "$(pkg-config --cflags --libs cpp-httplib)"
  build_it=(g++ -std=c++17 -O1 -I "$root" "$source" "${httplib[@]}" -lssl -lcrypto -pthread)
  echo "+ ${build_it[*]} -o $program"
  "${build_it[@]}" -o "$program"
fi
exec "$program" "$@"
