#!/usr/bin/env python3
"""Plants near-duplicates among images and scores how many of them `byol duplicates` finds.

    planted.py plant FOLDER OUT [--images 2000] [--originals 50]
    byol embed ENCODER OUT/images -o OUT/e.npy
    byol duplicates OUT/e.npy --threshold 0.5 --json | planted.py score OUT

`plant` copies a sample of the images and adds three altered copies of each original: recompressed
as JPEG of quality 40; downscaled by a third and enlarged again; cropped by 8 % on each side. A pair
is correct if both images come from the same original. Real near-duplicates among the images count
as wrong: check the pairs that `score` prints.
"""
import argparse
import itertools
import json
import os
import random
import shutil
import sys

ENDINGS = (".jpg", ".jpeg", ".png")


def plant(a):
    from PIL import Image

    paths = sorted(os.path.join(d, f) for d, _, files in os.walk(a.folder) for f in files if f.lower().endswith(ENDINGS))
    rng = random.Random(0)
    chosen = rng.sample(paths, min(a.images, len(paths)))
    images = os.path.join(a.out, "images")
    os.makedirs(images)
    truth = {}
    for i, path in enumerate(chosen):
        name = f"{i:05d}{os.path.splitext(path)[1]}"
        shutil.copyfile(path, os.path.join(images, name))
        if i >= a.originals:
            continue
        image = Image.open(path).convert("RGB")
        w, h = image.size
        by, bx = round(0.08 * h), round(0.08 * w)
        copies = {
            "recompressed": (image, 40),
            "downscaled": (image.resize((w * 2 // 3, h * 2 // 3), Image.LANCZOS).resize((w, h), Image.BICUBIC), 95),
            "cropped": (image.crop((bx, by, w - bx, h - by)), 95),
        }
        truth[name] = name
        for kind, (copy, quality) in copies.items():
            file = f"{i:05d}-{kind}.jpg"
            copy.save(os.path.join(images, file), quality=quality)
            truth[file] = name
    json.dump(truth, open(os.path.join(a.out, "truth.json"), "w"))
    originals = min(a.originals, len(chosen))
    print(f"copied {len(chosen)} images and planted {len(truth) - originals} copies of {originals} in {images}")


def score(a):
    truth = json.load(open(os.path.join(a.out, "truth.json")))
    groups = [[os.path.basename(p) for p in g] for g in json.load(sys.stdin)["groups"]]
    pairs = {frozenset(p) for g in groups for p in itertools.combinations(g, 2)}
    wanted = {frozenset(p) for p in itertools.combinations(truth, 2) if truth[p[0]] == truth[p[1]]}
    right = pairs & wanted
    for kind in ("recompressed", "downscaled", "cropped"):
        own = {p for p in wanted if any(f"-{kind}" in n for n in p) and any("-" not in n for n in p)}
        print(f"{kind}: {len(own & pairs)} of {len(own)} originals found")
    print(f"precision {len(right) / max(1, len(pairs)):.3f} of {len(pairs)} pairs, recall {len(right) / len(wanted):.3f} of {len(wanted)}")
    for p in sorted(map(sorted, pairs - wanted))[:20]:
        print("not planted:", *p)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
sub = parser.add_subparsers(required=True)
p = sub.add_parser("plant")
p.add_argument("folder")
p.add_argument("out")
p.add_argument("--images", type=int, default=2000)
p.add_argument("--originals", type=int, default=50)
p.set_defaults(run=plant)
p = sub.add_parser("score")
p.add_argument("out")
p.set_defaults(run=score)
args = parser.parse_args()
args.run(args)
