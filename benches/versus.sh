#!/usr/bin/env bash
# byol beside PyTorch on this machine, in turn, round by round; prints the ratios of the medians.
#
#   benches/versus.sh PYTHON [ROW…]
#
# PYTHON: an interpreter with torch, torchvision, lightly and onnxruntime. The programs torch_*.py are looked for in $PEERS (docs/performance.md says what they do; they are not part of this repository).
# ROW: some of cifar18 resnet50 resnet18 narrow features embed views224 views32 pretrain (default: all of them), and, on a processor with AVX512-BF16,
# cifar18-bf16 resnet50-bf16 resnet18-bf16 narrow-bf16, where both multiply bf16.
# Environment: ROUNDS (3), THREADS (2), STEPS (3), EPOCHS (20, of pretrain), PHOTOS and CIFAR (folders of JPEG files for the views; pretrain takes
# CIFAR's folder train/CLASS/*.jpg and test/CLASS/*.jpg), COMPILE (1; 0: leave out torch.compile, which needs a C++ compiler), BYOL (the program to
# measure).
#
# It refuses a busy machine: PyTorch's threads spin at the end of every loop, and lose far more than their share to a neighbour.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
[ $# -ge 1 ] || usage
python=$1
shift
peers=${PEERS:?set PEERS to the folder of torch_step.py and the other programs to compare with}
rounds=${ROUNDS:-3} threads=${THREADS:-2} steps=${STEPS:-3}
byol=${BYOL:-target/release/byol}
[ -x "$(command -v "$python")" ] || { echo "versus: there is no interpreter $python" >&2; exit 2; }
[ -f "$peers/torch_step.py" ] || { echo "versus: no torch_step.py in $peers; set PEERS to its folder" >&2; exit 2; }
[ -n "${BYOL:-}" ] || cargo build --release --quiet

# Share of the processors' time that was not idle in the last two seconds, in percent.
busy() {
    local a b
    a=($(head -n1 /proc/stat)) && sleep 2 && b=($(head -n1 /proc/stat))
    local all=0 i
    for i in 1 2 3 4 5 6 7 8; do all=$((all + ${b[i]} - ${a[i]})); done
    echo $((100 - 100 * (${b[4]} + ${b[5]} - ${a[4]} - ${a[5]}) / (all > 0 ? all : 1)))
}
if [ -r /proc/stat ]; then
    share=$(busy)
    [ "$share" -le 8 ] || { echo "versus: the machine is busy ($share % of it), so the comparison would be unfair; wait until it is idle" >&2; exit 1; }
fi

results=$(mktemp)
trap 'rm -f "$results"' EXIT

# NAME, then two commands whose last line is JSON: ours and theirs, with a key for what counts.
ours() { "$byol" "$@" --json 2>/dev/null | tail -n1; }
theirs() { "$python" "$@" --json 2>/dev/null | tail -n1; }
record() { printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$results"; } # row, who, JSON

whole() { # images, command: the wall clock of all of it
    local images=$1 began ended
    shift
    began=$(date +%s.%N)
    "$@" >/dev/null 2>&1
    ended=$(date +%s.%N)
    "$python" -c "print('{\"images_per_s\": %f}' % ($images / ($ended - $began)))"
}

step() { # row, byol's options, PyTorch's options
    record "$1" byol "$(ours bench --threads "$threads" --steps "$steps" $2)"
    record "$1" torch "$(theirs "$peers/torch_step.py" --threads "$threads" --steps "$steps" --warmup 2 $3)"
    [ "${COMPILE:-1}" = 0 ] || record "$1" torch-compile "$(theirs "$peers/torch_step.py" --threads "$threads" --steps "$steps" --warmup 2 --compile $3)"
}

row() {
    local more=""
    case $1 in *-bf16) more=" --precision bf16" ;; esac
    case $1 in
        cifar18 | cifar18-bf16) step $1 "--batch 128$more" "--batch 128$more" ;;
        resnet50 | resnet50-bf16) step $1 "--encoder resnet50 --size 224 --batch 16$more" "--net resnet50 --size 224 --batch 16$more" ;;
        resnet18 | resnet18-bf16) step $1 "--size 224 --batch 32$more" "--size 224 --batch 32$more" ;;
        narrow | narrow-bf16) step $1 "--width 0.25 --batch 256$more" "--width 0.25 --batch 256$more" ;;
        features)
            step features "--forward-only --encoder resnet50 --size 224 --batch 32" "--forward-only --net resnet50 --size 224 --batch 32"
            record features torch-folded "$(theirs "$peers/torch_step.py" --threads "$threads" --steps "$steps" --warmup 2 --forward-only --fold-bn --net resnet50 --size 224 --batch 32)"
            record features onnxruntime "$(theirs "$peers/torch_embed.py" "$PHOTOS" --net resnet50 --onnx --batch 32 --limit 96 --threads "$threads" --out "$(mktemp -d)/f.npy")"
            ;;
        embed) # files to vectors on disk: ResNet-50 at 224 px, the same weights
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
[ ${#rows[@]} -gt 0 ] || rows=(cifar18 resnet50 resnet18 narrow features embed views224 views32 pretrain)
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
    row, who, text = line.rstrip("\n").split("\t")
    if not text:
        sys.exit(f"versus: {who} gave nothing for {row}")
    r = json.loads(text)
    # Where both are given, features are timed in the network alone, embedding from file to file.
    network = None if row == "embed" else r.get("network_images_per_s")
    speed = r.get("images_per_second") or network or r.get("images_per_s")
    rows.setdefault(row, collections.OrderedDict()).setdefault(who, []).append((speed, r.get("peak_mb") or r.get("peak_rss_mb")))
print("| row | who | images/s, median (least to most) | byol is | memory, MiB | byol's share |")
print("| --- | --- | --- | --- | --- | --- |")
for row, all in rows.items():
    ours, our_mb = (statistics.median(x[0] for x in all["byol"]), all["byol"][0][1])
    for who, runs in all.items():
        speeds = [x[0] for x in runs]
        mid, mb = statistics.median(speeds), runs[0][1]
        ratio = "" if who == "byol" else f"{ours / mid:.2f}x"
        share = f"{our_mb / mb:.2f}" if who != "byol" and mb and our_mb else ""
        print(f"| {row} | {who} | {mid:.4g} ({min(speeds):.4g} to {max(speeds):.4g}) | {ratio} | {f'{mb:.0f}' if mb else ''} | {share} |")
PYTHON
