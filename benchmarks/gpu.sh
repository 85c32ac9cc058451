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

# train NAME FLAGS...: simclr.py, from where it stopped
train() {
  local name=$1
  shift
  if [ -e "results/simclr/$name/config.json" ]; then
    part "$name" "$python" simclr.py --resume "results/simclr/$name"
  else
    part "$name" "$python" simclr.py --dataset "$dataset" --name "$name" "$@"
  fi
}

part device nvidia-smi
part tests "$python" -m pytest -q -m "slow or not slow" tests/test_randaugment.py tests/test_simclr_loss.py
part growth "$python" benchmarks/growth.py
# One GPU and the CPU begin alike: compare the losses of these two (bf16 rounding).
for device in cpu cuda; do
  part "same-$device" "$python" simclr.py --dataset digits --encoder small --epochs 5 \
    --stages pretrain --device $device --precision bfloat16 --name "same-$device"
done
part same "$python" compare.py results/simclr/same-cpu results/simclr/same-cuda --figure "$out/same.png"
# The default recipe: published 85.6 % linear, 83.2 % kNN.
train gpu-100 --seed 0
train gpu-100-seed1 --seed 1
part simsiam "$python" simsiam.py --name gpu
train gpu-1000 --epochs 1000 --knn-every 50 --keep-every 100
ls "$out"/*.done | wc -l | xargs echo "done:"
