#!/usr/bin/env bash
# Compares the interface definitions with what clients already rely on: the image of what has landed, and the point
# where this branch left origin/main (the image is refreshed now and then, the branch point is always current).
set -euo pipefail
cd "$(dirname "$0")/.."

landed=proto/landed.binpb
if [[ ! -f $landed ]]; then
  echo "breaking.sh: $landed is missing: restore it with git, or write the first one with \`make proto-landed\`" >&2
  exit 1
fi
buf breaking --against "$landed"

base=$(git merge-base HEAD origin/main 2>/dev/null) || exit 0 # a clone without the remote branch
sources=$(git ls-tree --name-only "$base" -- buf.yaml proto third_party)
[[ $sources == *buf.yaml* ]] || exit 0 # the branch point is older than the definitions

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
# shellcheck disable=SC2086 # one word per path is meant
git archive "$base" -- $sources | tar -x -C "$tmp"
# An image, because two workspaces can only be compared while they have equally many modules.
buf build "$tmp" -o "$tmp/base.binpb"
buf breaking --against "$tmp/base.binpb"
