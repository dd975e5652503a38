#!/bin/sh
# Carries sweeps out within a time limit, several at a time, on the GPUs that CUDA_VISIBLE_DEVICES names.
#
#   RESULTS=folder [LIMIT=480] [JOBS=3] [PYTHON=python3] sh bench/transfer/run.sh FILE... [-- FILE...]
#
# Sweeps before a `--` are finished before those after it begin. They go on from what docs/results/transfer holds, and
# from the folder where a stopped command left off; results are on disk after every run.
set -u
: "${RESULTS:?is the folder for results}" "${LIMIT:=480}" "${JOBS:=3}" "${PYTHON:=python3}"
end=$(($(date +%s) + LIMIT))
mkdir -p "$RESULTS"
left() { echo $((end - $(date +%s))); }

group() {
  [ $# -gt 0 ] && [ "$(left)" -gt 15 ] || return 0
  for file in "$@"; do
    results=$(basename "$file" .toml).jsonl
    [ -e "$RESULTS/$results" ] || [ ! -e "docs/results/transfer/$results" ] ||
      cp "docs/results/transfer/$results" "$RESULTS/"
  done
  timeout -s INT -k 10 "$(left)" "$PYTHON" -m widthwise sweep "$@" --output "$RESULTS" --jobs "$JOBS" --no-plot \
    >>"$RESULTS/sweeps.log" 2>&1
  echo "$* ended with $?; $(left) s left"
}

files=
for argument in "$@" --; do
  if [ "$argument" = -- ]; then
    # shellcheck disable=SC2086  # names of sweeps have no spaces
    group $files
    files=
  else
    files="$files $argument"
  fi
done
wc -l "$RESULTS"/*.jsonl
