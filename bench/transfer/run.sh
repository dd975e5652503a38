#!/bin/sh
# Carries sweeps out within a time limit, several at a time, on the GPUs that CUDA_VISIBLE_DEVICES names.
#
#   RESULTS=folder [LIMIT=480] [JOBS=3] [PYTHON=python3] sh bench/transfer/run.sh FILE... [-- FILE...]
#
# Sweeps before a `--` are finished before those after it begin. Results are on disk after every run, and the same
# command goes on from them. Where a step cannot be captured as a CUDA graph, all of it is done without.
set -u
: "${RESULTS:?is the folder for results}" "${LIMIT:=480}" "${JOBS:=3}" "${PYTHON:=python3}"
end=$(($(date +%s) + LIMIT))
mkdir -p "$RESULTS/sweeps"
left() { echo $((end - $(date +%s))); }

options=
if [ ! -f "$RESULTS/graph" ]; then
  timeout 120 "$PYTHON" -m pytest -q -p no:cacheprovider tests/verify/transfer/test_graph.py \
    -k "changes_no_loss and adamw" >"$RESULTS/graph.txt" 2>&1 && echo true >"$RESULTS/graph" || echo false >"$RESULTS/graph"
  tail -n 3 "$RESULTS/graph.txt"
fi
graph=$(cat "$RESULTS/graph")
echo "graph = $graph; $(left) s left"

group() {
  [ $# -gt 0 ] && [ "$(left)" -gt 15 ] || return 0
  files=
  for file in "$@"; do
    sed "s/^bf16 = true/bf16 = true\ngraph = $graph/" "$file" >"$RESULTS/sweeps/${file##*/}"
    files="$files $RESULTS/sweeps/${file##*/}"
  done
  # shellcheck disable=SC2086  # names of sweeps have no spaces
  timeout -s INT -k 10 "$(left)" "$PYTHON" -m widthwise sweep $files --output "$RESULTS" --jobs "$JOBS" \
    >>"$RESULTS/sweeps.log" 2>&1
  echo "$* ended with $?; $(left) s left"
}

files=
for argument in "$@" --; do
  if [ "$argument" = -- ]; then
    # shellcheck disable=SC2086
    group $files
    files=
  else
    files="$files $argument"
  fi
done
wc -l "$RESULTS"/*.jsonl
