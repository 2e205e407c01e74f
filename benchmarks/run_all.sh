#!/usr/bin/env bash
# Every benchmark of docs/performance.md in parts of less than eight minutes each, for a machine that is lent by the
# quarter of an hour. Usage:  benchmarks/run_all.sh --part=N [--out=DIR] [--preset=llava-7b|llava-60m]   (N: 1 to 6)
#
# Needs jax, flax, optax and numpy; torch, transformers and safetensors for the peers of parts 3 to 5.
#   1 decoding and prefill against the machine     2 attention's kernel against XLA's     3 update against PyTorch
#   4 update of a whole batch, by remat policy      5 sweep against transformers           6 growth
set -euo pipefail
cd "$(dirname "$0")/.."
part="" out=runs/benchmarks preset=llava-7b python=${PYTHON:-python}
for argument in "$@"; do
  case "$argument" in
    --part=*) part="${argument#--part=}" ;;
    --out=*) out="${argument#--out=}" ;;
    --preset=*) preset="${argument#--preset=}" ;;
    *) echo "run_all.sh: unknown argument $argument; type benchmarks/run_all.sh --part=1" >&2; exit 2 ;;
  esac
done
case "$preset" in
  llava-7b) batches=1,8,64 prompts=16 exits=6 slots=96 pairs=3 ;;
  llava-60m) batches=1,16,64 prompts=16 exits=24 slots=128 pairs=1 ;;
  *) echo "run_all.sh: unknown preset $preset; use llava-7b or llava-60m" >&2; exit 2 ;;
esac
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
run() { timeout 470 "$python" "$@"; }
case "$part" in
  1) run benchmarks/rollout.py --out "$out/rollout" --preset "$preset" --batches "$batches" ;;
  2) run benchmarks/attention.py --out "$out/attention" ;;
  3) run benchmarks/update_vs_torch.py --out "$out/update" --preset "$preset" --remat dots --pairs 5 ;;
  4) run benchmarks/update_vs_torch.py --out "$out/update_64" --preset "$preset" --peer none --rows 64 \
       --accumulation 8 --remat dots,full --pairs 3 ;;
  5) run benchmarks/sweep_vs_transformers.py --out "$out/sweep" --preset "$preset" --prompts "$prompts" \
       --exits "$exits" --slots "$slots" --pairs "$pairs" ;;
  6) run benchmarks/scaling.py --out "$out/scaling" --preset llava-60m --pairs 3 ;;
  *) echo "run_all.sh: --part=N with N from 1 to 6; type benchmarks/run_all.sh --part=1" >&2; exit 2 ;;
esac
