"""How is it shown? Markdown and one HTML page that needs nothing else, of a sweep's findings and of
a run's scores, and `progress`. It is handed numbers and computes none. Pages are blocks: ("#" |
"##" | "p", text), ("table", header, rows), ("code", language, text), ("figure", caption, img)."""

import html
import json
import math
import re
import sys
from itertools import accumulate

from tqdm import tqdm

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>%s</title><style>
:root { color-scheme: light dark; --fg: #1d2126; --bg: #fff; --muted: #68707a; --grid: #e1e5ea;
 --accent: #0a62c4 }
@media (prefers-color-scheme: dark) { :root { --fg: #e4e7ea; --bg: #14171a; --muted: #98a1ab;
 --grid: #30363d; --accent: #62a8ff } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--fg); background: var(--bg);
 max-width: 960px; margin: 0 auto; padding: 16px; overflow-wrap: anywhere }
h1 { font-size: 1.6em } h2 { font-size: 1.2em; margin-top: 2em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { padding: 3px 12px 3px 0; text-align: right; white-space: nowrap }
h2, th, td { border-bottom: 1px solid var(--grid) } .scroll { overflow-x: auto; margin: 1em 0 }
th { color: var(--muted); white-space: normal; vertical-align: bottom }
th:first-child, td:first-child { text-align: left; white-space: normal }
pre { background: var(--grid); padding: 10px; overflow-x: auto; border-radius: 4px }
figure { margin: 0 } figcaption { color: var(--muted); font-size: 13px }
figure:has(img) { display: inline-block; width: 300px; max-width: 100%%; vertical-align: top }
img { max-width: 100%%; border: 1px solid var(--grid) }
svg { display: block; width: 100%%; height: auto; font: 12px system-ui, sans-serif }
.narrow { max-width: 560px } text { fill: var(--ink, var(--muted)) } text.value { fill: var(--fg) }
path { fill: none; stroke: var(--ink, var(--muted)); stroke-width: 1.2; stroke-linejoin: round }
.axis { --ink: var(--grid) } .best { --ink: var(--accent) } path.best { stroke-width: 2.2 }
.bar, .band { fill: var(--accent); stroke: none } .band { opacity: .15 }
.stopped { stroke-dasharray: 4 3 } circle { fill: var(--accent); stroke: var(--bg) }
circle.stopped { fill: var(--bg); stroke: var(--fg); stroke-dasharray: none }
@media (max-width: 600px) { table { font-size: 13px; width: max-content }
 figure:has(img) { width: 100%% } .wide { min-width: 560px } svg { font-size: 15px }
 td:first-child { max-width: 11em } }
</style>
%s</html>
"""
EVERY = 30  # seconds between two lines of `progress`


class Lines(tqdm):
    """A progress bar whose states are lines, for logs."""

    status_printer = staticmethod(lambda file: lambda s: s and print(s, file=file, flush=True))


def progress(items=None, desc="", total=None):
    """tqdm on a terminal; elsewhere a line on stderr every EVERY seconds says how far it is."""
    if sys.stderr.isatty():
        return tqdm(items, desc, total, leave=False)
    layout = "{desc}: {n_fmt} of {total_fmt}, {elapsed} so far, {remaining} left"
    pace = {"delay": EVERY, "mininterval": EVERY, "miniters": 1}
    return Lines(items, desc, total, leave=False, bar_format=layout, **pace)


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
        elif kind in ("#", "##", "p"):
            text += f"{kind} {body[0]}\n\n".removeprefix("p ")
    return text


def page(title, blocks):
    return PAGE % (html.escape(title), "".join(html_block(*block) for block in blocks))


def html_block(kind, *body):
    if kind == "table":
        text, (header, rows) = "", body
        for tag, row in [("th", header), *(("td", row) for row in rows)]:
            cells = f"</{tag}><{tag}>".join(html.escape(str(cell)) for cell in row)
            text += f"<tr><{tag}>{cells}</{tag}></tr>\n"
        return f'<div class="scroll"><table>{text}</table></div>\n'
    if kind == "figure":
        caption = f"<figcaption>{html.escape(body[0])}</figcaption>"
        return f'<figure><div class="scroll">{body[1]}</div>{caption}</figure>\n'
    tag = {"#": "h1", "##": "h2", "code": "pre"}.get(kind, kind)
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(body[-1]))
    text = re.sub(r"`(.+?)`", r"<code>\1</code>", text)
    return f"<{tag}>{text}</{tag}>\n"


# ---------------------------------------------------------------- plots


class Plot:
    """An SVG with axes: ranges (low, high) of x and y in data units; parts in drawing order."""

    def __init__(self, xs, ys, width=920, height=300):
        self.xs, self.ys, self.width, self.height, self.parts = xs, ys, width, height, []

    def at(self, x, y):
        """Data units -> pixels; what lies outside is drawn at the edge."""
        pairs = ((x, *self.xs), (y, *self.ys))
        x, y = (min(max((v - low) / (high - low or 1), 0), 1) for v, low, high in pairs)
        y = self.height - 40 - y * (self.height - 60)
        return f"{56 + x * (self.width - 84):.1f}", f"{y:.1f}"

    def line(self, points, kind, tip="", opacity=1.0):
        path = "L".join(" ".join(self.at(*point)) for point in points)
        shade = f' opacity="{opacity:.2f}"' * (opacity < 1)
        title = f"<title>{html.escape(tip)}</title>"
        self.parts.append(f'<path class="{kind}"{shade} d="M{path}">{title}</path>')

    def dot(self, x, row):
        """A trial's mark; its value, unrounded, is in the attributes and rounded in the tip."""
        left, top = self.at(x, row.last)
        data = f'data-trial="{row.number}" data-state="{row.state}" data-value="{row.last!r}"'
        tip = html.escape(f"trial {row.number}, {row.state}, {row.last:.4f}, {row.flags}")
        mark = f'<circle class="{row.state}" cx="{left}" cy="{top}" r="4.5" {data}>'
        self.parts.append(f"{mark}<title>{tip}</title></circle>")

    def text(self, x, y, text, anchor="middle", dx=0, dy=0, kind=""):
        left, top = (float(v) + d for v, d in zip(self.at(x, y), (dx, dy)))
        where = f'class="{kind}" x="{left:.1f}" y="{top:.1f}" text-anchor="{anchor}"'
        self.parts.append(f"<text {where}>{html.escape(str(text))}</text>")

    def axes(self, xticks, xlabel, points=1):
        """Grid, tick labels (of x a list, or a number to count to; y in points), name of x."""
        (left, right), (low, high) = self.xs, self.ys
        step = 10 ** math.floor(math.log10(max(high - low, 1e-12)))
        step *= next(m for m in (0.2, 0.5, 1, 2) if (high - low) / (m * step) <= 6)
        for k in range(math.ceil(low / step), math.floor(high / step) + 1):
            self.line([(left, k * step), (right, k * step)], "axis")
            self.text(left, k * step, f"{k * step * points:.6g}", "end", -6, 4)
        if isinstance(xticks, int):
            xticks = [(k, k) for k in range(1, xticks + 1, -(-xticks // 12))]
        for x, label in xticks:
            self.text(x, low, label, dy=18)
        self.text((left + right) / 2, low, xlabel, dy=36)

    def svg(self, label, size="wide"):
        head = f'class="{size}" viewBox="0 0 {self.width} {self.height}" role="img"'
        return f'<svg {head} aria-label="{html.escape(label)}">{"".join(self.parts)}</svg>'


def bars(items, high):
    """Bars [(value, label, lines of text below)] up to the value `high`."""
    plot = Plot((0, len(items) or 1), (0, high or 1), 560, 200)
    for i, (value, label, lines) in enumerate(items):
        left, right = i + 0.1, i + 0.9
        plot.line([(left, 0), (left, value), (right, value), (right, 0)], "bar", str(label))
        plot.text(i + 0.5, value, label, dy=-5, kind="value")
        for k, line in enumerate(lines if len(items) < 12 or i % 2 else ()):
            plot.text(i + 0.5, 0, line, dy=16 + 18 * k)
    return plot.svg("bars", "narrow")


def span(values, margin=0.08):
    low, high = min(values), max(values)
    pad = margin * (high - low) if high > low else abs(high) * 0.01 or 1
    return low - pad, high + pad


def short(x):
    return f"{x:.4g}" if isinstance(x, float) else str(x)


# ---------------------------------------------------------------- a sweep


def sweep_blocks(f):
    """sweep.py's Findings -> blocks. Shares are printed in points, 0 to 100."""
    for part in (head, figures, ranking, early, luck, distribution, parameters, best):
        yield from part(f)


def show(f, x, more=0):
    return f"{f.points * x:.{f.digits + more}f}" if math.isfinite(x) else "-"


def interval(f, low, high):
    return f"{show(f, low)} to {show(f, high)}" if math.isfinite(low) else "-"


def head(f):
    yield "#", f"Sweep {f.name}"
    yield p(
        f"{f.method}, {f.metric}, {'maximised' if f.sign > 0 else 'minimised'};",
        f"{len(f.trials)} trials of {f.epochs} epochs: {len(f.finished)} finished,",
        f"{len(f.stopped)} stopped early, {len(f.failed)} failed,",
        f"{len(f.trials) - len(f.failed) - len(f.rows)} under way.",
    )
    times = f"{f.hours:.2f} hours used, {f.saved * f.hours / max(f.spent, 1):.2f} saved"
    times = times if math.isfinite(f.hours) else "no times recorded"
    yield p(f"{f.spent} epochs used, {f.saved} saved by stopping {len(f.stopped)} runs ({times}).")
    yield from map(p, f.notes)


def figures(f):
    """History, learning curves and parallel coordinates."""
    if not f.rows:
        return
    edge = " Values far below the rest stand at the lower edge." * (f.sound != f.rows)
    plot = Plot((0.5, len(f.trials) + 0.5), span([row.last for row in f.sound]))
    plot.axes(len(f.trials), "trial", f.points)
    done = [row for row in f.rows if row.state == "finished"]
    tops = accumulate((row.last for row in done), max if f.sign > 0 else min)
    tops = [(row.number, top) for row, top in zip(done, tops)] or [(1, 0)]
    plot.line(tops, "best", "best so far of the finished")
    for row in f.rows:
        plot.dot(row.number, row)
    caption = f"{f.metric} by trial; hollow: stopped early, at the stop; line: the best finished."
    yield "figure", caption + edge, plot.svg("optimisation history")
    late = [value for row in f.sound for value in row.history[len(row.history) // 4 :]]
    plot = Plot((1, max(f.epochs, 2)), span(late or [0, 1], 0.03))
    plot.axes(f.epochs, "epoch", f.points)
    known = [row for row in f.rows if row.history]
    for row in sorted(known, key=lambda row: row is f.first):
        kind = "best" if row is f.first else row.state
        plot.line(list(enumerate(row.history, 1)), kind, f"trial {row.number}")
        if row.state == "stopped":
            plot.dot(len(row.history), row)
    caption = "Learning curves; a circle marks a stop, the blue one is the best configuration."
    if known:
        yield "figure", caption + edge, plot.svg("learning curves")
    if f.names:
        caption = (
            "Parallel coordinates; dashed: stopped early, value at the stop; blue: best finished."
        )
        yield "figure", caption, parallel(f)


def parallel(f):
    """Parallel coordinates: a line a trial, the better the darker."""
    n, (low, high) = len(f.names), span([row.last for row in f.sound], 0)
    plot = Plot((-0.3, n + 0.3), (0, 1))
    ends = [(item["ticks"][0][1], item["ticks"][-1][1]) for item in f.parameters]
    axes = [[*map(short, pair), name] for pair, name in zip(ends, f.names)]
    for i, labels in enumerate([*axes, [show(f, low), show(f, high), f.metric]]):
        plot.line([(i, 0), (i, 1)], "axis")
        for label, y, dy in zip(labels, (0, 1, 0), (16, -4, 34)):
            plot.text(i, y, label, dy=dy)
    for row in sorted(f.sound, key=lambda row: (row is f.first, f.sign * row.last)):
        score = (row.last - low) / (high - low or 1)
        shade = 0.15 + 0.85 * (score if f.sign > 0 else 1 - score) ** 2
        kind, shade = ("best", 1.0) if row is f.first else (row.state, shade)
        plot.line([*enumerate(row.point), (n, score)], kind, f"trial {row.number}", shade)
    return plot.svg("parameters")


def ranking(f):
    yield "##", "Finished trials"
    if not f.finished:
        yield p("None yet.")
        return
    yield p(
        "Values are those of the last epoch, intervals 95 % over pages, the posterior mean is",
        "the Gaussian process's.",
    )
    rows = []
    for rank, row in enumerate(f.finished, 1):
        told = [show(f, row.last), interval(f, *row.pages), show(f, row.expected["mean"])]
        rows.append([rank, row.number, *told, row.epochs, *map(short, row.values)])
    header = ["rank", "trial", f.metric, "interval", "posterior mean", "epochs"]
    yield "table", header + f.names, rows
    if len(f.ties) > 1:
        told = "Not to be told apart by this sweep, noise of a repetition counted: trials"
        yield p(told, f"{', '.join(map(str, f.ties))}.")


def early(f):
    """The trials that did not finish."""
    rows = []
    for row in f.stopped:
        mean, _, low, high = row.final.values()
        v, told, chance = row.verdict, "not recorded", f"{row.chance:.0%}".replace("nan%", "-")
        if v:
            told = f"{v['rule']}: rank {v['rank']} of {v['of']}, bar {show(f, v['bar'])}"
        final = f"{show(f, mean)} ({interval(f, low, high)})" if math.isfinite(mean) else "-"
        line = [row.number, row.epochs, show(f, row.last), told, final, chance]
        rows.append([*line, *map(short, row.values)])
    if rows:
        yield "##", "Stopped early"
        more = "`--continue-trial N` takes a paused run to its end."
        more = more if any(row.history for row in f.stopped) else "No curve, no projection."
        yield p("Values at the epoch of the stop: not comparable with final ones.", more)
        header = ["trial", "epoch", f"{f.metric} there", "stopped by", "projected final (95 %)"]
        yield "table", [*header, "chance to win", *f.names], rows
    if f.failed:
        yield "##", "Failed"
        rows = [[row.number, row.why, *map(short, row.values)] for row in f.failed]
        yield "table", ["trial", "why", *f.names], rows


def luck(f):
    yield "##", "How good is the best?"
    if not f.luck:
        yield p("Fewer than 3 sound runs: cannot tell.")
        return
    n, expected, found, limit, row = f.luck.values()
    pooled = ", stopped ones with the value at their stop" * f.pooled
    same = "; real differences of a normal spread would look the same" * bool(found < limit)
    yield p(
        f"Best of {n} sound runs{pooled}: of {n} runs of equal worth the best is expected at",
        f"{expected:+.2f} sd from their mean; found at {found:+.2f} sd. That is",
        f"{'no more' if same else 'more'} than picking explains (5 % limit {limit:.2f}){same}.",
    )
    if f.importance:
        mean, _, low, high = row.expected.values()
        seed = "learnt from replicas" if f.replicas else "hardly known: `--seeds 3` would tell"
        single = interval(f, row.repeated["low"], row.repeated["high"])
        yield p(
            f"Trial {row.number}: observed {show(f, row.last)} at epoch {row.epochs}. A repetition",
            f"of that length is expected to give {show(f, mean)} (95 % {interval(f, low, high)}),",
            f"a single one {single}. The noise of one run, sd {f.points * f.noise:.2g}, is {seed}.",
        )


def distribution(f):
    yield "##", "Distribution"
    rows = []
    for label, without, n, mean, median, sd, low, high in f.spread:
        label += f", without failures (trial {', '.join(map(str, without))})" * bool(without)
        sd = f"{f.points * sd:.3g}" if n > 1 else "-"
        rows.append([label, n, show(f, mean), show(f, median, 1), sd, show(f, low), show(f, high)])
    yield "table", ["runs", "n", "mean", "median", "sd (sample)", "min", "max"], rows


def parameters(f):
    yield "##", "Score by parameter"
    n, pooled = len(f.fair), "runs with a value, each at the last epoch it had (too few finished)"
    over = f"Over the {n} {pooled + ': a hint' if f.pooled else 'finished runs'}"
    out = f"; trial {', '.join(str(r.number) for r in f.out)}, far below, left out" * bool(f.out)
    yield p(f"{over}{out}." if n > 2 else "Too few runs.")
    for i, item in enumerate(f.parameters if n > 2 else ()):
        told = correlation(n, item["rho"], item["chance"])
        if f.importance:
            share, by_chance = f.importance[i]
            told += f" Importance {share:.0%} of the scores' variance; {by_chance:.0%} of permuted"
            told += " scores give it as much: not shown." if by_chance > 0.05 else " scores do."
        yield p(f"**{item['key']}**. {told}")
        caption = f"{f.metric} against {item['key']}; the GP's mean and 95 % band through the best."
        yield "figure", caption, parameter_plot(f, i, item)
        rows = []
        for ends, count, worth, median in item["groups"]:
            mean, _, low, high = worth.values()
            told = f"{show(f, mean)} ({interval(f, low, high)})" if count > 1 else show(f, mean)
            rows.append([" to ".join(map(short, ends)), count, told, show(f, median)])
        yield "table", [item["key"], "n", "mean (95 %)", "median"], rows


def correlation(n, rho, chance):
    if rho is None:
        return "Categories have no ranks."
    if abs(rho) > chance:
        return f"Rank correlation with the score {rho:+.2f} (n = {n}, limit {chance:.2f})."
    why = f"({rho:+.2f}, n = {n}, limit {chance:.2f})"
    return f"No rank correlation with the score is shown {why}: the means below are no trend."


def parameter_plot(f, i, item):
    """The score against a parameter, with the GP's mean and 95 % band along it."""
    plot = Plot((0, 1), span([row.last for row in f.sound], 0.25), 560, 260)
    plot.axes([(x, short(value)) for x, value in item["ticks"]], item["key"], f.points)
    if item["along"]:
        u, mean, _, low, high = item["along"].values()
        plot.line([*zip(u, high), *zip(u[::-1], low[::-1])], "band", "95 %")
        plot.line(list(zip(u, mean)), "best", "posterior mean")
    for row in f.rows:
        plot.dot(row.point[i], row)
    return plot.svg(f"{f.metric} against {item['key']}", "narrow")


def best(f):
    if not f.first:
        return
    kind = "finished" if f.finished else "stopped (none finished)"
    other = f"; the highest value had trial {f.top[0].number}" * (f.first is not f.top[0])
    yield "##", "Best configuration"
    yield p(f"Trial {f.first.number}, the best posterior mean of the {kind} trials{other}.")
    if f.rivals:
        numbers = ", ".join(map(str, f.rivals))
        yield p(f"Stopped trials that may well be better: {numbers}; --continue-trial tells.")
    yield "code", "", f.command
    yield "code", "json", json.dumps(f.params, indent=1)


# ---------------------------------------------------------------- a run's scores


def scores_blocks(title, about, scores, counts, pages, density, heights, worst):
    """Blocks of a run's scores: {metric's name: Score}; counts: labels and pairs as of --json;
    pages, density, heights: items of `bars`; worst [(caption, data URL)]."""
    most = max(value for value, *_ in pages)
    yield "#", title
    first, *_ = scores.values()
    yield p(about, f"Intervals: 95 %, over {first.over}.")
    rows = []
    for name, score in scores.items():
        values = score.precision, score.recall, score.hmean, *score.interval
        rows.append([name, *(f"{value:.4f}" for value in values)])
    yield "table", ["metric", "precision", "recall", "hmean", "95 % from", "to"], rows
    yield "table", ["labels", *counts["labels"]], [["number", *counts["labels"].values()]]
    rows = [[f"from {pair['gap'][0]}", pair["pairs"], pair["joined"]] for pair in counts["pairs"]]
    yield "table", ["neighbours by gap / height", "pairs", "joined"], rows
    for head, caption, plot in (
        ("Pages by score", "By hmean (competition's CLEval), in steps of 0.05.", bars(pages, most)),
        ("Score by density", "Mean hmean of pages with so many words.", bars(density, 1)),
        ("Recall by word height", "Share hit at IoU 0.5, by height in page px.", bars(heights, 1)),
    ):
        yield "##", head
        yield "figure", caption, plot
    yield "##", f"The {len(worst)} worst pages"
    yield p("Labels blue, hits green, joined purple, other misses red, false alarms orange.")
    yield from (("figure", caption, f'<img alt="" src="{source}">') for caption, source in worst)
