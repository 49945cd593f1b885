#!/usr/bin/env python3
"""Draws the charts of docs/performance.md, docs/results.md and docs/log/ from docs/log/*.csv.

    benches/charts.py            write docs/images/{performance,hour,study-*}.svg
    benches/charts.py --check    exit with status 1 if one of them is out of date
"""
import csv
import pathlib
import sys

sys.dont_write_bytecode = True
import curve

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOG, IMAGES = ROOT / "docs/log", ROOT / "docs/images"
BLUE, ORANGE, LIGHT_BLUE = "#1f5fbf", "#d2552d", "#86b1ec"

# Label, task of throughput.csv, and baseline: the fastest of these programs on each machine.
SPEEDUPS = [
    ("Training step, ResNet-18 ×0.25, 32 px", "narrow", ("PyTorch", "PyTorch compiled")),
    ("Training step, ResNet-18, 32 px", "cifar18", ("PyTorch", "PyTorch compiled")),
    ("Training step, ResNet-18, 224 px", "resnet18", ("PyTorch",)),
    ("Training step, ResNet-50, 224 px", "resnet50", ("PyTorch",)),
    ("Features, ResNet-50, folded batch norm", "features", ("PyTorch folded",)),
    ("Features, ResNet-50, vs. onnxruntime", "features", ("onnxruntime",)),
    ("Decode + two 224 px views, vs. lightly", "views224", ("lightly",)),
]
MACHINES = [("Zen 2", "AVX2", BLUE), ("Zen 4", "AVX-512", LIGHT_BLUE)]

# Linear accuracy of the randomly initialized encoder, in percent.
RANDOM_INIT = 36.1

# Title of each study of ablations.csv.
STUDIES = {
    "predictor": "Predictor, target network and negatives",
    "target": "Target decay τ",
    "views": "Augmentations removed",
    "beta": "Weight β of the negatives",
    "batch-size": "Images per micro-batch (64 images per step)",
}


def rows(name):
    with open(LOG / name, newline="") as file:
        return list(csv.DictReader(file))


def svg(width, height, body):
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="sans-serif" font-size="13">')
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *body, "</svg>"]) + "\n"


def line(x1, y1, x2, y2, style):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'


def text(x, y, words, style=""):
    return f'<text x="{x:.1f}" y="{y:.1f}"{" " + style if style else ""}>{words}</text>'


def performance():
    """Horizontal bars: byol's median throughput over the baseline's, per task and machine."""
    median = {(r["machine"], r["task"], r["program"]): float(r["median"]) for r in rows("throughput.csv")}
    width, left, right, top, bar, gap = 720, 272, 48, 66, 15, 12
    most = 4.5
    groups = []
    for label, task, baselines in SPEEDUPS:
        bars = []
        for machine, _, color in MACHINES:
            others = [median[key] for b in baselines if (key := (machine, task, b)) in median]
            if others:
                bars.append((median[machine, task, "byol"] / max(others), color))
        groups.append((label, bars))
    height = top + sum(bar * len(bars) + gap for _, bars in groups) + 26
    at = lambda ratio: left + ratio / most * (width - left - right)

    body = [text(left, 24, "byol’s throughput relative to PyTorch (or as noted)", 'font-size="15"')]
    for k, (machine, isa, color) in enumerate(MACHINES):
        x = left + 150 * k
        body.append(f'<rect x="{x}" y="36" width="12" height="12" fill="{color}"/>')
        body.append(text(x + 18, 47, f"{machine}, {isa}"))
    for tick in range(0, int(most) + 1):
        body.append(line(at(tick), top - 6, at(tick), height - 26, 'stroke="#ddd"'))
        body.append(text(at(tick), height - 8, f"{tick}×", 'text-anchor="middle"'))
    y = top
    for label, bars in groups:
        body.append(text(left - 10, y + bar * len(bars) / 2 + 4, label, 'text-anchor="end"'))
        for ratio, color in bars:
            body.append(f'<rect x="{left}" y="{y}" width="{at(ratio) - left:.1f}" '
                        f'height="{bar - 2}" fill="{color}"/>')
            body.append(text(at(ratio) + 6, y + bar - 3.5, f"{ratio:.2f}×", 'font-size="12"'))
            y += bar
        y += gap
    body.append(line(at(1), top - 6, at(1), height - 26, 'stroke="#222" stroke-dasharray="4 3"'))
    return svg(width, height, body)


