#!/usr/bin/env bash
# check.sh COMPILER [FLAG...]: looks for everything that the README names, compiles all C++ in it,
# runs what is a whole program, and has CMake read what is CMake's.
# From the environment: DEFINITIONS, OPTIONS and INCLUDES for the compiler; LIBRARIES for the linker
# (without them nothing is linked and run).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
compiler=$1
shift
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

command -v "$compiler" > /dev/null || { echo "SKIPPED: no $compiler"; exit 77; }

flags=(-std=c++17 -Wall -Wextra -Wno-unused -Wunused-result "-I$root" "-I$here" "$@")
for option in ${OPTIONS:-}; do flags+=("$option"); done
for definition in ${DEFINITIONS:-}; do flags+=("-D$definition"); done
for folder in ${INCLUDES:-}; do
  # The compiler's own folders must keep their place in its list.
  [[ $folder == "$root" || $folder == /usr/include ]] || flags+=(-isystem "$folder")
done
read -ra libraries <<< "${LIBRARIES:-}"

mkdir "$out/cmake"
python3 "$here/check_readme.py" "$root/README.md" "$out/cmake"
cmake -S "$out/cmake" -B "$out/cmake/build" > "$out/cmake/log" || { cat "$out/cmake/log"; exit 1; }
python3 "$here/extract_readme.py" "$root/README.md" "$out"

echo "fragments"
"$compiler" "${flags[@]}" -Werror -DCOORDINATION_HEADER_ONLY=0 -fsyntax-only "$out/fragments.cpp"
for source in "$out"/file_*.cpp; do
  echo "${source##*/}"
  "$compiler" "${flags[@]}" -Werror -fsyntax-only "$source"
done
for source in "$out"/program_*.cpp; do
  echo "${source##*/}"
  if [[ ${#libraries[@]} == 0 ]]; then
    "$compiler" "${flags[@]}" -Werror -fsyntax-only "$source"
  else
    "$compiler" "${flags[@]}" -Werror "$source" "${libraries[@]}" -pthread -o "$out/program"
    (cd "$out" && ./program)
  fi
done
