#!/usr/bin/env bash
# Asks for a TPU slice as a queued resource, waits until it is there, installs this checkout on its hosts and runs.
#   [PROJECT=...] [SPOT=1] VERSION=... launch/tpu_queue.sh NAME ZONE TYPE ARGUMENTS OF icet_jax.main...
# TYPE is an accelerator type (v5litepod-16) and VERSION the runtime that belongs to it (v2-alpha-tpuv5-lite). A request
# of that name is taken up again, so that the same command goes on after a preemption. The slice stays until
#   gcloud compute tpus queued-resources delete NAME --zone=ZONE --force
set -euo pipefail

if (($# < 4)) || [[ -z ${VERSION-} ]]; then
  sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
name=$1 zone=$2 type=$3
shift 3
here=$(cd "$(dirname "$0")" && pwd)
where=(--zone="$zone" ${PROJECT:+--project="$PROJECT"})

state() {
  gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)' 2>/dev/null || true
}

now=$(state)
if [[ $now == SUSPENDED || $now == FAILED ]]; then # preempted: the request is spent
  gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
  now=
fi
if [[ -z $now ]]; then
  gcloud compute tpus queued-resources create "$name" "${where[@]}" --node-id="$name" --accelerator-type="$type" \
    --runtime-version="$VERSION" ${SPOT:+--spot}
fi
until [[ $(state) == ACTIVE ]]; do
  case $(state) in
    FAILED | SUSPENDED | SUSPENDING)
      echo "tpu_queue.sh: $name: $(state); see gcloud compute tpus queued-resources describe $name --zone=$zone" >&2
      exit 1
      ;;
  esac
  sleep "${POLL:-30}"
done

archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git -C "$here/.." archive --format=tar.gz --output="$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$name:icet-jax.tar.gz" "${where[@]}" --worker=all --quiet
directory=$(printf %q "${DIRECTORY:-icet-jax}")
gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --quiet --command="set -e
  mkdir -p $directory && tar -xzf icet-jax.tar.gz -C $directory && cd $directory
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --allow-existing --python 3.12 .venv
  python3 -m uv pip install --quiet --python .venv/bin/python '.[tpu]'"
rm -f "$archive"
exec "$here/tpu_pod.sh" "$name" "$zone" "$@"
