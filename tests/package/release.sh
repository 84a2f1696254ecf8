#!/usr/bin/env bash
# tools/release, in a repository made for this: what it accepts, and of what it must complain.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
command -v git > /dev/null || { echo "SKIPPED: no git"; exit 77; }
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
said=$out/said
export GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_NOSYSTEM=1
git init -q "$out/repository"
cd "$out/repository"
git config user.name "A Tester"
git config user.email tester@example.com

mkdir -p tools/packaging/vcpkg
cp "$root/tools/release" tools
commit() {  # VERSION-OF-THE-HEADER FIRST-ENTRY-OF-THE-CHANGELOG VERSION-OF-THE-PORT
  IFS=. read -r major minor patch <<< "$1"
  printf '#define COORDINATION_VERSION_%s\n' "MAJOR $major" "MINOR $minor" "PATCH $patch" \
    > coordination.hpp
  printf '# Title\n\n**9.9.9**, 2000-01-01.\n\n## Changelog\n\n%s More.\n\n**0.1.0**, 2026-01-01.\n' \
    "$2" > README.md
  printf '{ "version": "%s" }\n' "$3" > tools/packaging/vcpkg/vcpkg.json
  git add -A
  git commit -qm "$*"
}
accepted() { tools/release "$@" > "$said" 2>&1 || { cat "$said"; echo "FAILED"; exit 1; }; }
refused() {  # MESSAGE: this, and nothing else
  if tools/release > "$said" 2>&1; then echo "FAILED: accepted, but: $1"; exit 1; fi
  if [[ $(wc -l < "$said") != 1 ]] || ! grep -q "$1" "$said"; then
    cat "$said"
    echo "FAILED: should say: $1"
    exit 1
  fi
}

commit 1.2.0 "**1.2.0**, 2026-02-03." 1.2.0
accepted
[[ -z $(git tag) ]]
accepted --tag
[[ $(git tag) == v1.2.0 && $(git cat-file -t v1.2.0) == tag ]]
refused "v1.2.0 is there already"
commit 1.3.0 "**1.2.0**, 2026-02-03." 1.3.0
refused "the changelog begins with '1.2.0', the header says 1.3.0"
commit 1.3.0 "**1.3.0**, soon." 1.3.0
refused "no date"
commit 1.3.0 "**1.3.0**, 2026-02-04." 1.2.0
refused "vcpkg.json is of another version than 1.3.0"
commit 1.1.9 "**1.1.9**, 2026-02-04." 1.1.9
refused "v1.1.9 is older than v1.2.0"
commit 1.10.0 "**1.10.0**, 2026-02-04." 1.10.0
echo more >> README.md
refused "not committed"
git commit -qam "More"
accepted
echo "all of it"
