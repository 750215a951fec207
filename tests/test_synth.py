import itertools

import cv2
import numpy as np
import pytest

import synth
from synth import Line, Word, synthetic_page

PAGES = [synthetic_page((9, i)) for i in range(10)]
SMALL = [synthetic_page((9, i), size=320, words=18) for i in range(16)]


def sizes(labels):
    """Mean width and height [N, 2] of the labels' quads."""
    quads = np.array([label["points"] for label in labels])
    sides = np.linalg.norm(quads - np.roll(quads, -1, 1), axis=2)  # [N, 4]
    return np.stack([sides[:, ::2].mean(1), sides[:, 1::2].mean(1)], 1)


@pytest.mark.parametrize("unit", ["word", "line", "competition"])
@pytest.mark.parametrize(("size", "words"), [(32, 1), (32, 300), (96, 117), (256, 300)])
def test_print_may_be_too_small_to_read(unit, size, words):
    """check says so of such pages; they are drawn all the same."""
    for seed in range(3):
        image, labelled = synthetic_page((seed, 0), size=size, words=words, unit=unit)
        assert max(image.shape) == size and labelled


def test_same_seed_same_page_whatever_the_threads():
    threads, drawn = cv2.getNumThreads(), []
    for count in (1, 4):
        cv2.setNumThreads(count)
        drawn.append([synthetic_page((3, i), 640, 50) for i in range(2)])
    cv2.setNumThreads(threads)
    for (image, labels), (other, again) in zip(*drawn):
        assert np.array_equal(image, other) and str(labels) == str(again)
    assert str(drawn[0][0][1]) != str(drawn[0][1][1])


