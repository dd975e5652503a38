#!/bin/sh
# Makes the second text: 8 MiB (A to C) of the GNU Collaborative International Dictionary of English (GPL), from Debian.
#
#   sh bench/transfer/dictionary.sh      # out/data/dictionary/000 ... 127, of which a tenth is held out
set -eu
to=out/data/dictionary
work=$(mktemp -d)
(cd "$work" && apt-get download -q dict-gcide && dpkg -x dict-gcide_*.deb .)
rm -rf "$to" && mkdir -p "$to"
gunzip -c <"$work/usr/share/dictd/gcide.dict.dz" 2>/dev/null | head -c 8388608 | split -b 65536 -d -a 3 - "$to/"
rm -r "$work"
cat "$to"/* | sha256sum
