#!/usr/bin/env bash
# Everything that needs a CUDA device, in one call of under nine minutes, the most informative first:
# build, smoke, GPU tests beside compute-sanitizer, local_pass, whole steps, memory, counters.
#
#   OUT=DIR PYTHON=PY bash bench/gpu.sh             default: build/gpu-run; .venv, else python3
#   OUT=DIR PYTHON=PY bash bench/gpu.sh --rehearse  the same stages without a GPU, tiny shapes
#   STAGES="build smoke test" picks; only where named: tf32 free counters devices states
#   DEADLINE=470 seconds for everything: a stage that has no time left is skipped by name
#
# Leaves summary.txt build.log smoke.jsonl tests.log sanitize.log local_pass.jsonl step.jsonl ncu.csv
# in OUT, each line as it is measured; `python -m bench.gpu.keep OUT` makes them results with a page.
# counters also writes bench/baselines/<gpu>.json, the gate's baseline for this device.
# Needs torch, cmake and a compiler, no pip, no network; leaves the card's settings alone.
# Exit status: 0; 1 if the build or a test failed, a row failed its check or the sanitizer found
# something; 2 without a device; 3 if nothing failed but not everything had time.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/python ] && venv=.venv/bin/python
exec "${PYTHON:-${venv:-python3}}" -m bench.gpu "$@"
