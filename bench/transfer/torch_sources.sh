#!/bin/sh
# Makes the third text: the Python sources of the installed torch, about four times as long as the standard library, so
# that a run of 1600 steps reads a sixth of it, not two thirds.
#
#   [PYTHON=python3] sh bench/transfer/torch_sources.sh      # out/data/torch, of which a tenth of the files is held out
#
# The sum that it prints is 7aa90c0008dde11d80413019cec6afa3965bdcb10543ef32ea62da50a6dad353 for torch 2.11.0+cu130.
set -eu
from=$("${PYTHON:-python3}" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent)')
to=$(pwd)/out/data/torch
rm -rf "$to" && mkdir -p "$to"
cd "$from"
find . -name '*.py' | LC_ALL=C sort >"$to.list"
tar -cf - -T "$to.list" | tar -xf - -C "$to"
xargs cat <"$to.list" | sha256sum
rm "$to.list"
