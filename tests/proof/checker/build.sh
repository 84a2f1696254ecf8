#!/usr/bin/env bash
# build.sh OUTPUT [--test]: builds the checker, and tests it on histories that are broken.
# Exit status: 0; 77 with "SKIPPED: <reason>" if Go, or the module, cannot be had.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")" || exit
skip() {
  echo "SKIPPED: no checker of linearizability: $*"
  exit 77
}

command -v go > /dev/null || skip "there is no Go on this machine"
reason=$(go mod download 2>&1) || skip "$(tail -n 1 <<< "$reason")"
if [[ ${2:-} == --test ]]; then go test . || exit; fi
go build -o "$1" .
