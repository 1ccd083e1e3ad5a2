#!/usr/bin/env bash
# Train the VGG and the modern ResNet at the published size, both at once on one GPU, and pack them.
#
#   DATA=data OUT=gpu bash benchmarks/gpu.sh
#
# A trial of two epochs comes first: from its second one follows how many epochs, at most EPOCHS, end within SECONDS_IN_ALL of
# the start. OUT gets, of each network, NAME.safetensors (one bit a weight) and NAME-history.csv, and log.csv: device,
# seconds, epochs, images a second, accuracies. Settings are the environment's, here with their defaults; a dry run:
#
#   DATA=small OUT=dry DEVICE=cpu WIDTH=0.02 EPOCHS=3 BATCH=64 FORM="--precision float32" bash benchmarks/gpu.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${DATA:=data}" "${OUT:=gpu}" "${DEVICE:=cuda}" "${WIDTH:=1}" "${EPOCHS:=100}" "${SECONDS_IN_ALL:=480}" "${BATCH:=256}"
: "${FORM:=--precision bfloat16 --compile}" "${PYTHON:=python3}" "${RATES:=vgg_cifar10_binary:5e-3 resnet_bireal:3e-3}"
export TQDM_DISABLE=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$OUT"

train() { # epochs, prefix: every network of RATES at once; their output, prefixed by their names
  local pids=() pair
  for pair in $RATES; do
    $PYTHON -m bnn_utils train --model "${pair%:*}" --lr "${pair#*:}" --dataset cifar10 --data-path "$DATA" \
      --device "$DEVICE" --width "$WIDTH" --epochs "$1" --batch-size "$BATCH" $FORM \
      --results-dir "$work" --save "$2-${pair%:*}" 2>&1 | sed "s/^/${pair%:*}: /" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid"; done
}

train 2 trial
epochs=$($PYTHON - "$work" "$EPOCHS" "$((SECONDS_IN_ALL - 2 * SECONDS))" <<'PY'
import csv, glob, sys
folder, most, left = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])  # loading and compiling take as long once more
slowest = max(float(list(csv.DictReader(open(f)))[-1]["seconds"]) for f in glob.glob(f"{folder}/trial-*/history.csv"))
print(max(1, min(most, int(0.95 * left / slowest))))
PY
)
echo "training for $epochs epochs, $SECONDS seconds after the start"
train "$epochs" run

for pair in $RATES; do
  name=${pair%:*}
  cp "$work/run-$name/history.csv" "$OUT/$name-history.csv"
  $PYTHON -m bnn_utils pack -e "$work/run-$name/best.safetensors" -o "$OUT/$name.safetensors"
done
$PYTHON - "$OUT" <<'PY'
import sys
from pathlib import Path
import pandas as pd, torch
from bnn_utils import checkpoints
rows = []
for file in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    facts, history = checkpoints.load(file)[1], pd.read_csv(file.with_name(f"{file.stem}-history.csv"))
    device = torch.cuda.get_device_name() if facts["device"].startswith("cuda") else facts["device"]
    rows.append(dict(network=file.stem, device=device, width=facts["config"]["width"], epochs=len(history)))
    rows[-1] |= dict(seconds=round(history["seconds"].sum()), seconds_an_epoch=history["seconds"].median())
    rows[-1] |= {name: facts[name] for name in ("validation_accuracy", "test_accuracy")}
pd.DataFrame(rows).to_csv(Path(sys.argv[1]) / "log.csv", index=False)
print(pd.DataFrame(rows).to_string(index=False))
PY
