#!/usr/bin/env bash
# Everything that wants a GPU, in parts of less than ten minutes. Run it again until it says "done":
# finished parts are skipped, stopped trainings go on.
#
#     bash benchmarks/gpu.sh data/cifar10-images     # or cifar10, with a network
set -u
cd "$(dirname "$0")/.."
dataset=${1:-cifar10}
python=${PYTHON:-.venv/bin/python}
out=${OUT:-results/gpu}
mkdir -p "$out"
export BENCHMARK_RESULTS=$out/results.json
stop=$((SECONDS + ${LIMIT:-570}))

# part NAME COMMAND...: once, within what is left of the time; its output goes to NAME.log
part() {
  local name=$1
  shift
  [ -e "$out/$name.done" ] && return
  local left=$((stop - SECONDS))
  if [ "$left" -lt 30 ]; then
    echo "time is up before $name: run this again"
    exit 3
  fi
  echo "== $name"
  timeout --signal=TERM --kill-after=20 "$left" "$@" 2>&1 | tee -a "$out/$name.log"
  local code=${PIPESTATUS[0]}
  if [ "$code" = 0 ]; then touch "$out/$name.done"; else echo "$name ended with $code"; fi
}

# train SCRIPT NAME FLAGS...: from where it stopped
train() {
  local script=$1 name=$2
  shift 2
  if [ -e "results/$script/$name/config.json" ]; then
    part "$script-$name" "$python" "$script.py" --resume "results/$script/$name"
  else
    part "$script-$name" "$python" "$script.py" --name "$name" "$@"
  fi
}

part device nvidia-smi
part tests "$python" -m pytest -q -m "slow or not slow" tests/test_randaugment.py tests/test_simclr_loss.py
part growth "$python" benchmarks/growth.py
# One GPU and the CPU begin alike: compare the losses of these two (bf16 rounding).
for device in cpu cuda; do
  train simclr "gpu-same-$device" --dataset digits --encoder small --epochs 5 \
    --stages pretrain --device $device --precision bfloat16
done
part same "$python" compare.py results/simclr/gpu-same-{cpu,cuda} --figure "$out/same.png"
# The default recipe: published 85.6 % linear, 83.2 % kNN.
train simclr gpu-100 --dataset "$dataset"
train simclr gpu-100-seed1 --dataset "$dataset" --seed 1
train simsiam gpu
train simclr gpu-1000 --dataset "$dataset" --epochs 1000 --knn-every 50 --keep-every 100
echo "done: $(ls "$out"/*.done | wc -l) of 10 parts"
