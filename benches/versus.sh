#!/usr/bin/env bash
# Compares byol with PyTorch on this machine, alternating round by round; prints ratios of medians.
#
#   benches/versus.sh PYTHON [TASK…]
#
# PYTHON: an interpreter with torch, torchvision, lightly and onnxruntime. TASK (default: all but
# pretrain): cifar18, resnet50, resnet18, narrow, features, embed, views224, views32, pretrain.
#
# The first four are training steps. On a CPU that multiplies bf16 (AMX, AVX512-BF16) both programs
# run in f32 and in bf16; speed-ups are of the fastest byol over each program.
#
# Environment:
#   PEERS    folder of the PyTorch programs torch_*.py (see docs/log/README.md)
#   ROUNDS   rounds (2)
#   THREADS  threads (2)
#   STEPS    measured steps per round (3)
#   EPOCHS   epochs of pretrain (20)
#   PHOTOS   folder of JPEG photos, for features, embed, views224
#   CIFAR    folder of 32 px JPEG files; for pretrain with train/CLASS/ and test/CLASS/
#   COMPILE  0 skips torch.compile, which needs a C++ compiler (1)
#   BYOL     program to measure (target/release/byol)
#
# Refuses to run on a busy machine: PyTorch's threads spin at the end of every parallel loop, so
# they lose far more than their share to other processes.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,24s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
[ $# -ge 1 ] || usage
python=$1
shift
peers=${PEERS:?set PEERS to the folder of torch_step.py and the other programs}
rounds=${ROUNDS:-2} threads=${THREADS:-2} steps=${STEPS:-3}
byol=${BYOL:-target/release/byol}
[ -x "$(command -v "$python")" ] || { echo "versus: interpreter $python not found" >&2; exit 2; }
[ -f "$peers/torch_step.py" ] || { echo "versus: torch_step.py not found in $peers; set PEERS to its folder" >&2; exit 2; }
[ -n "${BYOL:-}" ] || cargo build --release --quiet

# CPU utilization over the next two seconds, in percent.
busy() {
    local a b
    a=($(head -n1 /proc/stat)) && sleep 2 && b=($(head -n1 /proc/stat))
    local all=0 i
    for i in 1 2 3 4 5 6 7 8; do all=$((all + ${b[i]} - ${a[i]})); done
    echo $((100 - 100 * (${b[4]} + ${b[5]} - ${a[4]} - ${a[5]}) / (all > 0 ? all : 1)))
}
if [ -r /proc/stat ]; then
    share=$(busy)
    [ "$share" -le 8 ] || { echo "versus: the machine is busy ($share % CPU utilization); wait until it is idle" >&2; exit 1; }
fi

results=$(mktemp)
trap 'rm -f "$results"' EXIT

# Both run a command and print its last line, which is JSON.
ours() { "$byol" "$@" --json 2>/dev/null | tail -n1; }
theirs() { "$python" "$@" --json 2>/dev/null | tail -n1; }
record() { printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$results"; } # task, program, JSON

whole() { # images, command: throughput by wall-clock time
    local images=$1 began ended
    shift
    began=$(date +%s.%N)
    "$@" >/dev/null 2>&1
    ended=$(date +%s.%N)
    "$python" -c "print('{\"images_per_s\": %f}' % ($images / ($ended - $began)))"
}

case $("$byol" devices --json) in
    *'"bf16":true'*) precisions="f32 bf16" ;;
    *) precisions=f32 ;;
esac

step() { # task, precision, byol's options, PyTorch's options
    local mark=""
    [ $2 = f32 ] || mark=-$2
    record "$1" byol$mark "$(ours bench --threads "$threads" --steps "$steps" --precision $2 $3)"
    local torch="$peers/torch_step.py --threads $threads --steps $steps --warmup 2 --precision $2"
    record "$1" torch$mark "$(theirs $torch $4)"
    [ "${COMPILE:-1}" = 0 ] || record "$1" torch-compile$mark "$(theirs $torch --compile $4)"
}

steps() { # task, byol's options, PyTorch's options
    local precision
    for precision in $precisions; do step "$1" $precision "$2" "$3"; done
}

row() {
    case $1 in
        cifar18) steps $1 "--batch 128" "--batch 128" ;;
        resnet50) steps $1 "--encoder resnet50 --size 224 --batch 16" "--net resnet50 --size 224 --batch 16" ;;
        resnet18) steps $1 "--size 224 --batch 32" "--size 224 --batch 32" ;;
        narrow) steps $1 "--width 0.25 --batch 256" "--width 0.25 --batch 256" ;;
        features)
            step features f32 "--forward-only --encoder resnet50 --size 224 --batch 32" "--forward-only --net resnet50 --size 224 --batch 32"
            record features torch-folded "$(theirs "$peers/torch_step.py" --threads "$threads" --steps "$steps" --warmup 2 --forward-only --fold-bn --net resnet50 --size 224 --batch 32)"
            record features onnxruntime "$(theirs "$peers/torch_embed.py" "$PHOTOS" --net resnet50 --onnx --batch 32 --limit 96 --threads "$threads" --out "$(mktemp -d)/f.npy")"
            ;;
        embed) # from files to vectors on disk: ResNet-50 at 224 px with the same weights
            local folder weights
            folder=$(mktemp -d)
            weights=$folder/theirs.safetensors
            "$python" -c "
