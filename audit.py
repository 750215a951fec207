"""Which labels are wrong? Suspects of each kind, with the probability that a person would change
them.

A page is looked at with the map of a network that never saw it. A copy of its labels gets mistakes,
by a seed; trees learn from them how each kind looks on a map, and the labels as they are show how
usual that look is with this labeller. What a labeller always does is therefore no suspect."""

import html
import json
import zlib
from collections import Counter, defaultdict
from os.path import realpath
from typing import NamedTuple

import cv2
import numpy as np

import data
import report
from cleval import from_top_left, shared_areas
from db_postprocess import DECIMALS, polygon_area, split_outlines, to_page
from drawing import COLOURS, embedded_picture, resize
from files import DataError, read_json, replace_file, write_json
from formats import to_labelme
from habits import LOOKED_AT, label_habits
from interval import bootstrap, bootstrap_groups, count_sample
from labels import PROPOSAL, get, parse_polygon
from looks import View, close_pairs, look, outline_features, text_outside, with_labels
from mistakes import KINDS, hull, make_mistakes, short_sides
from overlap import join_vertices
from pictures import read_image
from trees import fit_trees, make_scale, tree_scores

# what is judged for each kind, and what else looks like it: "piece" of a split label, "bare" text
# of one that was moved
TABLES = {"missing": "text", "spurious": "label", "moved": "label", "joined": "label"}
TABLES |= {"split": "pair", "ignored": "ignored", "piece": "label", "bare": "text"}
SURE = 0.6  # a threshold that separates neighbours
WANTED = 3000  # mistakes to learn from, of all kinds
SHARE = 0.15  # of a page's labels that get one, at most
MAX_ROUNDS = 6  # copies of a page
LESSONS = 3  # of the trees of a kind
FOLDS = 4  # pages of one are judged by what the others teach
MAX_LEARNED = 40_000  # things as they are, to learn from
LISTED = 0.05  # least probability of a suspect
A_PAGE = 50  # suspects of a page of the report
MAX_SHOWN = 500  # suspects in it

# ---------------------------------------------------------------- a page's units


class Units(NamedTuple):
    """What is judged on a page, by table of TABLES."""

    features: dict  # [N, F]
    labels: dict  # indices of the labels of each: one, or two of a pair, or none
    outlines: dict  # map px


def page_units(view, ignore, hp, labels=None, bare=None):
    """Units of a View. labels: indices of the labels to take, None for all. bare: outlines that
    lost their label; of text outside labels only what lies on them is taken, None for all."""
    chosen = range(len(view.polygons)) if labels is None else labels
    care = [n for n in chosen if not ignore[n]]
    pairs, of_pairs = close_pairs(view, care)
    text, of_text = text_outside(view, hp)

    # text of which more than half lies on a bare outline
    if bare is not None:
        on = shared_areas(bare, text, None).shared.sum(0)
        near = [n for n, outline in enumerate(text) if on[n] > polygon_area(outline) / 2]
        text = [text[n] for n in near]
        of_text = of_text[near]

    indices = {
        "label": [(n,) for n in care],
        "ignored": [(n,) for n in chosen if ignore[n]],
        "pair": pairs,
        "text": [()] * len(text),
    }
    # an outline for each unit: of a pair the hull of both labels
    outlines = {"text": text}
    for table in ("label", "ignored", "pair"):
        outlines[table] = [hull(*(view.polygons[n] for n in unit)) for unit in indices[table]]
        if table != "pair":
            outlines[table] = [view.polygons[n] for (n,) in indices[table]]

    features = {table: outline_features(view, some) for table, some in outlines.items()}
    features["pair"] = np.hstack([features["pair"], of_pairs])
    features["text"] = np.hstack([features["text"], of_text])
    return Units(features, indices, outlines)