def test_lines_are_upright_rectangles_cut_at_wide_gaps():
    pages = [synthetic_page((5, i), unit="line") for i in range(8)]
    shapes, texts = [], []
    for image, labels in pages:
        quads = np.array([label["points"] for label in labels])
        low, high = quads.min(1), quads.max(1)
        box = np.concatenate([low, high], 1)[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
        assert np.array_equal(quads, box)
        shapes += ((high - low)[:, 0] / (high - low)[:, 1]).tolist()
        texts += [label["transcription"] for label in labels]
        height, y = np.median(high - low, 0)[1], (low + high)[:, 1] / 2
        for k in range(len(quads)):  # neighbours on a line are a wide gap apart
            beside = (abs(y - y[k]) < 0.2 * height) & (low[:, 0] > low[k, 0])
            assert not beside.any() or (low[beside, 0] - high[k, 0]).min() > 0.25 * height
    assert 0.3 < np.mean([" " in text for text in texts]) < 0.6
    assert 3.2 < np.median(shapes) < 5.2 and 38 <= np.median([len(page[1]) for page in pages]) <= 62
    assert not any(set(text) <= set("-=*_. ") for text in texts)
    assert 0.44 <= np.median([image.shape[1] / image.shape[0] for image, _ in pages]) <= 0.6


def test_a_line_is_cut_where_the_gap_is_wide():
    total = Word("TOTAL", np.array([0, 2]), np.array([50, 20]))
    price = Word("12.00", np.array([120, 0]), np.array([170, 20]))
    due = Word("DUE", np.array([58, 0]), np.array([90, 22]))
    runs = synth.join_words([total, price, due])
    assert [(text, *low, *high) for text, low, high in runs] == [
        ("TOTAL DUE", 0, 0, 90, 22),
        ("12.00", 120, 0, 170, 20),
    ]


def test_words_as_stated():
    for pages, least, most in ((PAGES, 105, 129), (SMALL, 15, 24)):
        counts = [len(labels) for _, labels in pages]
        assert least <= min(counts) and max(counts) <= most
    width, height = np.median(np.concatenate([sizes(labels) for _, labels in PAGES]), 0)
    assert 64 <= width <= 90 and 20 <= height <= 28
    assert min(np.median(sizes(labels)[:, 1]) for _, labels in SMALL) >= 11
    texts = [label["transcription"] for _, labels in PAGES + SMALL for label in labels]
    hangul = np.mean([any("가" <= c <= "힣" for c in text) for text in texts])
    latin = np.mean([any("A" <= c.upper() <= "Z" for c in text) for text in texts])
    assert hangul > 0.05 and latin > 0.3
    for i in (4, 5):  # print of a few pixels, pale
        synthetic_page((5, i), size=96, words=4)
    assert all(text and len(text.split()) == 1 and text == text.strip() for text in texts)


def test_shape_and_words_inside():
    for size, (image, labels) in [(1280, page) for page in PAGES] + [(320, page) for page in SMALL]:
        h, w = image.shape[:2]
        assert image.dtype == np.uint8 and image.shape[2] == 3 and h == size
        assert 0.44 <= w / h <= 0.86
        quads = np.array([label["points"] for label in labels])
        assert quads.min() >= 0 and (quads <= (w, h)).all()
        assert all(cv2.contourArea(np.float32(q), oriented=True) > 0 for q in quads)


def test_every_glyph_is_in_the_font():
    """A glyph that the font lacks is drawn as a question mark."""
    texts = [*synth.LATIN.values(), *synth.HANGUL.values()]
    chars = sorted(set("".join(texts)) - set(" _=?#|\n"))
    for name in ("sans", "uni", "italic"):
        drawn = [np.zeros((40, 60), np.uint8) for _ in range(len(chars) + 1)]
        for canvas, c in zip(drawn, ["?"] + chars):
            cv2.putText(canvas, c, (4, 30), 255, cv2.FontFace(name), 28, 400)
        assert not any(np.array_equal(drawn[0], canvas) for canvas in drawn[1:])


@pytest.mark.parametrize("x", [0, 13, 35])
@pytest.mark.parametrize("y", [-4, 0, 25])
def test_ink_is_laid_within_the_sheet_and_the_darker_stays(x, y):
    rng = np.random.default_rng(0)
    ink, mask = rng.integers(0, 256, (30, 40)), rng.integers(0, 256, (9, 12))
    wide = np.zeros((60, 80), int)
    wide[10:40, 10:50] = ink
    part = wide[10 + y : 19 + y, 10 + x : 22 + x]
    np.maximum(part, mask, out=part)
    synth.lay_ink(ink, mask, x, y)
    assert np.array_equal(ink, wide[10:40, 10:50])


def test_cells_keep_their_places_and_narrow_where_they_would_touch():
    printer = synth.Printer(np.random.default_rng(0))
    x, widths = np.array([0, 0.5, 1]), np.array([100, 80, 60])
    left, narrow = printer.place_cells(x, widths, 400)
    assert narrow == 1 and left.tolist() == [0, 160, 340]
    left, narrow = printer.place_cells(x, 2 * widths, 400)
    assert narrow == pytest.approx(201 / 280)
    right = left + 2 * widths * narrow
    assert left[0] == 0 and right[2] == 400 and right[1] - 200 == pytest.approx(200 - left[1])
    assert right[0] - 1 <= left[1] and right[1] - 1 <= left[2]


def test_boxes_hold_all_ink_and_fit_it():
    for seed in range(4):
        rng = np.random.default_rng(seed)
        lines = synth.Till(rng, 117, 0.5 * (seed % 2)).write()
        lines = [line for line in lines if line.kind in ("text", "gap")]
        ink, runs, _ = synth.draw_sheet(rng, lines, 800, 1200, 1.2)
        left = ink.copy()
        for _, (x0, y0), (x1, y1) in [word for words in runs for word in words]:
            rows = slice(int(np.floor(y0)), int(np.ceil(y1)))
            cols = slice(int(np.floor(x0)), int(np.ceil(x1)))
            columns = np.flatnonzero((ink[rows, cols] > 60).any(0))
            slack = 0.2 * (y1 - y0) + 3
            assert len(columns) and columns[0] <= slack and columns[-1] >= x1 - x0 - slack
            left[rows, cols] = 0
        assert (left > 60).sum() <= 1e-3 * (ink > 60).sum()


def test_blocks_and_separators_carry_no_label():
    lines = [Line("mark", 3, 400, [(0.5, "| || |" * 6)])]
    lines += [Line("mark", 1, 0, [(0.5, 30 * char)]) for char in ("-", "=", "*", "_", ".", "- ")]
    lines.insert(1, Line("text", 1, 0, [(0, "Milk"), (1, "2.50")]))
    ink, runs, _ = synth.draw_sheet(np.random.default_rng(1), lines, 800, 1200, 1.2)
    assert [[word.text for word in words] for words in runs] == [["Milk", "2.50"]]
    y0, y1 = runs[0][0].low[1], runs[0][0].high[1]
    assert (ink[: int(y0)] > 0).sum() > 1000 and (ink[int(y1) + 1 :] > 0).any(1).sum() >= 6


def test_quads_follow_perspective_curl_and_folds():
    """Word boxes filled with ink and warped like a page: each word's ink must have the area and the
    centre of its quad; an offset of half a pixel would show. Folds within a word bow its sides."""
    page_h, page_w, w, h = 1000, 760, 620, 900
    square = np.float32([[0, 0], [w, 0], [w, h], [0, h]])
    words, sheet = [], np.zeros((h, w), np.float32)
    for x in range(20, 540, 90):
        for y in range(20, 860, 60):
            words.append(Word("x", np.array([x, y]), np.array([x + 70, y + 26])))
            sheet[y : y + 26, x : x + 70] = 1
    for seed in range(6):
        rng = np.random.default_rng(seed)
        corners = np.float32(synth.sheet_corners(rng, page_h, page_w, w / h, synth.PHOTO, 1.0))
        matrix = cv2.getPerspectiveTransform(square, corners)
        view = synth.View(w, h, *synth.draw_bends(rng, 25, 1.0), matrix)
        x, y = synth.page_to_sheet(view, page_h, page_w)
        page, offsets = cv2.remap(sheet, x - 0.5, y - 0.5, cv2.INTER_LINEAR), []
        for label in synth.place_labels(None, [words], "word", view):
            quad = label["points"]
            (x0, y0), (x1, y1) = np.int32(quad.min(0)) - 3, np.int32(quad.max(0)) + 4
            ink, exact = cv2.moments(page[y0:y1, x0:x1]), cv2.moments(np.float32(quad - (x0, y0)))
            assert ink["m00"] == pytest.approx(exact["m00"], rel=0.02)
            centres = [[m["m10"] / m["m00"], m["m01"] / m["m00"]] for m in (ink, exact)]
            offsets.append(np.subtract(*centres) + 0.5)  # moments count from pixel centres
        assert np.abs(offsets).max() < 0.35
        assert np.abs(np.mean(offsets, 0)).max() < 0.1


def test_words_are_darker_than_the_sheet_around_them():
    for image, labels in PAGES[:5] + SMALL[:8]:
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        for label in labels:
            mask = np.zeros(grey.shape, np.uint8)
            cv2.fillPoly(mask, [np.int32(np.round((label["points"] - 0.5) * 256))], 1, shift=8)
            assert np.ptp(np.percentile(grey[mask > 0], (2, 90))) > 12


# ---------------------------------------------------------------- the habit of the competition

COMPETITION = [synthetic_page((5, i), unit="competition") for i in range(8)]


def test_a_competitions_page_has_its_labels_on_an_upright_photograph():
    counts = [len(labels) for _, labels in COMPETITION]
    assert 95 <= min(counts) and max(counts) <= 135 and 100 <= np.median(counts) <= 130
    for image, labels in COMPETITION:
        h, w = image.shape[:2]
        quads = np.array([label["points"] for label in labels])
        assert quads.min() >= 0 and (quads <= (w, h)).all()
        tops = quads[:, 1] - quads[:, 0]
        assert np.abs(np.degrees(np.arctan2(*tops.T[::-1]))).max() < 15
    texts = "".join(label["transcription"] or "" for _, labels in COMPETITION for label in labels)
    assert any("가" <= c <= "힣" for c in texts) and any("a" <= c.lower() <= "z" for c in texts)


def test_a_competitions_rules_are_two_long_boxes_each_and_its_colons_are_low():
    for _, labels in COMPETITION:
        height = np.median(sizes(labels)[:, 1])
        rules = [label for label in labels if not (label["transcription"] or "x").strip("= ")]
        width, thickness = sizes(rules).T
        assert len(rules) % 2 == 0 and (width > 12 * thickness).all()
        assert (thickness < 0.6 * height).all()
        for upper, lower in zip(rules[::2], rules[1::2]):  # one above the other, apart
            assert np.allclose((lower["points"] - upper["points"])[:, 0], 0, atol=height / 2)
            assert (lower["points"][:2, 1] > upper["points"][2:, 1][::-1] - 1).all()
    labels = [label for _, page in COMPETITION for label in page]
    colons = sizes([label for label in labels if label["transcription"] == ":"])
    assert len(colons) >= 8
    assert np.median(colons[:, 1]) < 0.8 * np.median(sizes(labels)[:, 1])


def test_letters_of_a_competitions_title_are_labels_at_equal_gaps():
    till = synth.Till(np.random.default_rng(3), 117, 0, spaced=True)
    title = next(line for line in till.write() if line.weight == 200)
    printer = synth.Printer(np.random.default_rng(3))
    _, words = printer.set_text(title.cells[0][1], 20, 400)
    assert len(words) >= 6 and all(len(word.text) == 1 for word in words)
    gaps = [b.low[0] - a.high[0] for a, b in itertools.pairwise(words)]
    assert min(gaps) > 10 and max(gaps) < 2 * min(gaps)


def test_what_is_blacked_out_has_no_label_and_print_of_the_back_has_one():
    lines = [Line("text", 1, 0, [(0, f"Milk{n}"), (1, f"{n}.50")]) for n in range(12)]
    lines.append(Line("gap", 8))
    hidden = shone = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        before, words, size = synth.draw_sheet(rng, lines, 800, 1200, 1.2)
        ink = before.copy()
        labels = synth.label_as_competition(rng, ink, words, size)
        texts = [word.text for line in labels for word in line]
        gone = [word for line in words for word in line if word.text not in texts]
        hidden += bool(gone)
        for _, (x0, y0), (x1, y1) in gone:
            assert (ink[int(y0) + 1 : int(y1) - 1, int(x0) + 1 : int(x1) - 1] == 255).all()

        back = [word for line in labels for word in line if word.text is None]
        shone += len(back)
        for _, (x0, y0), (x1, y1) in back:
            inside = np.zeros_like(ink, bool)
            inside[int(y0) - 3 : int(y1) + 3, max(0, int(x0) - 3) : int(x1) + 3] = True
            new = ink != before
            assert new[inside].any() and y0 > max(w.high[1] for line in words for w in line)
            assert ink[inside].max() < 128  # pale
            assert not (new & ~inside)[int(y0) :].any()
    assert hidden >= 3 and shone >= 8
