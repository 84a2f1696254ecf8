#!/usr/bin/env bash
# build.sh FOLDER: builds or installs the clients of other languages into the folder, each through
# its own package manager. For each NAME there is then NAME.command, one argument a line, or
# NAME.skipped, why not.
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)

build_go() {
  (cd "$here/go" && go build -p 1 -o "$folder/go/interop" .) && command=("$folder/go/interop")
}

build_python() {
  python3 -m venv "$folder/python" &&
    "$folder/python/bin/pip" install --quiet --disable-pip-version-check \
      -r "$here/python/requirements.txt" &&
    command=("$folder/python/bin/python" "$here/python/interop.py")
}

build_rust() {
  cp -r "$here"/rust/* "$folder/rust" &&
    cargo build --quiet --jobs 1 --manifest-path "$folder/rust/Cargo.toml" \
      --target-dir "$folder/rust/target" && command=("$folder/rust/target/debug/interop")
}

build_node() {
  cp "$here"/node/* "$folder/node" &&
    npm --prefix "$folder/node" install --silent --ignore-scripts --no-audit --no-fund &&
    command=(node "$folder/node/interop.js")
}

offer() { # NAME PROGRAM...: what cannot be done without
  local name=$1 program
  shift
  rm -f "$folder/$name.command" "$folder/$name.skipped"
  mkdir -p "$folder/$name"
  for program in "$@"; do
    if ! command -v "$program" > /dev/null; then
      echo "there is no $program on this machine" > "$folder/$name.skipped"
      return
    fi
  done
  if "build_$name" > "$folder/$name.log" 2>&1; then
    printf '%s\n' "${command[@]}" > "$folder/$name.command"
  else
    grep -m 1 -i error "$folder/$name.log" > "$folder/$name.skipped" ||
      tail -n 1 "$folder/$name.log" > "$folder/$name.skipped"
  fi
}

offer go go
offer python python3
offer node node npm
offer rust cargo protoc
