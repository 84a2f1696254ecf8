#!/usr/bin/env bash
# check.sh CASE COMPILER STANDARD [FILE]: one way to compile the header. Exit code 77 = skipped.
# From the environment: DEFINITIONS, OPTIONS, INCLUDES and LIBRARIES of coordination::coordination,
# and COMPILED, the library coordination::compiled.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
check=$1 compiler=$2 standard=$3
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

fail() { echo "FAILED: $*" >&2; exit 1; }

command -v "$compiler" > /dev/null || { echo "SKIPPED: no $compiler"; exit 77; }

includes=(-I "$root")
for folder in ${INCLUDES:-}; do
  # The compiler's own folders must keep their place in its list.
  [[ $folder == "$root" || $folder == /usr/include ]] || includes+=(-isystem "$folder")
done
options=()
for option in ${OPTIONS:-}; do options+=("$option"); done
for definition in ${DEFINITIONS:-}; do options+=("-D$definition"); done
libraries=()
for library in ${LIBRARIES:-}; do libraries+=("$library"); done

strict=(-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wundef -Werror)
compiled=(-DCOORDINATION_HEADER_ONLY=0)

compile() {  # OUTPUT SOURCE [OPTION...]
  local object=$1 source=$2
  shift 2
  "$compiler" "-std=c++$standard" "${strict[@]}" "${includes[@]}" "${options[@]}" "$@" \
    -c "$source" -o "$out/$object"
}
link_and_run() {  # OBJECT...
  (cd "$out" && "$compiler" "$@" "${libraries[@]}" -pthread -o program && ./program)
}
folder_of() {  # HEADER
  echo "#include <$1>" | g++ -E -x c++ - | sed -n "s|^# 1 \"\(.*\)/$1\".*|\1|p" | head -n 1
}
no_symbols() {  # OBJECT: what only includes the header pays nothing for it
  command -v nm > /dev/null || fail "no nm"
  nm -C "$out/$1" > "$out/symbols"
  if grep 'coordination::' "$out/symbols"; then fail "symbols in an object that uses nothing"; fi
}

case $check in
  include_alone)
    compile empty.o "$here/include_alone.cpp"
    no_symbols empty.o
    ;;
  include_compiled)
    compile empty.o "$here/include_alone.cpp" "${compiled[@]}"
    no_symbols empty.o
    ;;
  implementation)  # optimised: some warnings come only then
    compile implementation.o "$here/implementation.cpp" "${compiled[@]}" -O2
    ;;
  odr)
    compile odr_a.o "$here/odr_a.cpp"
    compile odr_b.o "$here/odr_b.cpp"
    link_and_run odr_a.o odr_b.o
    ;;
  split)
    compile a.o "$here/split_a.cpp" "${compiled[@]}"
    compile b.o "$here/split_b.cpp" "${compiled[@]}"
    compile implementation.o "$here/implementation.cpp" "${compiled[@]}"
    link_and_run a.o b.o implementation.o
    ;;
  late_implementation)
    compile late.o "$here/late_implementation.cpp" "${compiled[@]}"
    link_and_run late.o
    ;;
  forgotten_flags)  # where cpp-httplib is a library, and was built with OpenSSL
    [[ ${LIBRARIES:-} == *cpp-httplib* ]] || { echo "SKIPPED: cpp-httplib is no library"; exit 77; }
    options=()
    compile forgotten_flags.o "$here/forgotten_flags.cpp"
    link_and_run forgotten_flags.o
    ;;
  no_httplib)
    options=(-DCOORDINATION_USE_HTTPLIB=0)
    libraries=()
    compile none.o "$here/no_httplib.cpp" -MD -MF "$out/needs"
    if grep -iE 'httplib\.h|openssl/' "$out/needs"; then fail "these headers are still needed"; fi
    link_and_run none.o
    ;;
  no_memory_etcd)
    options+=(-DCOORDINATION_MEMORY_ETCD=0)
    compile none.o "$here/no_memory_etcd.cpp"
    link_and_run none.o
    ;;
  no_rtti)  # a user's file, and with the implementation
    compile use.o "$here/use.cpp" "${compiled[@]}" -fno-rtti
    link_and_run use.o "$COMPILED"
    options+=(-fno-rtti -fno-exceptions -DCPPHTTPLIB_NO_EXCEPTIONS)
    compile use.o "$here/use.cpp" "${compiled[@]}"
    compile implementation.o "$here/implementation.cpp" "${compiled[@]}"
    link_and_run use.o implementation.o
    ;;
  libcxx)  # cpp-httplib is compiled for libstdc++ where it is a library
    flags=(-stdlib=libc++)
    echo '#include <vector>' | "$compiler" "${flags[@]}" -x c++ -fsyntax-only - 2> /dev/null ||
      { echo "SKIPPED: $compiler has no libc++"; exit 77; }
    compile implementation.o "$here/implementation.cpp" "${compiled[@]}" "${flags[@]}"
    options=(-DCOORDINATION_USE_HTTPLIB=0)
    libraries=("${flags[@]}")
    compile none.o "$here/no_httplib.cpp" "${flags[@]}"
    link_and_run none.o
    ;;
  no_exceptions)
    compile use.o "$here/use.cpp" "${compiled[@]}" -fno-exceptions
    link_and_run use.o "$COMPILED"
    ;;
  foreign_macros)  # in a user's file; the implementation has its own
    compile foreign_macros.o "$here/foreign_macros.cpp" "${compiled[@]}"
    link_and_run foreign_macros.o "$COMPILED"
    ;;
  min_max)
    compile min_max.o "$here/min_max.cpp"
    ;;
  windows)  # compiled for it, without the headers of this system
    includes=(-I "$root" -isystem "$out/include")
    mkdir "$out/include"
    ln -s "$(folder_of nlohmann/json.hpp)/nlohmann" "$(folder_of httplib.h)/httplib.h" \
      "$out/include"
    options=(-O1)  # without, it has more sections than an object file may have
    compile implementation.o "$here/implementation.cpp" "${compiled[@]}"
    ;;
  must_not_compile)
    # The same file twice: the good twin proves that the bad one fails for its own reason, and its
    # first line says with which message, and its second how often, if that matters.
    source=$here/must_not_compile/$4.cpp
    message=$(sed -n '1s|^// error: ||p' "$source")
    [[ -n $message ]] || fail "$source does not say which error is due"
    compile good.o "$source" "${compiled[@]}" -DMUST_FAIL=0
    if compile bad.o "$source" "${compiled[@]}" -DMUST_FAIL=1 2> "$out/errors"; then
      fail "$source compiles"
    fi
    times=$(sed -n '2s|^// times: ||p' "$source")
    found=$(grep -cE "error: .*($message)" "$out/errors" || true)
    ((found == ${times:-found} && found > 0)) || { cat "$out/errors"; fail "not its errors"; }
    ;;
  *) fail "no such check: $check" ;;
esac
