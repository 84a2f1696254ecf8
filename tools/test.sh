#!/usr/bin/env bash
# test.sh: installs what is missing, builds everything and runs every test; then once more under
# the sanitizers, and every fuzz target for ten seconds. Its last line says how many test cases
# passed, failed and were skipped.
#
# --quick: the unit tests, compiled once. Needs no etcd.
#
# COORDINATION_BUILD_DIR: where to build; default: build/ in the repository.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=${COORDINATION_BUILD_DIR:-$root/build}
mkdir -p "$build"
build=$(cd "$build" && pwd)
results=$build/results
rm -rf "$results"
mkdir "$results"
cd "$root"

# One job for each core, but two at most where they would have less than 4 GiB each.
jobs=$(nproc)
memory=$(awk '/^MemTotal/ {print int($2 / 1024 / 1024)}' /proc/meminfo)
if ((jobs > 2 && memory < 4 * jobs)); then jobs=2; fi

phase() {  # NAME COMMAND...: says how long it took; fails as the command does
  local name=$1 begin=$SECONDS status=0
  shift
  echo "== $name"
  "$@" || status=$?
  echo "== $name: $((SECONDS - begin)) s"
  return "$status"
}

install_missing() {
  tools/install.sh g++ cmake ninja-build pkg-config python3 binutils etcd-server etcd-client \
    libcpp-httplib-dev nlohmann-json3-dev libssl-dev doctest-dev libcli11-dev || return
  # Two more compilers, and another standard library: what needs them is skipped without them.
  tools/install.sh clang libclang-rt-dev libc++-dev libc++abi-dev || true
  tools/install.sh g++-mingw-w64-x86-64-posix || true
  tools/install.sh libcurl4-openssl-dev || true  # for another Transport
  tools/install.sh meson || true
  # For the clients of other languages, where those languages are.
  if command -v cargo > /dev/null; then
    tools/install.sh protobuf-compiler libprotobuf-dev || true
  fi
  tools/install.sh python3-venv || true
}

# Those that the conformance tests run on, beside the one that is installed: into a file, as it is
# done in the background.
fetch_etcds() {
  local version path paths=
  for version in 3.5 3.6 3.7; do
    if path=$(tools/fetch_etcd.sh "$version" "$build/etcd/$version"); then paths+=:$path; fi
  done
  echo "${paths#:}" > "$build/etcds"
}

build_preset() {  # PRESET [CMAKE OPTION...]
  local preset=$1
  shift
  cmake --preset "$preset" -B "$build/$preset" "$@" && cmake --build "$build/$preset" -j "$jobs"
}

run_tests() {  # PRESET PART [CTEST OPTION...]
  local preset=$1 part=$2 wrapper=()
  shift 2
  # ThreadSanitizer needs addresses where it expects them.
  if [[ $preset == tsan ]] && setarch -R true 2> /dev/null; then wrapper=(setarch -R); fi
  "${wrapper[@]}" ctest --test-dir "$build/$preset" -j "$jobs" "$@" --output-on-failure \
    --test-output-size-passed 1000000 --test-output-size-failed 1000000 \
    --output-junit "$results/$preset.$part.xml"
}

# Sets `job`: the command runs meanwhile, on what the others leave of the processors.
in_background() {  # COMMAND...
  set -m  # a process group of its own, to be ended as a whole
  {
    chrt --idle --pid 0 "$BASHPID" || renice -n 19 -p "$BASHPID" || true
    "$@"
  } > "$build/background.log" 2>&1 &
  job=$!
  set +m
}

finish_background() {
  local status=0
  wait "$job" || status=$?
  job=
  cat "$build/background.log"  # also for what it has skipped
  return "$status"
}