def hour():
    curves = {}
    for r in rows("hour.csv"):
        curves.setdefault(r["program"], []).append((float(r["minutes"]), float(r["knn"])))
    return curve.draw(curves, "Training time (minutes)", "kNN accuracy (%)") + "\n"


def study(name, title):
    """Linear accuracy with its 95 % interval per setting, a color per method."""
    points = [r for r in rows("ablations.csv") if r["study"] == name]
    settings = list(dict.fromkeys(r["setting"] for r in points))
    methods = list(dict.fromkeys(r["method"] for r in points))
    width, height, left, right, top, bottom, most = 640, 360, 60, 16, 60, 44, 60
    slot = (width - left - right) / len(settings)
    at = lambda percent: height - bottom - percent / most * (height - top - bottom)

    body = [text(left, 24, title, 'font-size="15"')]
    for percent in range(0, most + 1, 10):
        body.append(line(left, at(percent), width - right, at(percent), 'stroke="#ddd"'))
        body.append(text(left - 8, at(percent) + 4, percent, 'text-anchor="end"'))
    body.append(line(left, at(RANDOM_INIT), width - right, at(RANDOM_INIT),
                     'stroke="#777" stroke-dasharray="4 3"'))
    body.append(text(width - right, at(RANDOM_INIT) + 16, f"random initialization: {RANDOM_INIT} %",
                     'text-anchor="end" font-size="11" fill="#555"'))
    middle = (top + height - bottom) / 2
    body.append(text(16, middle, "Linear accuracy (%)",
                     f'text-anchor="middle" transform="rotate(-90 16 {middle:.1f})"'))
    for i, setting in enumerate(settings):
        body.append(text(left + slot * (i + 0.5), height - bottom + 22, setting, 'text-anchor="middle"'))
    for k, (method, color) in enumerate(zip(methods, (BLUE, ORANGE))):
        offset = (k - (len(methods) - 1) / 2) * 20
        for r in (r for r in points if r["method"] == method):
            x = left + slot * (settings.index(r["setting"]) + 0.5) + offset
            value, low, high = (float(r[key]) for key in ("linear", "low", "high"))
            body.append(line(x, at(low), x, at(high), f'stroke="{color}" stroke-width="2"'))
            body.append(line(x - 4, at(low), x + 4, at(low), f'stroke="{color}" stroke-width="1.5"'))
            body.append(line(x - 4, at(high), x + 4, at(high), f'stroke="{color}" stroke-width="1.5"'))
            body.append(f'<circle cx="{x:.1f}" cy="{at(value):.1f}" r="3" fill="{color}"/>')
            body.append(text(x, at(high) - 6, r["linear"], f'text-anchor="middle" font-size="11" fill="{color}"'))
        if len(methods) > 1:
            x = left + 120 * k
            body.append(f'<circle cx="{x + 5}" cy="41" r="4" fill="{color}"/>')
            body.append(text(x + 15, 45, method))
    return svg(width, height, body)


def main():
    charts = {"performance": performance(), "hour": hour()}
    charts.update({f"study-{name}": study(name, title) for name, title in STUDIES.items()})
    stale = []
    for name, content in charts.items():
        path = IMAGES / f"{name}.svg"
        if "--check" in sys.argv[1:]:
            if not path.exists() or path.read_text() != content:
                stale.append(path.relative_to(ROOT))
        else:
            path.write_text(content)
    if stale:
        sys.exit(f"charts: out of date: {', '.join(map(str, stale))}; run benches/charts.py")


if __name__ == "__main__":
    main()
