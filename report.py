"""How is it shown? Markdown, and one HTML page that needs no other file, of a sweep's findings and
of a run's scores. It is handed numbers and computes none.

A report is an iterable of blocks: ("#" | "##" | "p", text), ("table", header, rows), ("code",
language, text) and ("figure", caption, SVG or img), the last for the page only."""

import html
import json
import math
import re
from itertools import accumulate

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

# ---------------------------------------------------------------- blocks


def paragraph(*parts):
    return "p", " ".join(parts)


def markdown(blocks):
    """Blocks, but for figures, as Markdown."""
    text = ""
    for kind, *body in blocks:
        if kind == "table":
            header, rows = body
            for line in (header, ["---"] * len(header), *rows):
                text += f"| {' | '.join(map(str, line))} |\n"
            text += "\n"
        elif kind == "code":
            language, code = body
            text += f"```{language}\n{code}\n```\n\n"
        elif kind != "figure":
            mark = "" if kind == "p" else f"{kind} "
            text += f"{mark}{body[0]}\n\n"
    return text


def page(title, blocks):
    """Blocks as one HTML page."""
    return PAGE % (html.escape(title), "".join(html_block(*block) for block in blocks))


def html_block(kind, *body):
    if kind == "table":
        return html_table(*body)
    if kind == "figure":
        caption, picture = body
        caption = f"<figcaption>{html.escape(caption)}</figcaption>"
        return f'<figure><div class="scroll">{picture}</div>{caption}</figure>\n'

    tag = {"#": "h1", "##": "h2", "code": "pre"}.get(kind, kind)
    text = html.escape(body[-1])
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
    text = re.sub(r"`(.+?)`", r"<code>\1</code>", text)
    return f"<{tag}>{text}</{tag}>\n"


def html_table(header, rows):
    lines = html_row("th", header) + "".join(html_row("td", row) for row in rows)
    return f'<div class="scroll"><table>{lines}</table></div>\n'


def html_row(tag, cells):
    cells = f"</{tag}><{tag}>".join(html.escape(str(cell)) for cell in cells)
    return f"<tr><{tag}>{cells}</{tag}></tr>\n"


# ---------------------------------------------------------------- plots


class Plot:
    """An SVG with axes: ranges (low, high) of x and y in data units; parts in drawing order."""

    def __init__(self, xs, ys, width=920, height=300):
        self.xs = xs
        self.ys = ys
        self.width = width
        self.height = height
        self.parts = []
        self.points = 1  # of y's labels, in a data unit

    def at(self, x, y):
        """Data units -> pixels; what lies outside is drawn at the edge."""
        # 56 px on the left and 40 below are for labels, 28 and 20 opposite for marks at the edge
        across, up = share_of(x, *self.xs), share_of(y, *self.ys)
        return 56 + across * (self.width - 84), self.height - 40 - up * (self.height - 60)

    def line(self, points, kind, tip="", opacity=1.0):
        path = "L".join("{:.1f} {:.1f}".format(*self.at(*point)) for point in points)
        shade = f' opacity="{opacity:.2f}"' if opacity < 1 else ""
        title = f"<title>{html.escape(tip)}</title>"
        self.parts.append(f'<path class="{kind}"{shade} d="M{path}">{title}</path>')

    def dot(self, x, row):
        """A trial's mark; its value, unrounded, is in the attributes and rounded in the tip, in
        points as beside the axis."""
        left, top = self.at(x, row.last)
        value = self.points * row.last
        data = f'data-trial="{row.number}" data-state="{row.state}" data-value="{row.last!r}"'
        tip = html.escape(f"trial {row.number}, {row.state}, {value:.6g}, {row.flags}")
        mark = f'<circle class="{row.state}" cx="{left:.1f}" cy="{top:.1f}" r="4.5" {data}>'
        self.parts.append(f"{mark}<title>{tip}</title></circle>")

    def text(self, x, y, text, anchor="middle", dx=0, dy=0, kind=""):
        """Text at a point in data units, moved by pixels."""
        left, top = self.at(x, y)
        where = f'x="{left + dx:.1f}" y="{top + dy:.1f}" text-anchor="{anchor}"'
        self.parts.append(f'<text class="{kind}" {where}>{html.escape(str(text))}</text>')

    def axes(self, xticks, xlabel, points=1):
        """Grid, labels of the ticks (x, label) and of y in points, and the name of x."""
        self.points = points
        (left, right), (low, high) = self.xs, self.ys
        step = tick_step(high - low)
        for k in range(math.ceil(low / step), math.floor(high / step) + 1):
            self.line([(left, k * step), (right, k * step)], "axis")
            self.text(left, k * step, f"{k * step * points:.6g}", "end", -6, 4)
        for x, label in xticks:
            self.text(x, low, label, dy=18)
        self.text((left + right) / 2, low, xlabel, dy=36)

    def svg(self, label, size="wide"):
        head = f'class="{size}" viewBox="0 0 {self.width} {self.height}" role="img"'
        return f'<svg {head} aria-label="{html.escape(label)}">{"".join(self.parts)}</svg>'


