"""The plot of tools/bench: how each reference stands beside the library, on a logarithmic scale.

    plot.py FILE.json > FILE.svg
"""
import html
import json
import math
import sys

COLOURS = {"raw": "#7f7f7f", "bare": "#ff7f0e", "service": "#9467bd", "go": "#1f77b4"}
LABELS = {"raw": "raw sockets", "bare": "bare cpp-httplib", "service": "etcd's lock service",
          "go": "Go clientv3"}
LEFT, WIDTH, LINE, TOP = 330, 420, 18, 76
LEAST, MOST = 1 / 8, 128  # of what the scale shows


def x_of(factor):
    part = math.log(factor / LEAST) / math.log(MOST / LEAST)
    return LEFT + WIDTH * min(1, max(0, part))


def text(x, y, what, more=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{html.escape(what)}</text>'


def factors(line):
    """How many times as good as each reference the library is."""
    ours = line["median"].get("ours")
    for name in COLOURS:
        other = line["median"].get(name)
        if ours and other:
            yield name, ours / other if line["more_is_better"] else other / ours


def scale(bottom):
    factor = LEAST
    while factor <= MOST:
        x, wide = x_of(factor), 1.5 if factor == 1 else 0.3
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{bottom}" stroke="#888" ' \
              f'stroke-width="{wide}"/>'
        label = f"{factor:g}×" if factor >= 1 else f"1/{1 / factor:g}"
        yield text(x, TOP - 12, label, 'text-anchor="middle" font-size="10"')
        factor *= 2


def draw(facts, lines):
    shown = [line for line in lines
             if any(factors(line)) and line["figure"] not in ("threads", "handshakes")]
    bottom = TOP + LINE * len(shown)
    parts = [text(10, 20, "How many times as good as ... the library is (right: better)",
                  'font-size="14" font-weight="bold"'),
             text(10, 38, ", ".join(f"{n} {facts[n]}" for n in ("date", "etcd", "cpp-httplib",
                                                                 "cores")), 'font-size="10"')]
    for i, (name, label) in enumerate(LABELS.items()):
        parts.append(f'<circle cx="{LEFT + 130 * i - 130}" cy="48" r="4" fill="{COLOURS[name]}"/>')
        parts.append(text(LEFT + 130 * i - 122, 52, label, 'font-size="11"'))
    parts += scale(bottom)
    for i, line in enumerate(shown):
        y = TOP + LINE * (i + 0.5)
        parts.append(text(LEFT - 10, y + 4, line["text"], 'text-anchor="end" font-size="11"'))
        for name, factor in factors(line):
            parts.append(f'<circle cx="{x_of(factor):.1f}" cy="{y:.1f}" r="4" '
                         f'fill="{COLOURS[name]}"><title>{LABELS[name]}: {factor:.2f}</title>'
                         '</circle>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 30}" '
            f'height="{bottom + 12}" font-family="sans-serif">\n'
            '<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n")


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as source:
        data = json.load(source)
    print(draw(data["facts"], data["rows"]), end="")
