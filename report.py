"""How is it shown? Markdown and one HTML page that needs nothing else, from blocks, tables and
plots. It is handed numbers and computes none."""

import html
import math
import re

import numpy as np

from space import flags


def short(x):
    return f"{x:.4g}" if isinstance(x, float) else str(x)


def p(*parts):
    return "p", " ".join(parts)


def markdown(blocks):
    text = ""
    for kind, *body in blocks:
        if kind == "table":
            lines = [body[0], ["---"] * len(body[0]), *body[1]]
            text += "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines) + "\n"
        elif kind == "code":
            text += f"```{body[0]}\n{body[1]}\n```\n\n"
        elif kind != "figure":
            text += f"{kind} {body[0]}\n\n".removeprefix("p ")
    return text


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>%s</title><style>
:root { color-scheme: light dark; --fg: #1d2126; --bg: #fff; --muted: #68707a; --accent: #0a62c4;
 --grid: #e1e5ea }
@media (prefers-color-scheme: dark) {
 :root { --fg: #e4e7ea; --bg: #14171a; --muted: #98a1ab; --accent: #62a8ff; --grid: #30363d } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--fg); background: var(--bg);
 max-width: 960px; margin: 0 auto; padding: 16px }
h1 { font-size: 1.6em } h2 { font-size: 1.2em; margin-top: 2em }
h2, th, td { border-bottom: 1px solid var(--grid) } table { border-collapse: collapse }
.scroll { overflow-x: auto } table { font-variant-numeric: tabular-nums }
th, td { padding: 3px 12px 3px 0; text-align: right; white-space: nowrap }
th { color: var(--muted); white-space: normal; vertical-align: bottom }
th:first-child, td:first-child { text-align: left; white-space: normal }
pre { background: var(--grid); padding: 10px; overflow-x: auto; border-radius: 4px }
figure { margin: 1em 0 } figcaption { color: var(--muted); font-size: 13px }
svg { display: block; width: 100%%; height: auto; font: 12px system-ui, sans-serif }
.narrow { max-width: 560px }
@media (max-width: 600px) { .wide { font-size: 17px } .narrow { font-size: 15px }
 table { font-size: 13px } td:first-child { min-width: 6em } }
text { fill: var(--muted) }
path { fill: none; stroke: var(--muted); stroke-width: 1.2; stroke-linejoin: round }
.axis { stroke: var(--grid) } .best { stroke: var(--accent); stroke-width: 2.2 }
.band { fill: var(--accent); opacity: .15; stroke: none }
.bar { fill: var(--accent); stroke: none }
.stopped { stroke-dasharray: 4 3 } circle { fill: var(--accent); stroke: var(--bg) }
circle.stopped { fill: var(--bg); stroke: var(--fg); stroke-dasharray: none }
</style>
%s</html>
"""


class Plot:
    """An SVG with axes: ranges (low, high) of x and y in data units; parts in drawing order."""

    def __init__(self, xs, ys, width=920, height=300):
        self.xs, self.ys, self.width, self.height, self.parts = xs, ys, width, height, []

    def at(self, x, y):
        """Data units -> pixels; what lies outside is drawn at the edge."""
        pairs = ((x, *self.xs), (y, *self.ys))
        x, y = (min(max((v - low) / (high - low or 1), 0), 1) for v, low, high in pairs)
        y = self.height - 40 - y * (self.height - 56)
        return f"{56 + x * (self.width - 76):.1f}", f"{y:.1f}"

    def line(self, points, kind, tip=""):
        path = "L".join(" ".join(self.at(*point)) for point in points)
        tip = html.escape(tip)
        self.parts.append(f'<path class="{kind}" d="M{path}"><title>{tip}</title></path>')

    def dot(self, x, y, trial):
        """A trial's mark; its numbers, unrounded, are in the attributes and rounded in the tip."""
        (left, top), value = self.at(x, y), trial.history[-1]
        data = f'data-trial="{trial.number}" data-state="{trial.state}" data-value="{value!r}"'
        tip = f"trial {trial.number}, {trial.state}, {value:.4f}, {' '.join(flags(trial.params))}"
        mark = f'<circle class="{trial.state}" cx="{left}" cy="{top}" r="4.5" {data}>'
        self.parts.append(f"{mark}<title>{html.escape(tip)}</title></circle>")

    def text(self, x, y, text, anchor="middle", dx=0, dy=0):
        left, top = (float(v) + d for v, d in zip(self.at(x, y), (dx, dy)))
        where = f'x="{left:.1f}" y="{top:.1f}" text-anchor="{anchor}"'
        self.parts.append(f"<text {where}>{html.escape(str(text))}</text>")

    def axes(self, xticks, xlabel, points):
        """Grid, tick labels (y in points) and the name of x."""
        (left, right), (low, high) = self.xs, self.ys
        step = 10 ** math.floor(math.log10(max(high - low, 1e-12)))
        step *= next(m for m in (0.2, 0.5, 1, 2) if (high - low) / (m * step) <= 6)
        for k in range(math.ceil(low / step), math.floor(high / step) + 1):
            self.line([(left, k * step), (right, k * step)], "axis")
            self.text(left, k * step, f"{k * step * points:.6g}", "end", -6, 4)
        for x, label in xticks:
            self.text(x, low, label, dy=16)
        self.text((left + right) / 2, low, xlabel, dy=34)

    def svg(self, label, size="wide"):
        head = f'class="{size}" viewBox="0 0 {self.width} {self.height}" role="img"'
        return f'<svg {head} aria-label="{html.escape(label)}">{"".join(self.parts)}</svg>'


def span(values, margin=0.08):
    low, high = min(values), max(values)
    pad = margin * (high - low) if high > low else abs(high) * 0.01 or 1
    return low - pad, high + pad


def every(n, most=12):
    """Tick marks 1..n, thinned out."""
    return [(k, k) for k in range(1, n + 1, -(-n // most))]


def page(title, blocks):
    """Blocks as one HTML page that needs nothing else."""
    text = ""
    for kind, *body in blocks:
        if kind == "figure":
            text += f'<figure><div class="scroll">{body[1]}</div>'
            text += f"<figcaption>{html.escape(body[0])}</figcaption></figure>\n"
        elif kind == "table":
            rows = [("th", body[0]), *(("td", row) for row in body[1])]
            table = ""
            for tag, row in rows:
                line = f"</{tag}><{tag}>".join(html.escape(str(cell)) for cell in row)
                table += f"<tr><{tag}>{line}</{tag}></tr>\n"
            text += f'<div class="scroll"><table>{table}</table></div>\n'
        else:
            tag = {"#": "h1", "##": "h2", "code": "pre"}.get(kind, kind)
            line = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(body[-1]))
            line = re.sub(r"`(.+?)`", r"<code>\1</code>", line)
            text += f"<{tag}>{line}</{tag}>\n"
    return PAGE % (html.escape(title), text)


# ---------------------------------------------------------------- the scores of a run

LEVELS = np.arange(1, 20) / 20  # of box_thresh
SCORES_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>%s</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root { color-scheme: light dark; --fg: #1d2126; --bg: #fff; --muted: #68707a; --accent: #0a62c4;
 --grid: #e1e5ea; --second: #b3541e; --third: #1d7a4b }
@media (prefers-color-scheme: dark) { :root { --fg: #e4e7ea; --bg: #14171a; --muted: #98a1ab;
 --accent: #62a8ff; --grid: #30363d; --second: #ec9a63; --third: #63c793 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--fg); background: var(--bg);
 max-width: 960px; margin: 0 auto; padding: 16px }
h1 { font-size: 1.6em; overflow-wrap: anywhere } h2 { font-size: 1.2em; margin-top: 2em }
h2, th, td { border-bottom: 1px solid var(--grid) }
p, figcaption { color: var(--muted) } figcaption { font-size: 13px; overflow-wrap: anywhere }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 3px 12px 3px 0; text-align: right; white-space: nowrap }
th { color: var(--muted) }
th:first-child, td:first-child { text-align: left; white-space: normal }
svg { display: block; width: 100%%; max-width: 720px; font: 13px system-ui, sans-serif }
text { fill: var(--muted) } .value { fill: var(--fg) } rect { fill: var(--accent) }
path { fill: none; stroke: var(--grid) } .line { stroke-width: 2.2 }
.chosen { stroke: var(--muted); stroke-dasharray: 4 3 }
.pages { display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 16px }
figure { margin: 0 } img { max-width: 100%%; border: 1px solid var(--grid) }
@media (max-width: 600px) { svg { font-size: 18px } table { font-size: 13px }
 th, td { padding-right: 8px; white-space: normal } }
</style>%s</html>
"""


def html_table(rows):
    """Rows of cells, the first is the head."""
    cells = [[html.escape(str(cell)) for cell in row] for row in rows]
    head, *body = ("".join(f"<td>{cell}</td>" for cell in row) for row in cells)
    body = "".join(f"<tr>{row}</tr>" for row in body)
    head = head.replace("td>", "th>")
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def html_svg(height, parts):
    return f'<svg viewBox="0 0 640 {height}" role="img">{"".join(parts)}</svg>'


def html_bars(values, labels, below, high):
    """Bars up to the value `high`, a label on each and lines of text below it."""
    parts, step = [], 640 / max(len(values), 1)
    for i, (value, label, lines) in enumerate(zip(values, labels, below)):
        x, h = i * step, 120 * max(value, 0) / (high or 1)
        centre = f'x="{x + step / 2:.1f}" text-anchor="middle"'
        bar = f'y="{140 - h:.1f}" width="{step * 0.8:.1f}" height="{h:.1f}"'
        parts.append(f'<rect x="{x + step * 0.1:.1f}" {bar}/>')
        parts.append(f'<text class="value" {centre} y="{134 - h:.1f}">{label}</text>')
        for k, line in enumerate(lines):
            parts.append(f'<text {centre} y="{159 + 19 * k}">{line}</text>')
    return html_svg(146 + 19 * max(map(len, below), default=0), parts)


def html_curves(curve, chosen):
    """Precision, recall and hmean [19, 3] over LEVELS, a line at the chosen box_thresh."""
    low = min(math.floor(10 * curve.min()) / 10, 0.9)

    def point(x, y):
        return f"{40 + 500 * x:.1f} {250 - 230 * (y - low) / (1 - low):.1f}"

    parts = []
    for y in np.linspace(low, 1, 6):
        parts.append(f'<path d="M{point(0, y)}L{point(1, y)}"/>')
        parts.append(f'<text x="0" y="{float(point(0, y).split()[1]) + 4}">{y:.2f}</text>')
    for x in np.arange(0, 1.01, 0.2):
        parts.append(f'<text x="{40 + 500 * x}" y="270" text-anchor="middle">{x:.1f}</text>')
    if chosen is not None:
        parts.append(f'<path class="chosen" d="M{point(chosen, low)}L{point(chosen, 1)}"/>')
    colours = {"precision": "--second", "recall": "--third", "hmean": "--accent"}
    for k, (name, colour) in enumerate(colours.items()):
        line = "L".join(point(x, y) for x, y in zip(LEVELS, curve[:, k]))
        parts.append(f'<path class="line" style="stroke: var({colour})" d="M{line}"/>')
        style = f'style="fill: var({colour})"'
        parts.append(f'<text {style} x="560" y="{40 + 22 * k}">{name}</text>')
    return html_svg(280, parts)


def binned(x, y, share):
    """Mean of y in up to 5 equally filled bins of x, as a section's bars."""
    if not len(x):
        return "<p>no labels</p>"
    edges = np.unique(np.quantile(x, np.linspace(0, 1, 6)))
    which = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, max(len(edges) - 2, 0))
    bins = [np.flatnonzero(which == k) for k in range(max(len(edges) - 1, 1))]
    means = [float(y[b].mean()) if len(b) else 0.0 for b in bins]
    tops = np.append(edges, edges[-1])
    below = [f"{low:.0f} to {high:.0f}" for low, high in zip(edges, tops[1:])]
    below = [(line, f"{len(b)} {share}") for line, b in zip(below, bins)]
    return html_bars(means, [f"{mean:.4f}" for mean in means], below, 1)