# Test cases where a program has counted them, else tests.
count_results() {
  python3 - "$results"/*.xml << 'PYTHON'
import re
import sys
import xml.etree.ElementTree as xml

passed = failed = skipped = 0
for path in sys.argv[1:]:
    for test in xml.parse(path).iter("testcase"):
        output = test.findtext("system-out") or ""
        cases = re.findall(r"test cases: +\d+ \| +(\d+) passed \| +(\d+) failed", output)
        good, bad = map(int, cases[-1]) if cases else (int(test.get("status") == "run"), 0)
        if test.get("status") == "fail":
            bad = max(bad, 1)
        not_done = 1 if test.get("status") == "notrun" else min(good, output.count("SKIPPED"))
        passed += good - min(good, not_done)
        failed += bad
        skipped += not_done
print(passed, failed, skipped)
PYTHON
}

# What the tests have measured, and say even when they pass.
print_figures() {
  python3 - "$results"/*.xml << 'PYTHON'
import re
import sys
import xml.etree.ElementTree as xml

for path in sys.argv[1:]:
    preset = path.rsplit("/", 1)[1].split(".")[0]
    for test in xml.parse(path).iter("testcase"):
        output = test.findtext("system-out") or ""
        for line in re.findall(r"MESSAGE: (.+)|^(fault sweep: .+)", output, re.M):
            print(f"{preset} {test.get('name')}: {line[0] or line[1]}")
PYTHON
}

finish() {
  local status=$? passed=0 failed=0 skipped=0
  set +e
  if [[ -n ${job:-} ]]; then kill -- "-$job"; fi
  if compgen -G "$results/*.xml" > /dev/null; then
    phase "what was measured" print_figures
    read -r passed failed skipped < <(count_results)
  fi
  ((status != 0 && failed == 0)) && failed=1
  ((failed != 0 && status == 0)) && status=1
  echo "all of it: $SECONDS s"
  echo "$passed passed, $failed failed, $skipped skipped"
  exit "$status"
}
trap finish EXIT
trap 'exit 130' INT TERM

quick() {
  tools/install.sh g++ cmake ninja-build pkg-config python3 libcpp-httplib-dev \
    nlohmann-json3-dev libssl-dev doctest-dev
  if command -v ninja > /dev/null; then export CMAKE_GENERATOR=Ninja; fi
  cmake --preset dev -B "$build/dev"
  phase "dev: build" cmake --build "$build/dev" -j "$jobs" --target unit_tests
  # Most of what they do is to wait.
  phase "dev: test" run_tests dev quick -j $((2 * jobs)) -R '^(unit[.]|build[.]header_contract)'
}
if [[ ${1:-} == --quick ]]; then
  quick
  exit
fi

phase "install what is missing" install_missing
if command -v ninja > /dev/null; then export CMAKE_GENERATOR=Ninja; fi

# The sanitizers with the other compiler, if it can: so both compile everything.
options=()
if echo 'int main() {}' | clang++ -fsanitize=address -x c++ - -o "$build/probe" 2> /dev/null; then
  options=(-DCMAKE_CXX_COMPILER=clang++)
fi
prepare() {
  fetch_etcds && tests/interop/build.sh "$build/clients" && build_preset asan "${options[@]}" &&
    build_preset tsan "${options[@]}"
}

# Most tests wait more than they work: compile meanwhile.
status=0
phase "dev: build" build_preset dev
in_background prepare
phase "dev: test" run_tests dev most -j $((jobs + 1)) \
  -LE 'alone|build|conformance|interop' || status=1
phase "asan, tsan: build, more etcds, other clients" finish_background
COORDINATION_ETCDS=$(< "$build/etcds")
export COORDINATION_ETCDS COORDINATION_CLIENTS=$build/clients
phase "dev: tests that run alone" run_tests dev alone -L alone || status=1
in_background run_tests dev build -L build
phase "dev: conformance, other clients" run_tests dev conformance -L 'conformance|interop' ||
  status=1
# These have ten times as long for everything, and wait for nearly all of it.
phase "asan: test" run_tests asan all -j $((2 * jobs)) || status=1
phase "tsan: test" run_tests tsan all -j $((2 * jobs)) || status=1
phase "dev: how it can be compiled" finish_background || status=1

exit "$status"
