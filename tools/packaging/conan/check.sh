#!/usr/bin/env bash
# check.sh FOLDER: makes the Conan package and its test package there, with what this system has in
# place of what the recipe requires. Exit code 77 = skipped.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
command -v conan > /dev/null || { echo "SKIPPED: no conan"; exit 77; }
export CONAN_HOME=$1/conan
conan profile detect
cat >> "$CONAN_HOME/profiles/default" << PROFILE
[platform_requires]
cpp-httplib/0.99
nlohmann_json/3.99
openssl/3.0
PROFILE
conan create "$here" -c "tools.cmake.cmake_layout:test_folder=$1/test"
