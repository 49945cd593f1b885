#!/usr/bin/env python3
"""Draws `name,x,y` lines from standard input as an SVG line chart on standard output.

    curve.py "x-axis label" "y-axis label" <points.csv >curve.svg
"""
import math
import sys

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 400, 56, 16, 16, 48
COLORS = ["#1f5fbf", "#d2552d", "#3a8f4d", "#8a5bb5"]


def ticks(low, high):
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 8)
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step) + 1)]


def draw(curves, x_label, y_label):
    """Returns the SVG of `curves`, a dictionary from name to a list of (x, y)."""
    xs = [x for curve in curves.values() for x, _ in curve]
    ys = [y for curve in curves.values() for _, y in curve]
    x0, x1, y0, y1 = 0, max(xs), math.floor(min(ys) / 5) * 5, math.ceil(max(ys) / 5) * 5

    def position(x, y):
        return (LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT),
                HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM))

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
           f'width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="13">',
           '<rect width="100%" height="100%" fill="white"/>']
    for y in ticks(y0, y1):
        (left, h), (right, _) = position(x0, y), position(x1, y)
        out.append(f'<line x1="{left:.1f}" y1="{h:.1f}" x2="{right:.1f}" y2="{h:.1f}" stroke="#ddd"/>')
        out.append(f'<text x="{left - 8:.1f}" y="{h + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in ticks(x0, x1):
        w, h = position(x, y0)
        out.append(f'<line x1="{w:.1f}" y1="{h:.1f}" x2="{w:.1f}" y2="{h + 5:.1f}" stroke="#555"/>')
        out.append(f'<text x="{w:.1f}" y="{h + 19:.1f}" text-anchor="middle">{x:g}</text>')
    for curve, color in zip(curves.values(), COLORS):
        points = [position(*p) for p in sorted(curve)]
        out.append(f'<polyline fill="none" stroke="{color}" stroke-width="2" points="'
                   + " ".join(f"{x:.1f},{y:.1f}" for x, y in points) + '"/>')
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in points]
    for i, (name, color) in enumerate(zip(curves, COLORS)):
        y = HEIGHT - BOTTOM - 16 - 20 * (len(curves) - 1 - i)
        out.append(f'<line x1="{WIDTH - 150}" y1="{y}" x2="{WIDTH - 126}" y2="{y}" '
                   f'stroke="{color}" stroke-width="3"/>')
        out.append(f'<text x="{WIDTH - 118}" y="{y + 4}">{name}</text>')
    (left, bottom), (right, _) = position(x0, y0), position(x1, y0)
    out.append(f'<line x1="{left}" y1="{bottom}" x2="{right}" y2="{bottom}" stroke="#555"/>')
    out.append(f'<text x="{(left + right) / 2:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{x_label}</text>')
    middle = (TOP + bottom) / 2
    out.append(f'<text x="14" y="{middle:.1f}" text-anchor="middle" '
               f'transform="rotate(-90 14 {middle:.1f})">{y_label}</text>')
    out.append("</svg>")
    return "\n".join(out)


def main():
    x_label, y_label = sys.argv[1:3]
    curves = {}
    for line in sys.stdin:
        name, x, y = line.strip().split(",")
        curves.setdefault(name, []).append((float(x), float(y)))
    print(draw(curves, x_label, y_label))


if __name__ == "__main__":
    main()
