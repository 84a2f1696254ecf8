#!/usr/bin/env bash
# install.sh PACKAGE...: installs by apt those Debian packages whose contents are not there yet.
set -euo pipefail

header() { echo "#include <$1>" | g++ -E -x c++ -; }

# Is there what the package brings, from wherever it came?
have() {
  case $1 in
    ninja-build) command -v ninja || command -v make ;;
    clang) command -v clang++ ;;
    libclang-rt-dev) echo 'int main() {}' | clang++ -fsanitize=address -x c++ - -o /dev/null ;;
    libc++-dev) echo '#include <vector>' | clang++ -stdlib=libc++ -fsyntax-only -x c++ - ;;
    libc++abi-dev) echo 'int main() {}' | clang++ -stdlib=libc++ -x c++ - -o /dev/null ;;
    g++-mingw-w64-x86-64-posix) command -v x86_64-w64-mingw32-g++-posix ;;
    g++-*-linux-gnu*) command -v "${1#g++-}-g++" ;;
    dpkg-dev) command -v dpkg-source ;;
    time) [[ -x /usr/bin/time ]] ;;  # the shell has a word of this name
    qemu-user) command -v qemu-aarch64 ;;
    wine64) command -v wine64 || command -v /usr/lib/wine/wine64 ;;
    binutils) command -v nm ;;
    etcd-server) command -v etcd ;;
    etcd-client) command -v etcdctl ;;
    libcpp-httplib-dev) header httplib.h ;;
    nlohmann-json3-dev) header nlohmann/json.hpp ;;
    libssl-dev) header openssl/ssl.h ;;
    libcli11-dev) header CLI/CLI.hpp ;;
    libcurl4-openssl-dev) header curl/curl.h ;;
    doctest-dev) header doctest/doctest.h ;;
    protobuf-compiler) command -v protoc ;;
    libprotobuf-dev) header google/protobuf/stubs/common.h ;;
    python3-venv) python3 -c 'import ensurepip' ;;
    *) command -v "$1" ;;
  esac > /dev/null 2>&1
}

as_root() {
  if [[ $(id -u) == 0 ]]; then "$@"; else sudo "$@"; fi
}

apt() {
  # RUNLEVEL: without systemd, a service of a new package is not started in single-user mode.
  as_root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get -qq "$@" > "$log" 2>&1 ||
    { cat "$log" >&2; return 1; }
}

# Debian's package starts a server, now and at boot. The tests start their own.
install_etcd_server() {
  local systemd=false failed=false
  if [[ -d /run/systemd/system ]]; then systemd=true; fi
  if $systemd; then as_root systemctl --quiet mask etcd; fi
  apt install -y --no-install-recommends etcd-server || failed=true
  if $systemd; then as_root systemctl --quiet unmask etcd; fi
  if $failed; then return 1; fi
  if $systemd; then as_root systemctl --quiet disable etcd; fi
  as_root update-rc.d etcd disable > /dev/null
}

missing=()
for package in "$@"; do
  have "$package" || missing+=("$package")
done
[[ ${#missing[@]} -gt 0 ]] || exit 0

command -v apt-get > /dev/null || { echo "please install: ${missing[*]}" >&2; exit 1; }
log=$(mktemp)
trap 'rm -f "$log"' EXIT
echo "installing ${missing[*]}"
apt update
for package in "${missing[@]}"; do
  if [[ $package == etcd-server ]]; then
    install_etcd_server
  else
    apt install -y --no-install-recommends "$package"
  fi
done
