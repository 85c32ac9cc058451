#!/usr/bin/env bash
# Everything that wants a GPU, in parts of less than ten minutes. Run it again until it says "done":
# finished parts are skipped, stopped trainings go on. It exits with 0 only when all is done.
#
#     bash benchmarks/gpu.sh data/cifar10-images          # or a tar.gz of that folder, or cifar10
#     OUT=somewhere LIMIT=570 bash benchmarks/gpu.sh ...  # where the archives go, seconds of a call
#     ONLY="pilots simclr-gpu-100-seed1" bash benchmarks/gpu.sh ...  # these parts, all that "done" speaks of
#     DEVICE=cpu TINY=1 bash benchmarks/gpu.sh digits     # try it without a GPU, in minutes
#
# It needs a python3 with the packages of requirements.txt but optuna, umap-learn, plotly and
# pytorch-optimizer, and takes the one in .venv if there is one.
set -u
cd "$(dirname "$0")/.."
dataset=${1:-cifar10}
device=${DEVICE:-cuda}
tiny=${TINY:+--tiny}
work=results/gpu # markers and logs stay here between two calls
out=${OUT:-$work/archives}
stop=$((SECONDS + ${LIMIT:-570}))
python=${PYTHON:-python3}
[ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ] && python=.venv/bin/python
mkdir -p "$work" "$out"
failed=0

if [ -f "$dataset" ]; then # an archive of the folder
  mkdir -p data
  folder=data/$(tar -tf "$dataset" | head -n 1 | cut -d/ -f1)
  [ -d "$folder" ] || tar -xf "$dataset" -C data
  dataset=$folder
fi

# What goes home: logs, tables, records and pictures, but no weights, in archives of under 15 MB, made
# anew every minute in case this is killed. The scores are printed, too.
pack() {
  rm -rf "$work/packing" && mkdir "$work/packing"
  find results docs/results/pilots -type f \( -name '*.log' -o -name '*.csv' -o -name '*.json' -o -name '*.png' \) |
    sort | tar -czf - -T - 2>/dev/null | split -b 14M - "$work/packing/gpu.tar.gz."
  mv -f "$work/packing"/gpu.tar.gz.* "$out/"
}
finish() {
  kill "$packer"
  wait "$packer" 2>/dev/null
  pack
  grep -sHE '"(linear_probe|knn)_accuracy"|seconds"' results/*/gpu-*/summary.json
}
(while sleep 60; do pack; done) >/dev/null 2>&1 &
packer=$!
trap finish EXIT

# part NAME COMMAND...: once, within what is left of the time; its output goes to NAME.log
part() {
  local name=$1
  shift
  [ -e "$work/$name.done" ] && return
  [ -n "${ONLY:-}" ] && [[ " $ONLY data " != *" $name "* ]] && return
  local left=$((stop - SECONDS))
  if [ "$left" -lt 30 ]; then
    echo "time is up before $name: run this again"
    exit 3
  fi
  echo "== $name"
  timeout --signal=TERM --kill-after=20 "$left" "$@" 2>&1 | tee -a "$work/$name.log"
  local code=${PIPESTATUS[0]}
  if [ "$code" = 0 ]; then touch "$work/$name.done"; else
    echo "$name ended with $code"
    failed=1
  fi
}

# train SCRIPT NAME FLAGS...: from where it stopped
train() {
  local script=$1 name=$2
  shift 2
  if [ -e "results/$script/$name/config.json" ]; then
    part "$script-$name" "$python" "$script.py" --resume "results/$script/$name"
  else
    part "$script-$name" "$python" "$script.py" --name "$name" --device "$device" "$@"
  fi
}

recipe=(--dataset "$dataset") long=500
if [ -n "$tiny" ]; then
  recipe+=(--encoder small --epochs 2 --batch-size 64 --probe-epochs 2) long=3
fi

part data "$python" -c 'import sys, functions; print(functions.load_images(sys.argv[1]))' "$dataset"
[ "$failed" = 0 ] || exit 1 # without the images nothing will do
[ "$device" = cuda ] && part device nvidia-smi
part facts "$python" benchmarks/gpu.py --device "$device" facts
if "$python" -c 'import pytest' 2>/dev/null; then
  part tests "$python" -m pytest -q tests/test_randaugment.py -k gpu
fi
part agree "$python" benchmarks/gpu.py --device "$device" $tiny agree
part profile "$python" benchmarks/gpu.py --device "$device" $tiny profile
part epochs "$python" benchmarks/gpu.py --device "$device" epochs simclr "${recipe[@]}"
# The default recipe: published 85.6 % linear and 83.2 % kNN after 100 epochs, 90.3 % kNN after 500.
for seed in 0 1 2; do
  train simclr "gpu-100-seed$seed" "${recipe[@]}" --seed "$seed"
done
# Small networks leave most of a GPU to others: tables of pilots side by side, up to sixteen runs of
# each. Rows that have a score cost nothing. The committed scores are of the JPEG copy.
rm -f "$work/pilots.done"
if [ -z "$tiny" ] && [ "$(basename "$dataset")" = cifar10-images ]; then
  part pilots xargs -P 3 -I{} env OMP_NUM_THREADS=2 "$python" benchmarks/pilots.py \
    docs/results/pilots/{}.csv --jobs 16 --dataset "$dataset" <<<$'rows\nsimclr\ncifar-methods'
fi
part simsiam-epochs "$python" benchmarks/gpu.py --device "$device" epochs simsiam "${recipe[@]}"
train simsiam gpu-simsiam "${recipe[@]}" --stages pretrain,probe
train simclr "gpu-$long" "${recipe[@]}" --epochs "$long" --knn-every 50
[ "$failed" = 0 ] && echo "done; logs, tables and pictures are in $out"
exit "$failed"
