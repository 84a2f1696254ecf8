#!/bin/sh
# Fetches an etcd for the tests: 3.4 and 3.5 from Debian's suites, through this machine's own APT;
# 3.6 and 3.7, which Debian does not have, are built as Go modules where Go is installed.
#
#   tools/fetch_etcd.sh 3.4|3.5|3.6|3.7 [folder]
#
# Prints the path of the binary. Nothing is installed, and APT's own lists and cache are left
# alone: everything goes below the folder (default: build/etcd/VERSION), where a second run finds
# it. (What Go downloads and compiles, it also keeps in its own caches.)
# Exit status: 0; 3 with "SKIPPED: <reason>" on standard error if it cannot be had.
set -u

skip() {
  echo "SKIPPED: no etcd $version: $*" >&2
  exit 3
}

need() {
  for program in "$@"; do
    command -v "$program" >/dev/null 2>&1 || skip "there is no $program on this machine"
  done
}

complaint() { # log; the first in it, else its last line
  grep -m 1 '^[EW]:' "$1" || tail -n 1 "$1"
}

# Prints the binary and ends, if that is the version and runs here; else says what it is. (It may
# be made for a newer libc or another processor.)
offer() { # binary
  is=$("$1" --version 2>&1 | head -n 1)
  case $is in "etcd Version: $version."*) echo "$1" && exit 0 ;; esac
  reasons="$reasons not an etcd $version that runs here: $is;"
}

# -- from Debian --------------------------------------------------------------------------------

# The stanzas and lines of APT's own sources that name this release, with another suite in its
# place; its -updates and -security are left out, as not every suite has them.
derive_sources() { # suite, output folder
  for file in "$sources_list" "$sources_parts"*.list; do
    [ -f "$file" ] && cat "$file"
  done | awk -v from="$codename" -v to="$1" '
    $1 == "deb" {
      for (i = 2; i <= NF; ++i) if ($i == from) { $i = to; print; next }
    }' >"$2/derived.list"
  for file in "$sources_parts"*.sources; do
    [ -f "$file" ] && { cat "$file"; echo; }
  done | awk -v from="$codename" -v to="$1" '
    function flush() {
      if (wanted && !disabled) print stanza "Types: deb\nSuites: " to "\n"
      stanza = ""; wanted = disabled = in_suites = in_types = 0
    }
    /^[ \t]*$/ { flush(); next }
    /^#/ { next }
    /^[^ \t]/ {
      name = tolower($1)
      in_suites = name ~ /^suites:/
      in_types = name ~ /^types:/
      if (name ~ /^enabled:/ && tolower($0) ~ /no|false|0/) disabled = 1
    }
    in_suites {
      for (i = 1; i <= NF; ++i) if ($i == from || $i == "Suites:" from) wanted = 1
      next
    }
    in_types { next }
    { stanza = stanza $0 "\n" }
    END { flush() }' >"$2/derived.sources"
  [ -s "$2/derived.list" ] || [ -s "$2/derived.sources" ]
}

private_apt() { # suite, arguments of apt-get
  private=$folder/apt/$1
  shift
  apt-get -qq -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$private/sources" \
    -o Dir::State::lists="$private/lists" -o Dir::Cache="$private/cache" \
    -o APT::Sandbox::User="$(id -un)" -o APT::Default-Release= -o APT::Update::Error-Mode=any \
    -o Acquire::Languages=none -o Acquire::Retries=1 -o Acquire::http::Timeout=15 "$@"
}

unpack() { # suite; prints why it failed
  private=$folder/apt/$1
  mkdir -p "$private/sources" "$private/lists/partial" "$private/cache/archives/partial"
  derive_sources "$1" "$private/sources" || { echo "APT has no source for $codename"; return 1; }
  private_apt "$1" update >"$private/log" 2>&1 ||
    { echo "$1: update failed: $(complaint "$private/log")"; return 1; }
  (cd "$private" && private_apt "$1" download etcd-server etcd-client) >"$private/log" 2>&1 ||
    { echo "$1: download failed: $(complaint "$private/log")"; return 1; }
  mkdir -p "$folder/$1"
  for package in "$private"/etcd-server_*.deb "$private"/etcd-client_*.deb; do
    dpkg -x "$package" "$folder/$1" >"$private/log" 2>&1 ||
      { echo "$1: cannot unpack: $(complaint "$private/log")"; return 1; }
  done
}

from_debian() { # suite...
  need apt-get apt-config dpkg awk
  here=$(. /etc/os-release 2>/dev/null && echo "${ID:-} ${VERSION_CODENAME:-}")
  case $here in debian\ ?*) ;; *) skip "this is not a Debian release ($here)" ;; esac
  codename=${here#debian }
  sources_list='' sources_parts=''
  eval "$(apt-config shell sources_list Dir::Etc::sourcelist/f sources_parts Dir::Etc::sourceparts/d)"
  for suite in "$@"; do
    binary=$folder/$suite/usr/bin/etcd
    [ -x "$binary" ] || why=$(unpack "$suite") || { reasons="$reasons $why;"; continue; }
    offer "$binary"
  done
}

# -- as a Go module -----------------------------------------------------------------------------

# Slowly, so that others can work meanwhile: it is some minutes of a processor's time.
build() { # prints why it failed
  exec 2>"$folder/log"
  cd "$folder" || return 1
  [ -f go.mod ] || go mod init scratch
  newest=$(go list -m -versions go.etcd.io/etcd/server/v3 | tr ' ' '\n' |
    grep "^v$version\.[0-9]*\$" | tail -n 1)
  [ -n "$newest" ] && go get "go.etcd.io/etcd/server/v3@$newest" &&
    CGO_ENABLED=0 GOMAXPROCS=1 nice \
      go build -p 1 -trimpath -ldflags '-s -w' -o etcd go.etcd.io/etcd/server/v3 ||
    { tail -n 1 "$folder/log"; return 1; }
}

from_go() {
  need go
  [ -x "$folder/etcd" ] || why=$(build) || { reasons=" $why"; return; }
  offer "$folder/etcd"
}

version=${1:-}
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${2:-$root/build/etcd/$version}
mkdir -p "$folder" || skip "cannot write to $folder"
folder=$(cd "$folder" && pwd)
reasons=
case $version in
  3.4) from_debian bookworm ;;
  3.5) from_debian trixie forky sid ;;
  3.6 | 3.7) from_go ;;
  *) skip "usage: tools/fetch_etcd.sh 3.4|3.5|3.6|3.7 [folder]" ;;
esac
skip "$reasons"
