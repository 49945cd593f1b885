#!/usr/bin/env python3
"""Plants near-duplicates among images and scores how many of them `byol duplicates` finds.

    planted.py plant FOLDER OUT [--images 2000] [--originals 50]
    byol embed ENCODER OUT/images -o OUT/e.npy
    byol duplicates OUT/e.npy --json | planted.py score OUT
    planted.py sheet OUT pairs.png < duplicates.json

`plant` copies a sample of the images and adds altered copies of each original: recompressed as JPEG
of quality 40; downscaled by a third and enlarged again; cropped by 8 % on each side; and with
`--all` also halved, squashed to a square, cropped by 12 % on one side or 10 % at a corner, mirrored,
mirrored and cropped, brighter, darker, gray. A pair is correct if both images come from the same
original. Real near-duplicates among the images count as wrong: check the pairs that `score` prints,
or the picture that `sheet` draws of them.
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
    from PIL import Image, ImageEnhance, ImageOps

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
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        w, h = image.size
        by, bx = round(0.08 * h), round(0.08 * w)
        copies = {
            "recompressed": (image, 40),
            "downscaled": (image.resize((w * 2 // 3, h * 2 // 3), Image.LANCZOS).resize((w, h), Image.BICUBIC), 95),
            "cropped": (image.crop((bx, by, w - bx, h - by)), 95),
        }
        if a.all:
            center, bright = image.crop((bx, by, w - bx, h - by)), ImageEnhance.Brightness(image)
            copies |= {
                "halved": (image.resize((max(1, w // 2), max(1, h // 2)), Image.LANCZOS), 85),
                "squashed": (image.resize((h, h) if w != h else (w * 3 // 4, h), Image.LANCZOS), 90),
                "oneside": (image.crop((round(0.12 * w), 0, w, h)), 90),
                "corner": (image.crop((round(0.1 * w), round(0.1 * h), w, h)), 90),
                "mirrored": (ImageOps.mirror(image), 90),
                "mirroredcropped": (ImageOps.mirror(center), 90),
                "brighter": (bright.enhance(1.3), 90),
                "darker": (bright.enhance(0.6), 90),
                "gray": (image.convert("L"), 90),
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
    found = json.load(sys.stdin)
    groups = [[os.path.basename(p) for p in g] for g in found["groups"]]
    pairs = {frozenset(p) for g in groups for p in itertools.combinations(g, 2)}
    wanted = {frozenset(p) for p in itertools.combinations(truth, 2) if truth[p[0]] == truth[p[1]]}
    right = pairs & wanted
    for kind in sorted({n.rsplit("-", 1)[1].split(".")[0] for n in truth if "-" in n}):
        own = {p for p in wanted if any(f"-{kind}." in n for n in p) and any("-" not in n for n in p)}
        print(f"{kind}: {len(own & pairs)} of {len(own)} originals found")
    print(f"precision {len(right) / max(1, len(pairs)):.3f} of {len(pairs)} pairs, recall {len(right) / len(wanted):.3f} of {len(wanted)}")
    for p in sorted(map(sorted, pairs - wanted))[:20]:
        print("not planted:", *p)


def sheet(a):
    """Draws the pairs that are not planted, evenly sampled, each with its evidence."""
    from PIL import Image, ImageDraw

    truth = json.load(open(os.path.join(a.out, "truth.json"))) if a.out else {}
    own = lambda path: truth.get(os.path.basename(path))
    pairs = [p for p in json.load(sys.stdin)["evidence"] if own(p["first"]) is None or own(p["first"]) != own(p["second"])]
    chosen = pairs[:: max(1, -(-len(pairs) // a.pairs))]
    side, columns = 96, 8
    rows = -(-len(chosen) // columns)
    picture = Image.new("RGB", (columns * (2 * side + 16), max(1, rows) * (side + 20)), "white")
    draw = ImageDraw.Draw(picture)
    for i, pair in enumerate(chosen):
        x, y = i % columns * (2 * side + 16), i // columns * (side + 20)
        for k, path in enumerate((pair["first"], pair["second"])):
            image = Image.open(path).convert("RGB")
            image = image.resize([max(1, n * side // max(image.size)) for n in image.size], Image.BICUBIC)
            picture.paste(image, (x + k * side, y))
        text = pair["evidence"]["text"].replace("correlation ", "") if pair["verified"] else "unverified"
        detail = f" detail {pair['evidence']['detail']:.2f}" if pair["verified"] else ""
        draw.text((x, y + side), text + detail, fill="black")
    picture.save(a.file)
    print(f"{len(chosen)} of {len(pairs)} pairs in {a.file}")


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
sub = parser.add_subparsers(required=True)
p = sub.add_parser("plant")
p.add_argument("folder")
p.add_argument("out")
p.add_argument("--images", type=int, default=2000)
p.add_argument("--originals", type=int, default=50)
p.add_argument("--all", action="store_true", help="all kinds of copies, not only the first three")
p.set_defaults(run=plant)
p = sub.add_parser("score")
p.add_argument("out")
p.set_defaults(run=score)
p = sub.add_parser("sheet")
p.add_argument("out", nargs="?", help="leave out to draw all pairs")
p.add_argument("file")
p.add_argument("--pairs", type=int, default=100)
p.set_defaults(run=sheet)
args = parser.parse_args()
args.run(args)
