#!/bin/sh
# Fetches an etcd 3.5 for the tests, from a newer Debian suite, through this machine's own APT.
#
#   tools/fetch_etcd35.sh [folder [suite...]]
#
# Prints the path of the binary. Nothing is installed, and APT's own lists and cache are left
# alone: everything goes below the folder (default: build/etcd35), where a second run finds it.
# Exit status: 0; 3 with "SKIPPED: <reason>" on standard error if it cannot be had.
set -u

skip() {
  echo "SKIPPED: $*" >&2
  exit 3
}

root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$root/build/etcd35}
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- trixie forky sid

for program in apt-get apt-config dpkg awk; do
  command -v "$program" >/dev/null 2>&1 || skip "there is no $program on this machine"
done
here=$(. /etc/os-release 2>/dev/null && echo "${ID:-} ${VERSION_CODENAME:-}")
case $here in debian\ ?*) ;; *) skip "this is not a Debian release ($here)" ;; esac
codename=${here#debian }
sources_list='' sources_parts=''
eval "$(apt-config shell sources_list Dir::Etc::sourcelist/f sources_parts Dir::Etc::sourceparts/d)"

mkdir -p "$folder" || skip "cannot write to $folder"
folder=$(cd "$folder" && pwd)

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

complaint() { # log; the first in it, else its last line
  grep -m 1 '^[EW]:' "$1" || tail -n 1 "$1"
}

fetch() { # suite; prints why it failed
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

# Which version it is, or why it does not run here (an older libc, another processor).
version_of() { "$1" --version 2>&1 | head -n 1; }

reasons=
for suite in "$@"; do
  binary=$folder/$suite/usr/bin/etcd
  [ -x "$binary" ] || why=$(fetch "$suite") || { reasons="$reasons $why;"; continue; }
  version=$(version_of "$binary")
  case $version in
    "etcd Version: 3.5."*)
      echo "$binary"
      exit 0
      ;;
  esac
  reasons="$reasons $suite: not an etcd 3.5 that runs here: $version;"
done
skip "no etcd 3.5:$reasons"
