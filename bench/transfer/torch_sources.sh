#!/bin/sh
# Makes the third text: the Python sources of the installed torch, four to five times as long as the standard library,
# so that a run of 1600 steps reads a sixth of it, not two thirds.
#
#   [PYTHON=python3] sh bench/transfer/torch_sources.sh      # out/data/torch, of which a tenth of the files is held out
set -eu
to=$(pwd)/out/data/torch
rm -rf "$to" && mkdir -p "$to"
cd "$("${PYTHON:-python3}" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent)')"
find . -name '*.py' | LC_ALL=C sort >"$to.list"
tar -cf - -T "$to.list" | tar -xf - -C "$to"
xargs cat <"$to.list" | sha256sum
rm "$to.list"
