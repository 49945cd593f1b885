#!/usr/bin/env bash
# kNN accuracy over an hour of training on CIFAR-10: byol with the recipe `auto`, then PyTorch.
#
#   benches/hour.sh PYTHON [byol] [torch] [plot]
#
# PYTHON: an interpreter with torch. Parts (default: all): `byol` and `torch` train and evaluate,
# `plot` draws the available results.
#
# Environment:
#   CIFAR    folder with train/CLASS/*.jpg and test/CLASS/*.jpg
#   OUT      folder for runs and results (hour)
#   EVERY    epochs between evaluations (3)
#   TORCH    options of torch_train.py
#   PEERS    folder of torch_train.py
#   BYOL     program to measure (target/release/byol)
#
# Time is the number of epochs times the lower quartile of the epoch times, which excludes periods
# of other load. byol's epochs include everything (loading, monitoring, checkpoints), PyTorch's only
# the steps. An existing byol run is resumed. kNN for both: 10,000 test images against 50,000,
# k = 20, T = 0.07.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,20s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
[ $# -ge 1 ] || usage
python=$1
shift
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(byol torch plot)
: "${CIFAR:?set CIFAR to a folder with train/CLASS/*.jpg and test/CLASS/*.jpg}"
out=${OUT:-hour} every=${EVERY:-3} byol=${BYOL:-target/release/byol}
torch=${TORCH:---width 0.25 --hidden 1024 --batch 128 --epochs 28 --warmup-epochs 3 --threads 2 --precision bf16 --compile}
mkdir -p "$out"

train_byol() {
    if [ -f "$out/byol/plan.toml" ]; then
        "$byol" resume "$out/byol" --threads 2 >>"$out/byol.log" 2>&1 &
    else
        "$byol" pretrain "$CIFAR" --out "$out/byol" --device cpu --threads 2 >"$out/byol.log" 2>&1 &
    fi
    local pid=$! seen=-1 epoch
    # An epoch's encoder is written after its line in metrics.jsonl and kept until the next epoch's.
    while :; do
        epoch=$(grep -c '"kind":"epoch"' "$out/byol/metrics.jsonl" 2>/dev/null || true)
        epoch=$((${epoch:-0} - 1))
        if [ "$epoch" -gt "$seen" ]; then
            seen=$epoch
            sleep 3
            [ $((epoch % every)) -ne 0 ] || cp "$out/byol/encoder.safetensors" "$out/byol-$epoch.safetensors" 2>/dev/null || true
        fi
        kill -0 $pid 2>/dev/null || break
        sleep 2
    done
    wait $pid
    cp "$out/byol/encoder.safetensors" "$out/byol-$seen.safetensors"
    : >"$out/byol.csv"
    for file in $(ls "$out"/byol-*.safetensors | sort -V); do
        epoch=${file##*-}
        epoch=${epoch%.safetensors}
        "$byol" eval knn "$file" "$CIFAR" --device cpu --json 2>/dev/null | "$python" -c "
import json, statistics, sys
lines = [json.loads(l) for l in open('$out/byol/metrics.jsonl')]
elapsed = [l['elapsed_s'] for l in lines if l['kind'] == 'epoch']
times = [b - a for a, b in zip(elapsed, elapsed[1:]) if b > a]  # elapsed_s restarts when a run is resumed
seconds = $epoch * statistics.quantiles(times, n=4)[0]
print(f\"byol,{seconds / 60:.2f},{100 * json.load(sys.stdin)['rows'][0]['value']:.2f}\")" >>"$out/byol.csv"
    done
}

train_torch() {
    "$python" "${PEERS:?set PEERS to the folder of torch_train.py}/torch_train.py" --data "$CIFAR" --eval-every "$every" $torch --json "$out/torch.json" >"$out/torch.log" 2>&1
    "$python" - "$out" <<'PYTHON'
import json, statistics, sys

out = sys.argv[1]
r = json.load(open(f"{out}/torch.json"))
images = r["steps"] * r["args"]["batch"] / len(r["history"])
seconds = statistics.quantiles([images / epoch["images_per_s"] for epoch in r["history"]], n=4)[0]
with open(f"{out}/torch.csv", "w") as f:
    for point in r["knn"]:
        print(f"PyTorch,{point['epoch'] * seconds / 60:.2f},{point['knn']:.2f}", file=f)
PYTHON
}

plot() {
    cat "$out"/byol.csv "$out"/torch.csv 2>/dev/null | "$python" benches/curve.py "Training time (minutes)" "kNN accuracy (%)" >"$out/hour.svg"
    echo "$out/hour.svg"
}

for part in "${parts[@]}"; do
    case $part in
        byol) train_byol ;;
        torch) train_torch ;;
        plot) plot ;;
        *) usage ;;
    esac
done
