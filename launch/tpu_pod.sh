#!/usr/bin/env bash
# One run on all hosts of a TPU VM or pod slice that is there.
#   [PROJECT=...] [DIRECTORY=icet-jax] [PYTHON=.venv/bin/python] launch/tpu_pod.sh TPU ZONE ARGUMENTS OF icet_jax.main...
# DIRECTORY is the checkout on every host and PYTHON what has the package there (tpu_queue.sh makes both); --workdir must
# be on a disk that all hosts share. Every host asks the slice's metadata for the others.
set -euo pipefail

if (($# < 3)); then
  sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
tpu=$1 zone=$2
shift 2

# Quoted once for the remote shell, so that an argument may hold spaces.
printf -v arguments ' %q' --coordinator=auto "$@"
exec gcloud compute tpus tpu-vm ssh "$tpu" --zone="$zone" ${PROJECT:+--project="$PROJECT"} --worker=all \
  --command="cd $(printf %q "${DIRECTORY:-icet-jax}") && exec ${PYTHON:-.venv/bin/python} -m icet_jax.main$arguments"
