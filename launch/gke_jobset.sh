#!/usr/bin/env bash
# Prints the JobSet of one run on a TPU node pool of GKE (gke_jobset.yaml, filled in), for kubectl:
#   NAME=... IMAGE=... CLAIM=... ACCELERATOR=... TOPOLOGY=... HOSTS=... CHIPS=... launch/gke_jobset.sh ARGUMENTS... | kubectl apply -f -
# ACCELERATOR and TOPOLOGY are the node pool's (tpu-v5-lite-podslice and 4x4), HOSTS its machines (4) and CHIPS those of
# one machine (4); IMAGE has this package with the `tpu` extra; CLAIM is a volume claim that all pods may write to, and
# is mounted at /runs: give --workdir=/runs/NAME among the ARGUMENTS of icet_jax.main.
set -euo pipefail

usage() {
  sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

(($# > 0)) || usage
# shellcheck disable=SC2034  # read by its name below
printf -v ARGUMENTS '%q ' "$@"
template=$(cat "$(dirname "$0")/gke_jobset.yaml")
for field in NAME IMAGE CLAIM ACCELERATOR TOPOLOGY HOSTS CHIPS ARGUMENTS; do
  value=${!field-}
  if [[ -z $value ]]; then
    echo "gke_jobset.sh: $field is not set" >&2
    usage
  fi
  value=${value//\\/\\\\} # for YAML's double quotes
  value=${value//\"/\\\"}
  template=${template//"@$field@"/"$value"}
done
printf '%s\n' "$template"