def share_of(value, low, high):
    """Where a value lies between low and high, 0 to 1."""
    return min(max((value - low) / (high - low or 1), 0), 1)


def tick_step(extent):
    """The smallest step of 2, 5 or 10 times a power of ten that makes at most 6 of an extent."""
    power = 10 ** math.floor(math.log10(max(extent, 1e-12)))
    return power * next(m for m in (0.2, 0.5, 1, 2) if extent / (m * power) <= 6)


def counted(last):
    """Ticks from 1 to last, some twelve of them at most."""
    return [(k, k) for k in range(1, last + 1, -(-last // 12))]


def span(values, margin=0.08):
    """Range of values, with a margin on both sides."""
    low, high = min(values), max(values)
    pad = margin * (high - low) if high > low else abs(high) * 0.01 or 1
    return low - pad, high + pad


def bars(items, high):
    """Bars [(value, label, lines of text below)] up to the value `high`."""
    plot = Plot((0, len(items) or 1), (0, high or 1), 560, 200)
    for i, (value, label, lines) in enumerate(items):
        left, right = i + 0.1, i + 0.9
        plot.line([(left, 0), (left, value), (right, value), (right, 0)], "bar", str(label))
        plot.text(i + 0.5, value, label, dy=-5, kind="value")
        if len(items) >= 12 and i % 2 == 0:  # no room for all
            continue
        for k, line in enumerate(lines):
            plot.text(i + 0.5, 0, line, dy=16 + 18 * k)
    return plot.svg("bars", "narrow")


# ---------------------------------------------------------------- a sweep

# f is findings.py's Findings in all of these; each part of the report is a function that yields
# blocks, and each figure one that returns an SVG


def sweep_blocks(f):
    """Findings -> blocks. Shares are printed in points, 0 to 100."""
    for part in (head, figures, ranking, early, luck, distribution, parameters, best):
        yield from part(f)


def show(f, x, more=0):
    """A value of the metric as text, with `more` digits than usual."""
    return f"{f.points * x:.{f.digits + more}f}" if math.isfinite(x) else "-"


def interval(f, low, high):
    return f"{show(f, low)} to {show(f, high)}" if math.isfinite(low) else "-"


def with_interval(f, estimate):
    """An Estimate's mean and interval, as far as they are known."""
    return estimate.text(lambda x: show(f, x))


def short(x):
    return f"{x:.4g}" if isinstance(x, float) else str(x)


def listed(numbers):
    return ", ".join(map(str, numbers))


def head(f):
    goal = "maximised" if f.sign > 0 else "minimised"
    unit = " in percent" if f.points > 1 else ""
    times = "no times recorded"
    if math.isfinite(f.hours):
        times = f"{f.hours:.2f} hours used, {f.hours_saved:.2f} saved; process starts not counted"
    yield "#", f"Sweep {f.name}"
    yield paragraph(
        f"{f.method}, {f.metric}{unit}, {goal}; {len(f.trials)} trials of {f.epochs} epochs:",
        f"{len(f.finished)} finished, {len(f.stopped)} stopped early, {len(f.failed)} failed,",
        f"{len(f.trials) - len(f.failed) - len(f.rows)} under way.",
    )
    saved = f"{f.saved} saved by stopping {len(f.stopped)} runs"
    yield paragraph(f"{f.spent} epochs used, {saved} ({times}).")
    yield from map(paragraph, f.notes)


def figures(f):
    """History, learning curves and parallel coordinates."""
    if not f.rows:
        return
    edge = "" if f.sound == f.rows else " Values far worse than the rest stand at the edge."

    caption = f"{f.metric} by trial; hollow: stopped early, at the stop; line: the best finished."
    yield "figure", caption + edge, trial_plot(f)
    if any(row.history for row in f.rows):
        caption = "Learning curves; a circle marks a stop, the blue one is the best configuration."
        yield "figure", caption + edge, curves_plot(f)
    if f.names:
        caption = "Parallel coordinates; dashed: stopped early, value at the stop;"
        yield "figure", f"{caption} blue: best finished.", parallel_plot(f)


def trial_plot(f):
    """Value by trial, and the best so far."""
    plot = Plot((0.5, len(f.trials) + 0.5), span([row.last for row in f.sound]))
    plot.axes(counted(len(f.trials)), "trial", f.points)

    done = [row for row in f.rows if row.state == "finished"]
    best_of = max if f.sign > 0 else min
    tops = accumulate((row.last for row in done), best_of)
    if done:
        line = [(row.number, top) for row, top in zip(done, tops)]
        plot.line(line, "best", "best so far of the finished")
    for row in f.rows:
        plot.dot(row.number, row)
    return plot.svg("optimisation history")


def curves_plot(f):
    """Learning curves, the best configuration's on top."""
    late = []  # values, without the steep start
    for row in f.sound:
        late += row.history[len(row.history) // 4 :]
    plot = Plot((1, max(f.epochs, 2)), span(late or [0, 1], 0.03))
    plot.axes(counted(f.epochs), "epoch", f.points)
    for row in best_last(f, [row for row in f.rows if row.history]):
        plot.line(list(enumerate(row.history, 1)), line_kind(f, row), f"trial {row.number}")
        if row.state == "stopped":
            plot.dot(len(row.history), row)
    return plot.svg("learning curves")


def parallel_plot(f):
    """Parallel coordinates: a line a trial, the better the darker."""
    n = len(f.names)
    low, high = span([row.last for row in f.sound], 0)
    plot = Plot((-0.3, n + 0.3), (0, 1))

    axes = []
    for item in f.parameters:
        (_, first), *_, (_, last) = item.ticks
        axes.append((short(first), short(last), item.key))
    axes.append((show(f, low), show(f, high), f.metric))
    for i, (bottom, top, name) in enumerate(axes):
        plot.line([(i, 0), (i, 1)], "axis")
        plot.text(i, 0, bottom, dy=16)
        plot.text(i, 1, top, dy=-4)
        plot.text(i, 0, name, dy=34)

    for row in best_last(f, sorted(f.sound, key=lambda row: f.sign * row.last)):
        score = share_of(row.last, low, high)
        goodness = score if f.sign > 0 else 1 - score
        shade = 1.0 if row is f.first else 0.15 + 0.85 * goodness**2
        points = [*enumerate(row.point), (n, score)]
        plot.line(points, line_kind(f, row), f"trial {row.number}", shade)
    return plot.svg("parameters")


def best_last(f, rows):
    """Rows in drawing order: the best configuration lies on top."""
    return sorted(rows, key=lambda row: row is f.first)


def line_kind(f, row):
    return "best" if row is f.first else row.state


def ranking(f):
    """Finished trials, one row a configuration."""
    yield "##", "Finished trials"
    if not f.finished:
        yield paragraph("None yet.")
        return

    yield paragraph(
        "Values are those of the last epoch, the posterior mean is the Gaussian process's;",
        f"intervals: 95 %, over {f.over}.",
    )
    several = len(f.ranking) < len(f.finished)
    names = [name for name in f.names if name != "seed" or not several]
    header = ["rank", "trial", f.metric, "interval", "posterior mean", "epochs", *names]
    if several:
        yield paragraph("A configuration that ran with several seeds has the mean of its runs.")
        header.append("seeds")

    rows = []
    for rank, configuration in enumerate(f.ranking, 1):
        runs = configuration.runs
        row = [
            rank,
            listed(run.number for run in runs),
            show(f, configuration.value),
            interval(f, *configuration.pages),
            show(f, configuration.expected.mean),
            runs[0].epochs,
        ]
        row += [short(x) for x, name in zip(runs[0].values, f.names) if name in names]
        if several:
            row.append(listed(run.seed for run in runs))
        rows.append(row)
    yield "table", header, rows

    if len(f.ties) > 1:
        yield paragraph(
            "This sweep cannot tell these apart, given the noise of a repetition: trials",
            f"{listed(f.ties)}.",
        )


def early(f):
    """The trials that did not finish."""
    if f.stopped:
        yield "##", "Stopped early"
        remark = "`--continue-trial N` takes a paused run to its end."
        if not any(row.history for row in f.stopped):
            remark = "No curve, no projection."
        yield paragraph("Values at the epoch of the stop do not compare with final ones.", remark)
        header = ["trial", "epoch", f"{f.metric} there", "stopped by", "projected final (95 %)"]
        header += ["chance to win", *f.names]
        yield "table", header, [stopped_row(f, row) for row in f.stopped]
    if f.failed:
        yield "##", "Failed"
        rows = [[row.number, row.why, *map(short, row.values)] for row in f.failed]
        yield "table", ["trial", "why", *f.names], rows


def stopped_row(f, row):
    rule = "not recorded"
    if row.verdict:
        rule = "{rule}: rank {rank} of {of}, bar ".format(**row.verdict)
        rule += show(f, row.verdict["bar"])
    chance = f"{row.chance:.0%}" if math.isfinite(row.chance) else "-"
    final = with_interval(f, row.final)
    return [row.number, row.epochs, show(f, row.last), rule, final, chance, *map(short, row.values)]


def luck(f):
    """How far the best run lies above the others, and what a repetition of it would give."""
    yield "##", "How good is the best?"
    if not f.luck:
        yield paragraph("Fewer than 3 sound runs: cannot tell.")
        return

    n = f.luck.n
    pooled = ", stopped ones with the value at their stop" if f.pooled else ""
    verdict = f"more than picking explains (5 % limit {f.luck.limit:.2f})"
    if f.luck.found < f.luck.limit:
        verdict = f"no {verdict}; real differences of a normal spread would look the same"
    yield paragraph(
        f"Best of {n} sound runs{pooled}: the best of {n} runs of equal worth is expected at",
        f"{f.luck.expected:+.2f} sd from their mean; found at {f.luck.found:+.2f} sd. That is",
        f"{verdict}.",
    )
    if not f.importance:
        return

    row = f.luck.row
    length = f.epochs if math.isfinite(row.final.mean) else row.epochs  # of a stopped one, too
    noise = f"The noise of one run, sd {f.points * f.noise:.2g}, is"
    yield paragraph(
        f"Trial {row.number}: observed {show(f, row.last)} at epoch {row.epochs}. A repetition",
        f"up to epoch {length} is expected to give {show(f, row.expected.mean)} (95 %",
        f"{interval(f, row.expected.low, row.expected.high)}), a single one",
        f"{interval(f, row.repeated.low, row.repeated.high)}. {noise}",
        "learnt from replicas." if f.replicas else "hardly known: `train.py --seeds 3` would tell.",
    )


def distribution(f):
    yield "##", "Distribution"
    rows = []
    for line in f.spread:
        label = line.label
        if line.without:
            label += f", without failures (trial {listed(line.without)})"
        sd = f"{f.points * line.sd:.3g}" if line.n > 1 else "-"
        ends = show(f, line.low), show(f, line.high)
        rows.append([label, line.n, show(f, line.mean), show(f, line.median, 1), sd, *ends])
    yield "table", ["runs", "n", "mean", "median", "sd (sample)", "min", "max"], rows


def parameters(f):
    """The score against each parameter."""
    yield "##", "Score by parameter"
    n = len(f.fair)
    if n < 3:
        yield paragraph("Too few runs.")
        return

    runs = "finished runs"
    if f.pooled:
        runs = "runs with a value, each at the last epoch it had (too few finished): a hint"
    if f.out:
        runs += f"; trial {listed(row.number for row in f.out)}, far worse, left out"
    yield paragraph(f"Over the {n} {runs}.")

    for i, item in enumerate(f.parameters):
        remarks = [f"**{item.key}**.", correlation(n, item.rho, item.chance)]
        if f.importance:
            remarks.append(importance(len(f.sound), *f.importance[i]))
        yield paragraph(*remarks)
        caption = f"{f.metric} against {item.key}; the GP's mean and 95 % band through the best."
        yield "figure", caption, parameter_plot(f, i, item)
        rows = []
        for group in item.groups:
            ends = " to ".join(map(short, group.ends))
            rows.append([ends, group.n, with_interval(f, group.mean), show(f, group.median)])
        yield "table", [item.key, "n", "mean (95 %)", "median"], rows


def correlation(n, rho, chance):
    if rho is None:
        return "Categories have no ranks."
    if chance >= 1:
        return f"Too few runs for a rank correlation (n = {n})."
    if abs(rho) > chance:
        return f"Rank correlation with the score {rho:+.2f} (n = {n}, limit {chance:.2f})."
    why = f"({rho:+.2f}, n = {n}, limit {chance:.2f})"
    return f"No rank correlation with the score is shown {why}: the means below show no trend."


def importance(n, share, by_chance):
    """n: of all sound runs, stopped ones with their projected value, which the means leave out."""
    text = f"By all {n} runs, its main effect explains {share:.0%} of the variance over the space;"
    text += f" {by_chance:.0%} of permuted scores give it as much"
    return f"{text}: no importance is shown." if by_chance > 0.05 else f"{text}."


def parameter_plot(f, i, item):
    """The score against a parameter, with the GP's mean and 95 % band along it."""
    plot = Plot((0, 1), span([row.last for row in f.sound], 0.25), 560, 260)
    plot.axes([(x, short(value)) for x, value in item.ticks], item.key, f.points)
    if item.along:
        upper = list(zip(item.along.u, item.along.high))
        lower = list(zip(item.along.u, item.along.low))
        plot.line(upper + lower[::-1], "band", "95 %")
        plot.line(zip(item.along.u, item.along.mean), "best", "posterior mean")
    for row in f.rows:
        plot.dot(row.point[i], row)
    return plot.svg(f"{f.metric} against {item.key}", "narrow")


def best(f):
    """The best configuration, as a command and as hyperparameters."""
    if not f.first:
        return
    yield "##", "Best configuration"
    yield paragraph(f"Trial {f.first.number}, {why_best(f)}.")
    if f.rivals:
        rivals = f"Stopped trials that may well be better: {listed(f.rivals)}"
        yield paragraph(f"{rivals}; `--continue-trial N` would tell.")
    yield "code", "", f.command
    yield "code", "json", json.dumps(f.params, indent=1)


def why_best(f):
    trials = "finished trials" if f.finished else "stopped trials (none finished)"
    if len(f.top) == 1:
        return f"the only sound one of the {trials}"
    if not math.isfinite(f.first.expected.mean):
        return f"the best value of the {trials}, too few for a posterior mean"
    if f.first is f.top[0]:
        return f"the best posterior mean of the {trials}"
    return f"the best posterior mean of the {trials}; trial {f.top[0].number} has the best value"


# ---------------------------------------------------------------- a run's scores


def scores_blocks(title, about, scores, counts, pages, density, heights, worst):
    """Blocks of a run's scores: {metric's name: Score}; counts: labels and pairs as in --json;
    pages, density, heights: items of `bars`; worst: [(caption, data URL)]."""
    first, *_ = scores.values()
    yield "#", title
    yield paragraph(about, f"Intervals: 95 %, over {first.over}.")
    rows = []
    for name, score in scores.items():
        values = score.precision, score.recall, score.hmean, *score.interval
        rows.append([name, *(f"{value:.4f}" for value in values)])
    yield "table", ["metric", "precision", "recall", "hmean", "95 % from", "to"], rows
    yield "table", ["labels", *counts["labels"]], [["number", *counts["labels"].values()]]
    rows = [[f"from {pair['gap'][0]}", pair["pairs"], pair["joined"]] for pair in counts["pairs"]]
    yield "table", ["neighbours by gap / height", "pairs", "joined"], rows

    most = max(value for value, *_ in pages)
    yield "##", "Pages by score"
    yield "figure", "By hmean (competition's CLEval), in steps of 0.05.", bars(pages, most)
    yield "##", "Score by density"
    yield "figure", "Mean hmean of pages with so many words.", bars(density, 1)
    yield "##", "Recall by word height"
    yield "figure", "Share hit at IoU 0.5, by height in page px.", bars(heights, 1)

    yield "##", f"The {len(worst)} worst pages"
    yield paragraph(
        "Labels blue, hits green, joined purple, other misses red, false alarms orange."
    )
    for caption, source in worst:
        yield "figure", caption, f'<img alt="" src="{source}">'
