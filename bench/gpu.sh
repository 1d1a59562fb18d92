#!/usr/bin/env bash
# Everything that needs a CUDA device, in calls of under ten minutes: build, GPU tests,
# compute-sanitizer, counters of the regression gate, local_pass, whole steps, and, where asked for,
# the device's rates and the state precisions. Results and logs go to $OUT (default
# bench/results/gpu), a summary line a stage at the end. No network. Exit status: 1 if the build or
# a test failed, or a row failed its check; 2 without a device.
#
#   OUT=results PYTHON=python3 bash bench/gpu.sh \
#       [build test sanitize counters local_pass step devices states]
#   PIP_OPTIONS=--break-system-packages where the system's Python asks for it
set -u
cd "$(dirname "$0")/.."
OUT="$(mkdir -p "${OUT:-bench/results/gpu}" && cd "${OUT:-bench/results/gpu}" && pwd)"
PYTHON="${PYTHON:-python3}"
STAGES="${*:-build test sanitize counters local_pass step}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
summary="$OUT/summary.txt"
: >"$summary"
failed=0

# stage NAME SECONDS GATES COMMAND…: runs under a time limit into NAME.log; GATES=yes fails the run
stage() {
  local name=$1 limit=$2 gates=$3 from=$SECONDS status=0
  shift 3
  timeout -k 10 "$limit" "$@" >"$OUT/$name.log" 2>&1 || status=$?
  local word=ok
  [ "$status" -ne 0 ] && word="FAILED ($status)"
  [ "$status" -eq 124 ] && word="TIMED OUT (${limit} s)"
  [ "$status" -ne 0 ] && [ "$gates" = yes ] && failed=1
  printf '%-22s %-18s %4d s  %s\n' "$name" "$word" $((SECONDS - from)) \
    "$(grep -v '^[[:space:]]*$' "$OUT/$name.log" | tail -n 1 | cut -c1-120)" | tee -a "$summary"
}

wanted() { [[ " $STAGES " == *" $1 "* ]]; }

{ nvidia-smi; "$PYTHON" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())'; \
  nvcc --version; } >"$OUT/machine.log" 2>&1

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu.sh: expected a CUDA device that torch can use, got none" | tee -a "$summary"
  exit 2
fi

if wanted build; then
  arch="$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')-real"
  export FFENGINE_EXTENSION=1 FFENGINE_CUDA=1 CMAKE_CUDA_ARCHITECTURES="${ARCH:-$arch}"
  # an editable install, since ffengine.kernels exists only through the package's own mapping
  stage build 240 yes "$PYTHON" -m pip install -q --no-build-isolation --no-deps \
    --disable-pip-version-check ${PIP_OPTIONS:-} -e .
fi
if wanted test; then
  stage test_gpu 150 yes "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider tests
fi
if wanted sanitize; then
  if command -v compute-sanitizer >/dev/null; then
    # a device the sanitizer refuses is recorded, not failed; what it finds is
    for tool in memcheck racecheck; do
      stage "$tool" 90 no compute-sanitizer --tool "$tool" --error-exitcode 7 \
        "$PYTHON" tests/cuda/sanitize.py "$tool"
      if grep -qi 'not supported' "$OUT/$tool.log"; then
        echo "$tool: the sanitizer refuses this device" | tee -a "$summary"
      elif grep -qE 'ERROR SUMMARY: [1-9]|RACECHECK SUMMARY: [1-9]' "$OUT/$tool.log"; then
        failed=1
      fi
    done
  else
    echo "sanitize               no compute-sanitizer here" | tee -a "$summary"
  fi
fi
if wanted counters; then
  # metered and allocated bytes, launches, and the kernels this device runs, exact on it too
  stage counters 120 yes "$PYTHON" -m bench.counters --device cuda --json "$OUT/counters.json" \
    --parts memory,launches,nvcc
fi
if wanted local_pass; then
  stage local_pass 150 yes "$PYTHON" bench/gpu_local_pass.py "$OUT/local_pass.json"
fi
if wanted step; then
  stage step 180 yes "$PYTHON" bench/gpu_step.py "$OUT"
fi
if wanted devices; then
  stage devices 240 no "$PYTHON" -m bench.devices --device cuda
  cp bench/results/cuda/devices.json "$OUT/" 2>/dev/null
fi
if wanted states; then
  stage states_sweep 120 no "$PYTHON" -m bench.states sweep --device cuda \
    --json "$OUT/states_sweep.json"
  stage states_curves 300 no "$PYTHON" -m bench.states curves --device cuda \
    --json "$OUT/states_curves.json"
fi
echo "results in $OUT"
if wanted local_pass; then grep 'of copy' "$OUT/local_pass.log"; fi
exit "$failed"