def find_mistakes(units, page):
    """Units of a page with mistakes -> {kind: numbers of the units that show it}, and how many
    mistakes no unit shows {kind: count}."""
    # a label shows its own mistake; two pieces of one label, as a pair, that it was split
    numbers = defaultdict(list)
    for table in ("label", "ignored"):
        for number, (n,) in enumerate(units.labels[table]):
            kind = page.kinds[n]
            numbers["piece" if kind == "split" else kind].append(number)
    for number, (i, j) in enumerate(units.labels["pair"]):
        if page.kinds[i] == page.kinds[j] == "split" and page.origins[i] == page.origins[j]:
            numbers["split"].append(number)
    lost = Counter(split=page.kinds.count("split") // 2 - len(numbers["split"]))

    # text on an outline whose label was dropped shows a missing label; the rest, kind "bare", was
    # left behind by labels that were moved
    text = units.outlines["text"]
    numbers["bare"] = [*range(len(text))]
    shared = shared_areas([outline for _, outline in page.bare], text, None)
    on = shared.shared * (shared.shared > shared.det / 2)
    for (kind, _), row in zip(page.bare, on):
        if kind != "missing":
            continue
        number = int(row.argmax()) if row.any() else None
        if number in numbers["bare"]:
            numbers["bare"].remove(number)
            numbers["missing"].append(number)
        else:
            lost["missing"] += 1
    return numbers, lost


class PageReading(NamedTuple):
    """What is kept of a page: what is judged on it, and how mistakes would look."""

    page: object
    scale: np.ndarray  # map px a page px, [2]
    features: dict  # {table: [N, F]} of the labels as they are
    labels: dict  # as in Units
    text: tuple  # outlines of text outside labels, see `pack`
    words: tuple  # outlines found, see `pack`
    parts: tuple  # the same at the threshold SURE
    examples: dict  # {kind: [N, F]} of mistakes
    lost: Counter  # mistakes that nothing shows, by kind
    habits: Counter


def pack(outlines):
    """Outlines N x [P, 2] as two arrays: those of thousands of pages take less memory so."""
    xy, sizes = join_vertices(outlines)
    return xy.astype(np.float32), sizes


def unpack(packed):
    xy, sizes = packed
    return split_outlines(xy.astype(float), sizes)


class Plan(NamedTuple):
    """Which mistakes are made, and how many."""

    kinds: tuple
    share: float  # of a page's labels
    rounds: int
    seed: int


def make_plan(pages, seed=0):
    """The Plan for labelled pages: about WANTED mistakes in all. Raises DataError."""
    count = sum(len(page.polygons) for page in pages)
    if len(pages) < 2 or not count:
        raise DataError("--audit", f"{len(pages)} pages with {count} labels", "give two or more")
    some_ignored = any(any(page.ignore) for page in pages)
    kinds = KINDS if some_ignored else KINDS[:-1]
    share = min(SHARE, WANTED / count)
    rounds = int(np.clip(np.ceil(WANTED / (share * count)), 1, MAX_ROUNDS))
    return Plan(kinds, share, rounds, seed)


def read_page(page, prob, hp, plan):
    """The PageReading of a labelled page with its map, uint8 [h, w]."""
    # the page with its own labels
    scale = np.array(prob.shape[::-1]) / page.size
    polygons = [polygon * scale for polygon in page.polygons]
    words, _ = look(prob, hp)
    parts, _ = look(prob, hp, SURE)
    sides = short_sides(polygons or words)
    height = max(np.median(sides), 1) if len(sides) else 1
    view = with_labels(View(prob, words, parts, [], height), polygons)
    units = page_units(view, page.ignore, hp)

    # copies with mistakes, of which only these are looked at
    examples = defaultdict(list)
    lost = Counter()
    for number in range(plan.rounds):
        rng = np.random.default_rng((plan.seed, zlib.crc32(page.name.encode()), number))
        count = int(plan.share * len(polygons) + rng.random())  # rounded up or down by chance
        size = prob.shape[::-1]
        copy = make_mistakes(rng, polygons, page.ignore, size, count, plan.kinds)
        view = with_labels(view, copy.polygons)
        wrong = [n for n, kind in enumerate(copy.kinds) if kind]
        bare = [outline for _, outline in copy.bare]
        theirs = page_units(view, copy.ignore, hp, wrong, bare)
        numbers, unseen = find_mistakes(theirs, copy)
        lost.update(unseen)
        for kind, some in numbers.items():
            examples[kind].append(theirs.features[TABLES[kind]][some])

    return PageReading(
        page,
        scale,
        features={table: rows.astype(np.float32) for table, rows in units.features.items()},
        labels=units.labels,
        text=pack(units.outlines["text"]),
        words=pack(words),
        parts=pack(parts),
        examples={kind: np.float32(np.concatenate(rows)) for kind, rows in examples.items()},
        lost=lost,
        habits=Counter(label_habits(polygons[:LOOKED_AT], np.ones(1)) if polygons else {}),
    )


# ---------------------------------------------------------------- probabilities


def page_scores(readings, kind, plain):
    """Log odds of a kind: of all units of its table, a list of [N] by page, and of the mistakes of
    this kind [K]. The trees that judge a page have learned from the pages of other folds: that
    mistakes are of the kind, and that units which are `plain` (flags [N] by page) are not."""
    table = TABLES[kind]
    others = [name for name in TABLES if TABLES[name] == table and name != kind]
    fold = np.arange(len(readings)) % FOLDS
    scores = [None] * len(readings)
    examples = []
    for k in sorted(set(fold.tolist())):
        # the other folds' units as they are, and their mistakes
        learned = np.flatnonzero(fold != k)
        teaching = [readings[n] for n in learned]
        flags = np.concatenate([plain[n] for n in learned])
        things = np.concatenate([reading.features[table] for reading in teaching])[flags]
        things = things[:: len(things) // MAX_LEARNED + 1]
        wrong = stack_examples(teaching, [kind], things)

        # without either there is nothing to learn
        model = None
        if len(wrong) and len(things):
            rest = np.concatenate([things, stack_examples(teaching, others, things)])
            is_kind = np.arange(len(wrong) + len(rest)) < len(wrong)
            model = fit_trees(np.concatenate([wrong, rest]), is_kind)

        # the pages of this fold
        for n in np.flatnonzero(fold == k):
            rows = readings[n].features[table]
            scores[n] = tree_scores(model, rows) if model else np.full(len(rows), -np.inf)
            if model:
                examples.append(tree_scores(model, stack_examples([readings[n]], [kind], rows)))
    return scores, np.concatenate([*examples, np.zeros(0)])


def stack_examples(readings, kinds, like):
    """Features of the mistakes of some kinds, as wide as those of `like`."""
    rows = [
        reading.examples[kind] for reading in readings for kind in kinds if kind in reading.examples
    ]
    return np.concatenate([np.zeros((0, like.shape[1])), *rows])


class Verdicts(NamedTuple):
    """What is thought of the units of all pages."""

    chances: dict  # {kind: probabilities of a page's units, page by page}
    scores: dict  # {kind: log odds, page by page}
    counts: dict  # {kind: about how many there are, page by page}


def judge(readings, kinds):
    """The Verdicts on all pages. The first trees of a kind take all units for right ones, though
    some are of that kind. So they are taught LESSONS times: each time as many units as seem to be
    of the kind, those with the highest scores, are left out of the next lesson."""
    verdicts = Verdicts({}, {}, {})
    count = sum(len(reading.page.polygons) for reading in readings)
    for kind in kinds:
        lost = sum(reading.lost[kind] for reading in readings)
        plain = [np.ones(len(reading.features[TABLES[kind]]), bool) for reading in readings]
        for _ in range(LESSONS):
            scores, examples = page_scores(readings, kind, plain)
            in_all = np.sort(np.concatenate(scores))[::-1]
            scale = make_scale(in_all, examples, lost, count)
            doubted = in_all[: round(scale.count)]
            if 2 * len(doubted) > len(in_all):
                break  # too few would be left
            plain = [some < doubted.min(initial=np.inf) for some in scores]
        verdicts.chances[kind] = [scale.probabilities(some) for some in scores]
        verdicts.scores[kind] = scores
        verdicts.counts[kind] = [scale.weight * some.sum() for some in verdicts.chances[kind]]
    return verdicts


# ---------------------------------------------------------------- suspects


class Suspect(NamedTuple):
    """A place on a page that a person would probably change. Outlines are in page px."""

    page: object
    kind: str  # of mistakes.KINDS
    labels: tuple  # indices of the page's labels
    points: np.ndarray
    proposals: list  # outlines of what should be there
    probability: float
    score: float  # log odds, which order equal probabilities

    def to_json(self):
        """As the file of suspects has it: an outline of many points may cross itself if it is
        rounded to fewer digits, and --doubt would refuse the file."""
        proposals = [np.round(outline, DECIMALS).tolist() for outline in self.proposals]
        entry = {
            "page": self.page.name,
            "digest": self.page.digest,
            "kind": self.kind,
            "label": self.page.ids[self.labels[0]] if self.labels else None,
            "points": np.round(self.points, DECIMALS).tolist(),
            "proposed": proposals[0] if len(proposals) == 1 else None,
            "probability": round(float(self.probability), 4),
        }
        if len(self.labels) > 1:
            entry["labels"] = [self.page.ids[n] for n in self.labels]
        if len(proposals) > 1:
            entry["parts"] = proposals
        return entry


def find_suspects(readings, verdicts):
    """Suspects of all pages, the most probable first, at most one a label."""
    suspects = []
    for n, reading in enumerate(readings):
        candidates = []
        for kind, chances in verdicts.chances.items():
            for number in np.flatnonzero(chances[n] >= LISTED).tolist():
                rank = chances[n][number], verdicts.scores[kind][n][number]
                candidates.append((*rank, kind, number))
        suspects += page_suspects(reading, sorted(candidates, reverse=True))
    return sorted(suspects, key=lambda s: (-s.probability, -s.score))


def page_suspects(reading, candidates):
    """Candidates (probability, log odds, kind, unit) of a page, the best first -> Suspects."""
    page = reading.page
    text, words, parts = (unpack(packed) for packed in (reading.text, reading.words, reading.parts))
    taken = set()  # labels of the suspects so far
    places = []  # outlines proposed so far
    suspects = []
    for chance, score, kind, number in candidates:
        labels = tuple(reading.labels[TABLES[kind]][number])
        if taken & {*labels}:
            continue
        if labels:
            outline = hull(*(page.polygons[n] * reading.scale for n in labels))
            # where all points lie on a line, the hull has one or two
            outline = np.resize(outline, (max(len(outline), 3), 2))
        else:
            outline = text[number]
        if kind == "missing" and covered(outline, places) > 0.5:
            continue  # text of a label that was moved from it
        proposals = propose(kind, outline, words, parts)
        taken.update(labels)
        places += proposals
        on_page = to_page([outline, *proposals], reading.scale, page.size)
        points = page.polygons[labels[0]] if len(labels) == 1 else on_page[0]
        suspects.append(Suspect(page, kind, labels, points, on_page[1:], chance, score))
    return suspects


def covered(outline, others):
    """Share of an outline that another one covers, at most."""
    areas = shared_areas([outline], others, None)
    return areas.shared.max(initial=0) / max(areas.gt[0], 1e-9)


def propose(kind, outline, words, parts):
    """Outlines of what should be where a suspect of a kind is."""
    if kind == "spurious":
        return []
    if kind in ("missing", "ignored"):
        return [outline]
    areas = shared_areas([outline], words, None)
    if kind != "joined":
        best = areas.shared[0].argmax() if areas.shared.any() else None
        return [outline] if best is None else [words[best]]
    for found in (words, parts):
        areas = shared_areas([outline], found, None)
        inside = [n for n, area in enumerate(areas.det) if areas.shared[0, n] > area / 2]
        if len(inside) > 1:
            return [found[n] for n in inside]
    return []


# ---------------------------------------------------------------- files


def labelme_files(suspects):
    """Pages with suspects as labelme's files: (name, text). Proposals are shapes of group 1 whose
    label begins with labels.PROPOSAL; renamed, they are words."""
    of_page = defaultdict(list)
    for suspect in suspects:
        of_page[suspect.page.name].append(suspect)
    for some in of_page.values():
        for name, text in to_labelme([some[0].page], "", ""):
            sheet = json.loads(text)
            for suspect in some:
                title = f"{PROPOSAL}{suspect.kind} {suspect.probability:.2f}"
                # a label begins where its text does, which may be turned
                for outline in [*map(from_top_left, suspect.proposals)] or [suspect.points]:
                    shape = {"label": title, "points": outline.tolist(), "group_id": 1}
                    sheet["shapes"].append(shape | {"shape_type": "polygon", "flags": {}})
            yield name, some[0].page, json.dumps(sheet, ensure_ascii=False)


def write_labelme(folder, suspects, other=""):
    """Write the pages with suspects, with labelme's files, to a new folder. Each page has a file of
    its own, and none of them is the file `other`, which is written afterwards. Raises UsageError
    where the folder holds something."""
    with data.new_folder(folder) as partial:
        for name, page, text in labelme_files(suspects):
            # two pages may ask for one name: x/1.jpg and y/1.jpg, or 1.jpg and 1.png
            is_taken = (partial / name).exists() or realpath(f"{folder}/{name}") == realpath(other)
            if is_taken:
                name = f"{page.name.replace('/', '_')}.json"
            replace_file(partial / name, text)
            data.place_picture(page.path, partial / page.name, False)


def crop(suspect, image):
    """The place of a suspect on its page's picture, with its outlines, as HTML."""
    # the part of the page around them: at least one pixel, since a label may lie outside the page
    points = np.concatenate([suspect.points, *suspect.proposals])
    margin = 1.5 * min(np.ptp(suspect.points, 0)) + 10
    last = np.array(image.shape[1::-1]) - 1
    low = (points.min(0) - margin).clip(0, last).astype(int)
    high = (points.max(0) + margin).clip(1).astype(int)
    left, top = low
    right, bottom = high
    part = image[top:bottom, left:right]
    zoom = 520 / max(*part.shape[:2], 1)
    part = resize(part, zoom, cv2.INTER_CUBIC)

    # its outlines
    for kind, outlines in (("label", [suspect.points]), ("found", suspect.proposals)):
        moved = [np.round(zoom * (outline - low)).astype(np.int32) for outline in outlines]
        cv2.polylines(part, moved, True, COLOURS[kind], 2, cv2.LINE_AA)
    return f'<img alt="" src="{embedded_picture(part)}">'


def figure(suspect, image):
    caption = f"{suspect.kind} {suspect.probability:.2f}, {suspect.page.name}"
    return f"<figure>{crop(suspect, image)}<figcaption>{html.escape(caption)}</figcaption></figure>"


def figures(suspects):
    """The first MAX_SHOWN suspects, A_PAGE to fold out at a time, as blocks of report.page."""
    shown = suspects[:MAX_SHOWN]
    pictures = [""] * len(shown)
    of_page = defaultdict(list)
    for number, suspect in enumerate(shown):
        of_page[suspect.page.name].append(number)
    for numbers in of_page.values():  # each picture is opened once
        image = read_image(shown[numbers[0]].page.path)
        for number in numbers:
            pictures[number] = figure(shown[number], image)
    for start in range(0, len(shown), A_PAGE):
        some = pictures[start : start + A_PAGE]
        title = f"<summary>{start + 1} to {start + len(some)}</summary>"
        is_open = "" if start else " open"
        yield "figure", "", f"<details{is_open}>{title}{''.join(some)}</details>"


# ---------------------------------------------------------------- what is found


class Summary(NamedTuple):
    about: str
    rows: list  # (kind, suspects above .5, about how many there are, low, high)
    habits: str

    def print(self):
        for kind, above, count, low, high in self.rows:
            print(
                f"{kind:9s}{above:6d} suspects above .5; about {count:.0f} [{low:.0f}, {high:.0f}]"
            )
        print(self.about)
        print(self.habits)


def summarise(readings, verdicts, suspects):
    """The Summary of an audit; intervals are 95 %, over pages or groups of them."""
    pages = [reading.page for reading in readings]
    groups = bootstrap_groups(pages)
    counts = np.stack([*verdicts.counts.values()], 1)  # [pages, kinds]
    counts = np.hstack([counts, counts.sum(1, keepdims=True)])
    intervals = bootstrap(counts, lambda sums: sums, groups).clip(0)
    above = Counter(suspect.kind for suspect in suspects if suspect.probability > 0.5)
    above["in all"] = above.total()
    rows = []
    for kind, count, ends in zip([*verdicts.counts, "in all"], counts.sum(0), intervals):
        rows.append((kind, above[kind], count, *ends))

    words = sum(len(page.polygons) for page in pages)
    about = f"{len(suspects)} suspects from {LISTED} on, of {words} labels on {len(pages)} pages;"
    about += f" intervals 95 %, over {count_sample(groups)}"
    habits = sum((reading.habits for reading in readings), Counter())
    total = habits.pop("labels", 0)
    usual = [f"{n} {kind}" for kind, n in habits.items() if n > 0.002 * total]
    line = f"habits: labels on {', '.join(usual) or 'nothing but words'}"
    return Summary(about, rows, f"{line}: what is usual here is not suspected")


def write_report(path, suspects, summary):
    """Write one HTML page with the counts of a Summary and crops of suspects."""
    header = ["kind", "suspects above .5", "about so many in all", "from", "to"]
    rows = [[kind, above, *(f"{x:.0f}" for x in rest)] for kind, above, *rest in summary.rows]
    blocks = [("#", "Suspects"), ("p", summary.about), ("table", header, rows)]
    blocks += [("p", summary.habits), ("p", "Labels blue, proposals green.")]
    replace_file(path, report.page("Suspects", [*blocks, *figures(suspects)]))


def write_audit(path, readings, kinds, folder):
    """Judge pages, write suspects to path (.json or .html) and, if a folder is given, pages with
    suspects for labelme; print what was found."""
    verdicts = judge(readings, kinds)
    suspects = find_suspects(readings, verdicts)
    summary = summarise(readings, verdicts, suspects)
    try:
        if folder:  # first: path may lie in this folder, which has to be empty before
            write_labelme(folder, suspects, path)
    finally:  # what was found after a long time is kept even if the folder cannot be written
        if path.endswith(".json"):
            write_json(path, [suspect.to_json() for suspect in suspects], indent=1)
        else:
            write_report(path, suspects, summary)
    summary.print()


# ---------------------------------------------------------------- training


def mask_doubt(pages, path, above, held=()):
    """Make suspects of a JSON file don't care on inspected pages, from the probability `above` on:
    labels in their place, and outlines of text that should be labelled. Returns how many suspects
    these are.

    A suspect belongs to the picture that its digest names: a val page, or a page of another set,
    may have the name of a train page. held: names of the pages of other folds. A file with suspects
    of these alone is not refused. Raises DataError."""
    entries = read_json(path)
    if not isinstance(entries, list):
        raise DataError(path, "not a list of suspects", "evaluate.py --audit writes one")
    named = defaultdict(list)  # sets may share a name
    for page in pages:
        named[page.name].append(page)

    count = elsewhere = 0
    for number, entry in enumerate(entries, 1):
        where = f"{path}: suspect {number}"
        probability = get(entry, "probability")
        if type(probability) not in (int, float):
            raise DataError(where, "no probability")
        if probability < above:
            continue

        # its train page, if it has one
        name = str(get(entry, "page"))
        elsewhere += name in held
        digest = get(entry, "digest")
        same = [page for page in named[name] if digest in (None, page.digest)]
        if not same:
            continue
        if len(same) > 1 or (name in held and not digest):
            raise DataError(where, f"several train pages are called {name}", "rename one")

        # labels of the place, and where text should be labelled
        page = same[0]
        outline = parse_polygon(get(entry, "points"), where)
        areas = shared_areas([outline], page.polygons, None)
        inside = areas.shared[0] > 0.9 * areas.det
        page.ignore = [bool(skip or doubt) for skip, doubt in zip(page.ignore, inside)]
        parts = get(entry, "parts") or [get(entry, "proposed")]
        if not isinstance(parts, list):
            raise DataError(where, "its parts are not a list of outlines")
        for k, points in enumerate(filter(None, parts)):
            page.add(f"doubt-{number}-{k}", parse_polygon(points, where), ignore=True)
        page.repaired = data.repair_words(page)
        count += 1
    if not count and not elsewhere:
        problem = f"no suspect of a train page has a probability of {above} or more"
        raise DataError(path, problem, "lower --doubt-above, or audit the train pages")
    return count
