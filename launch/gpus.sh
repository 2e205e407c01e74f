#!/usr/bin/env bash
# One run on all GPUs of this machine, or those in CUDA_VISIBLE_DEVICES; one process drives them all.
#   launch/gpus.sh ARGUMENTS OF icet_jax.main...
# A run that was stopped (exit code 75) is started again, and goes on from where it was.
set -euo pipefail

if (($# < 1)); then
  sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
code=75
while ((code == 75)); do
  code=0
  python3 -m icet_jax.main "$@" || code=$?
done
exit "$code"