import sys, torch, torchvision
from safetensors.torch import save_file
torch.manual_seed(0)
save_file(torchvision.models.resnet50().state_dict(), sys.argv[1])" "$weights"
            "$byol" import "$weights" -o "$folder/ours.safetensors" 2>/dev/null
            record embed byol "$(ours embed "$folder/ours.safetensors" "$PHOTOS" -o "$folder/f.npy" --device cpu --threads "$threads")"
            for runtime in torch onnxruntime; do
                record embed $runtime "$(theirs "$peers/torch_embed.py" "$PHOTOS" --net resnet50 --weights "$weights" --batch 32 --threads "$threads" --out "$folder/t.npy" $([ $runtime = torch ] || echo --onnx))"
            done
            rm -r "$folder"
            ;;
        views224)
            record views224 byol "$(ours bench views "$PHOTOS" --size 224)"
            for impl in lightly torchvision; do record views224 $impl "$(theirs "$peers/torch_views.py" "$PHOTOS" --size 224 --impl $impl --repeat 1)"; done
            ;;
        views32)
            record views32 byol "$(ours bench views "$CIFAR" --size 32 --limit 5000)"
            record views32 batched "$(theirs "$peers/torch_views.py" "$CIFAR" --size 32 --impl batched --limit 5000 --repeat 1)"
            ;;
        pretrain)
            local epochs=${EPOCHS:-20} out
            out=$(mktemp -d)
            local same="--limit 10000 --width 0.25 --hidden 1024 --batch 128 --epochs $epochs --warmup-epochs 2 --threads $threads"
            record pretrain byol "$(whole $((10000 * epochs)) "$byol" pretrain "$CIFAR" --out "$out/run" --recipe cifar10 --encoder resnet18 --device cpu $same)"
            record pretrain torch "$(whole $((10000 * epochs)) "$python" "$peers/torch_train.py" --data "$CIFAR" $same)"
            rm -r "$out"
            ;;
        *) usage ;;
    esac
}

rows=("$@")
[ ${#rows[@]} -gt 0 ] || rows=(cifar18 resnet50 resnet18 narrow features embed views224 views32)
for r in "${rows[@]}"; do
    case $r in
        features | embed | views224) : "${PHOTOS:?set PHOTOS to a folder of JPEG photos}" ;;
        views32 | pretrain) : "${CIFAR:?set CIFAR to a folder of 32 px JPEG files}" ;;
    esac
done
for ((i = 1; i <= rounds; i++)); do
    for r in "${rows[@]}"; do
        echo "versus: round $i of $rounds: $r" >&2
        row "$r"
    done
done

"$python" - "$results" <<'PYTHON'
import collections, json, statistics, sys

rows = collections.OrderedDict()
for line in open(sys.argv[1]):
    row, program, text = line.rstrip("\n").split("\t")
    if not text:
        sys.exit(f"versus: {program} printed no result for {row}")
    r = json.loads(text)
    # Features count the network alone; embed counts everything from file to file.
    network = None if row == "embed" else r.get("network_images_per_s")
    speed = r.get("images_per_second") or network or r.get("images_per_s")
    rows.setdefault(row, collections.OrderedDict()).setdefault(program, []).append((speed, r.get("peak_mb") or r.get("peak_rss_mb")))
print("| task | program | images/s, median (min–max) | speed-up | memory, MiB | memory ratio |")
print("| --- | --- | --- | --- | --- | --- |")
for row, all in rows.items():
    median = lambda program: statistics.median(x[0] for x in all[program])
    best = max((program for program in all if program.startswith("byol")), key=median)
    for program, runs in all.items():
        speeds = [x[0] for x in runs]
        mid, mb = median(program), runs[0][1]
        ratio = f"{median(best) / mid:.2f}x" if program != best else ""
        # Memory is compared at the same precision.
        ours = all.get("byol-bf16" if program.endswith("-bf16") else "byol", all[best])[0][1]
        share = f"{ours / mb:.2f}" if not program.startswith("byol") and mb and ours else ""
        print(f"| {row} | {program} | {mid:.4g} ({min(speeds):.4g}–{max(speeds):.4g}) | {ratio} | {f'{mb:.0f}' if mb else ''} | {share} |")
PYTHON
