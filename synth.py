"""What does an invented receipt look like? Synthetic pages with exact labels.

A till writes lines, a printer sets them on a sheet, and the sheet is worn, bent, laid on a ground
and photographed. `synthetic_page`, at the end, takes these steps in order."""

import itertools
import re
from typing import NamedTuple

import cv2
import numpy as np

from light import PHOTO, SCAN, Camera, draw_desk, draw_lid, multiply, photograph, smooth_field

# ---------------------------------------------------------------- what a till writes

# phrases by kind: "_" is a space, "#" a digit, "|" separates the cells of a line
LATIN = {
    "shop": """
        Sunny_Corner Green_Harbour Maple Golden_Olive Lucky_Star
        Fresh_Garden Moon_River 99
    """,
    "kind": """
        Ltd. Store Co. Bistro Cafe Sons_(M) Express Enterprise Mart
        Restaurant Trading
    """,
    "place": """
        1##,_Lake_Road ##,_Oak_Street,_#####_Ashford
        Lot_1##_&_2##,_Station_Road,_Easton Newton (######-K)
        GST_ID_No:_00######## Tel:_0#-###_####_Fax:_0#-###_####
    """,
    "meta": """
        Date|1#/0#/201# Time|1#:2#:4# Receipt|A###### Invoice_No.|000#####
        Cashier|Anna Table|## Till|POS-## Tel|0##-####### Member|##-####-#
        Served_by|Kumar Tax_ID|0#######
    """,
    "title": "Tax_Invoice Receipt Sales_Slip Cash_Bill",
    "heads": "Item|Qty|Price|Amount Description|No|U.Price|Total",
    "item": """
        Milk Bread Coffee Tea Rice Egg_Sandwich Apple Juice Chicken Soup
        Noodle Butter A4 Mint Paper Battery Soap 500ml 12pcs Large Hot Set
        Lemon Cake Fried_Fish Bolt 2kg w/ No.5 (R)
    """,
    "part": """
        Subtotal Tax_6% Discount Rounding_Adj Service_10% Net_Amount
        Total_(excl._Tax)
    """,
    "total": "TOTAL Total_Due AMOUNT_DUE Grand_Total TOTAL_(incl._tax)",
    "pay": """
        Cash Change Visa_Card Tendered Card_**#### Approval_###### Points
        Balance
    """,
    "foot": """
        THANK_YOU Please_come_again Goods_sold_are_not_returnable
        Have_a_nice_day! Call_us
    """,
}

HANGUL = {
    "shop": """
        햇살_초록 바다 행복_하늘 가온 소담 별빛_나무 우리 참좋은 큰길
        한빛_모퉁이
    """,
    "kind": """
        식당 마트 카페 분식 약국 문구 베이커리 상회 본점 (주) 편의점
        정육점
    """,
    "place": """
        서울시_강남구_중앙로_## 부산시_은행길_1## 성남시 대표:_김민준
        02-###-####
    """,
    "meta": """
        일시|202#-0#-1# 시간|1#:3#:5# 영수증_번호|A###### 계산원|이서연
        사업자|###-#####
    """,
    "title": "영수증 매출_전표 주문서 신용_승인",
    "heads": "상품명|수량|단가|금액",
    "item": """
        우유 식빵 커피 녹차 김밥 라면 비빔밥 된장_찌개 주스 비누 생수 소
        세트 1+1 500ml 아이스 매운
    """,
    "part": "소계 과세_물품가액 부가세 할인_금액 면세_금액 공급_가액 봉사료",
    "total": "합계 총_액 받을_금액",
    "pay": """
        현금 거스름돈 신용카드 받은_금액 카드_**#### 승인_###### 포인트
        잔액
    """,
    "foot": """
        감사합니다 또_오세요 교환_및_환불은_7일_이내
        영수증을_꼭_지참해_주세요
    """,
}


class Line(NamedTuple):
    """A line of a receipt. kind: "text", which is labelled; "rule", which only the receipt
    competition labels; "mark", a bar code without a label; or "gap". height: in text sizes. weight:
    of its letters, beyond the face's. cells: pairs (x, text), x in 0..1 of the line. A text begins
    at an x below 0.5, is centred on 0.5, and ends at an x above it."""

    kind: str
    height: float
    weight: int = 0
    cells: tuple = ()


class Till:
    """Writes a receipt of about `words` words to `lines`. A share `hangul` (0..1) of its phrases is
    in Hangul, the others in Latin script. spaced: the title's letters and the colons stand apart,
    and rules are double."""

    def __init__(self, rng, words, hangul, spaced=False):
        self.rng = rng
        self.words = words
        self.hangul = hangul
        self.large = words >= 40
        self.lines = []
        self.count = 0  # words written so far
        self.upper = rng.random() < 0.4
        self.spaced = spaced

        # the phrases of a kind come in a random order, over and over
        self.vocabularies = []
        for vocabulary in (LATIN, HANGUL):
            rounds = {}
            for kind, text in vocabulary.items():
                rounds[kind] = itertools.cycle(rng.permutation(text.split()))
            self.vocabularies.append(rounds)

        # how this shop sets out its receipts
        self.rule = rng.choice(["-", "-", "=", "*", "_", ".", "- "]) * 35
        self.colon = rng.choice([" : ", ": ", ":", " "])
        if spaced:
            self.rule = rng.choice(["=", "= "]) * 35
            self.colon = " : "
        self.head_x = rng.choice([0, 0.5, 0.5, 0.5])
        self.name_x = rng.choice([0, 0.65])
        self.columns = [0.58, 0.78] if rng.random() < 0.75 else [0.72]
        self.codes = self.large and rng.random() < 0.6

    def phrase(self, kind):
        """The next phrase of a kind, in either script."""
        vocabulary = self.vocabularies[int(self.rng.random() < self.hangul)]
        text = next(vocabulary[kind]).replace("_", " ")
        return re.sub("#", lambda _: str(self.rng.integers(10)), text)

    def money(self):
        value = self.rng.lognormal(2.5, 1.2)
        if self.hangul > 0.5:
            return f"{int(value) * 100:,}"
        return f"{value:,.2f}"

    def add(self, *cells, height=1.0, weight=0):
        """Write a line of text."""
        if self.upper:
            cells = [(x, text.upper()) for x, text in cells]
        self.lines.append(Line("text", height, weight, cells))
        self.count += sum(len(text.split()) for _, text in cells)

    def write_until(self, share, rule_chance, write):
        """Call `write` until a share of all words is written; then a rule, by chance, and a gap."""
        while self.count < share * self.words:
            write()

        if self.rng.random() < rule_chance:
            self.lines.append(Line("rule", 0.8, cells=[(0.5, self.rule)]))
        self.lines.append(Line("gap", max(0, self.rng.uniform(-2, 1))))

    def write_meta(self):
        """One or two fields, each a name and its value."""
        pairs = [self.phrase("meta").replace("|", self.colon) for _ in range(2)]
        two = self.large and self.rng.random() < 0.5
        self.add(*zip((0, 1), pairs if two else pairs[:1]))

    def write_item(self):
        """An article: its code, if the shop has codes, then name, count, unit price and price."""
        if self.codes:
            self.add((0, f"88{self.rng.integers(10**8)}"))

        parts = self.rng.integers(1, 4) if self.large else 1
        name = " ".join([self.phrase("item") for _ in range(parts)])
        count = str(int(self.rng.integers(1, 10) ** 0.7)) + self.rng.choice(["", "", "x"])
        middle = []
        if self.large:
            middle = zip(self.columns, (count, self.money()))
        self.add((0, name[:22].strip()), *middle, (1, self.money()))

    def write_sum(self, kind, **style):
        self.add((self.name_x, self.phrase(kind)), (1, self.money()), **style)

    def write(self):
        """The receipt from its shop to its bar code, as `lines`."""
        rng = self.rng

        # whose receipt it is
        shop = f"{self.phrase('shop')} {self.phrase('kind')}"
        self.add((self.head_x, shop), height=rng.uniform(1, 1.8), weight=rng.choice([0, 300]))
        self.write_until(0.16, 0.4, lambda: self.add((self.head_x, self.phrase("place"))))

        # what, when and by whom
        if self.large:
            title = self.phrase("title")
            if self.spaced:
                title = "   ".join(title.replace(" ", ""))
            self.add((self.head_x, title), height=rng.uniform(1, 1.5), weight=200)
        self.write_until(0.3, 0.8, self.write_meta)

        # the items
        if self.large and rng.random() < 0.8:
            first, *middle, last = self.phrase("heads").split("|")
            self.add((0, first), *zip(self.columns, middle), (1, last), weight=100)
        self.write_until(0.64, 0.8, self.write_item)

        # the sums
        self.write_until(0.76, 0.3, lambda: self.write_sum("part"))
        self.write_sum("total", height=rng.uniform(1, 1.7), weight=rng.choice([0, 300]))
        self.write_until(0.84, 0.6, lambda: self.write_sum("pay"))

        # a farewell
        self.write_until(0.95, 0.1, lambda: self.add((0.5, self.phrase("foot"))))
        if self.large and rng.random() < 0.25:
            bars = "".join(rng.choice(["|", "||", "| "], 35))
            self.lines.append(Line("mark", rng.uniform(1.5, 3), 400, [(0.5, bars)]))

        return self.lines


# ---------------------------------------------------------------- what a printer sets


class Word(NamedTuple):
    """A word and the rectangle around its ink, in pixels of a mask or of the sheet. low and high:
    [2] (x, y), its top left and bottom right corners."""

    text: str
    low: np.ndarray
    high: np.ndarray


def lay_ink(ink, mask, x, y):
    """Lay mask [h, w] over ink [H, W] with its top left at (x, y), x >= 0. What lies outside is
    clipped, and the darker of both stays."""
    mask = mask[max(-y, 0) :]
    under = ink[max(y, 0) :, x:][: mask.shape[0], : mask.shape[1]]
    np.maximum(under, mask[: under.shape[0], : under.shape[1]], out=under)


class Printer:
    """A type face as a till prints it, with letters at natural distances or spaced out. apart,
    space: what follows a letter, a word, in text sizes. dots: up to 1, the size at which a coarse
    face is set before it is magnified. stretch: the width of letters, 1 if natural."""

    def __init__(self, rng):
        self.face = cv2.FontFace(rng.choice(["sans", "uni", "italic"], p=[0.6, 0.35, 0.05]))
        self.apart = rng.choice([0, rng.uniform(0, 0.1)])
        self.space = rng.uniform(0.25, 0.4)
        self.dots = rng.choice([1, 1, 0.7, 0.55])
        self.stretch = 1.0
        self.weight = rng.choice([300, 400, 400, 500, 600])

    def set_text(self, text, size, weight):
        """Set a text at a `size` of whole pixels. Returns an ink mask [h, w] uint8 and its `Word`s,
        which reach at least from the height of a capital to the baseline."""
        baseline = int(1.25 * size) + 2
        mask = np.zeros((int(1.7 * size) + 4, 2 * size * (len(text) + 1)), np.uint8)
        words = []

        x = 2.0 + size // 8
        for part in re.findall(r"\S+\s*", text):
            word = part.strip()
            start = int(x) - 2
            for letter in word:
                cv2.putText(mask, letter, (round(x), baseline), 255, self.face, size, weight)
                advance = cv2.getTextSize((0, 0), letter, (0, 0), self.face, size, weight)[2]
                x += advance + self.apart * size

            ink = mask[:, start : int(x) + 3]
            ink = ink > min(60, ink.max() // 2)  # the thinnest print is pale
            left, top, width, height = cv2.boundingRect(np.uint8(ink))
            left += start
            low = np.array([left, min(top, baseline - 0.66 * size)])
            high = np.array([left + width, max(top + height, baseline)])
            words.append(Word(word, low, high))
            x += self.space * size * max(1, len(part) - len(word))

        return mask[:, : int(x)], words

    def place_cells(self, x, widths, width):
        """Places of cells in a line of `width` pixels, given their x [N] (0..1, see `Line`) and
        natural widths [N]. Returns their left ends [N] and the factor by which all of them are
        narrowed so that none touches the next."""
        anchors = x * width
        before = widths * (np.sign(x - 0.5) + 1) / 2  # what lies left of a cell's anchor

        # between neighbouring anchors: what there is and what is needed
        room = np.diff(anchors, prepend=0, append=width) + 1
        needed = np.append(before, 0) + np.append(0, widths - before)
        narrow = min(self.stretch, *(room / (needed + 1e-9)))

        return anchors - before * narrow, narrow

    def set_line(self, ink, line, size, left, y, width):
        """Set a line into ink [H, W] within `width`, its letters' top left at (left, y). Returns
        its `Word`s, padded."""
        if not line.cells:
            return []

        # coarse faces are set small and magnified by `scale`
        size = size * line.height
        small = max(7, round(size * min(1.0, max(self.dots, 14 / size))))
        scale = size / small
        x, texts = zip(*line.cells)
        masks = [self.set_text(text, small, self.weight + line.weight) for text in texts]

        widths = scale * np.array([mask.shape[1] for mask, _ in masks])
        starts, narrow = self.place_cells(np.array(x), widths, width)

        words = []
        pad = 0.09 * size
        top = round(y - (0.25 + 2 / small) * size)
        for (mask, unscaled), start in zip(masks, starts):
            if small < 0.9 * size:  # magnified: dots, not a blur
                mask = cv2.threshold(mask, 90, 255, cv2.THRESH_BINARY)[1]
            # tiny print keeps one pixel
            fy, fx = np.maximum((scale, scale * narrow), 1 / np.array(mask.shape))
            mask = cv2.resize(mask, None, fx=fx, fy=fy)
            origin = int(left + start), top
            lay_ink(ink, mask, *origin)

            for word, low, high in unscaled:
                low = low * scale * (narrow, 1) + origin - pad
                high = high * scale * (narrow, 1) + origin + pad
                words.append(Word(word, low, high))

        return words


# ---------------------------------------------------------------- the sheet


def draw_sheet(rng, lines, w, h, leading, labelled_kinds=("text",)):
    """Print lines on a sheet, `leading` text sizes apart. Returns the ink mask [h, w] uint8, a list
    of `Word`s in sheet pixels for each labelled line, and the text size at which the lines fill the
    sheet."""
    printer = Printer(rng)
    margin = rng.uniform(0.04, 0.09) * w
    width = w - 2 * margin

    # how long each line is; a Hangul syllable is as wide as two letters, and has two bytes
    lengths = []
    for line in lines:
        if line.kind == "text":
            letters = sum(len(text.encode("cp949")) + 1 for _, text in line.cells)
            lengths.append(line.height * letters)

    # as large as the height allows, then smaller or narrower, until four of five lines fit
    units = sum(line.height for line in lines) * leading + 1.6
    size = min(h / units, 0.11 * w)
    fit = width / ((0.55 + printer.apart) * size * np.percentile(lengths, 80))
    size *= min(1, fit / 0.66)
    printer.stretch = np.clip(fit, 0.66, 1)

    ink = np.zeros((h, w), np.uint8)
    labelled = []
    y = 0.8 * size + max(0, h - size * units) * rng.uniform(0.1, 0.5)
    for line in lines:
        words = printer.set_line(ink, line, size, margin, y, width)
        if line.kind in labelled_kinds:
            labelled.append(words)
        y += line.height * size * leading

    return ink, labelled, size


def wear_ink(rng, ink, size, level):
    """Ink mask [h, w] uint8 of text size `size` -> ink mask that is faded and broken into the dots
    of a print head. level: 0..1, as difficulty in `synthetic_page`, here and below."""
    h, w = ink.shape

    # some large patches, and dots of the print head
    patches = rng.integers(2, 8)
    faded = 3.5 * smooth_field(rng, h, w, patches) - 2
    dots = int(max(h, w) / max(size * 0.09, 1.6))
    grain = 3.5 * smooth_field(rng, h, w, dots) - 2

    # how much ink they take away; on many sheets none
    fading = rng.uniform(-0.7, 1)
    breaking = rng.uniform(-1, 1)
    gone = np.maximum(faded.clip(0, 1) * fading, 0)
    gone += np.maximum(grain.clip(0, 1) * breaking, 0)
    return cv2.multiply(ink, np.maximum(1 - level * gone, 0.3), dtype=cv2.CV_8U)


def draw_paper(rng, ink, folds, level):
    """Ink mask [h, w] uint8 -> sheet [h, w, 3] uint8 in two colours, with grain and with a crease
    at each fold, see `View`."""
    h, w = ink.shape

    # paper is greyish and yellowish, and one print in four bluish
    grey = rng.uniform(0, 22)
    yellow = rng.uniform(0, 12)
    white = 250 - grey - yellow * np.array([0, 0.5, 2])
    dark = rng.uniform(5, 80)
    blue = rng.uniform(0, 40)
    if rng.random() >= 0.25:
        blue = 0
    black = dark + blue * np.array([0, 0, 1])
    colours = np.uint8(np.linspace(white, black, 256))  # by amount of ink

    # one side of a fold lies in the light and the other in the shade; its edge may be worn
    light = 1 + (smooth_field(rng, h, w, 50) - 0.5) * 0.04 * level
    for at, _ in folds:
        d = np.linspace(-at, 1 - at, h, dtype=np.float32)[:, None]
        bright = rng.choice([-1, 1])
        near = np.exp(-np.abs(d) / 0.1)
        sides = np.sign(d) * near * 0.09 * bright
        edge = np.exp(-((d / 0.003) ** 2)) * rng.uniform(-0.2, 0.1)
        light *= 1 + level * (sides + edge)

    sheet = cv2.LUT(cv2.merge([ink, ink, ink]), colours[None])
    return multiply(sheet, light)


# ---------------------------------------------------------------- from sheet to page


SQUARE = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])  # clockwise from the top left


def sheet_corners(rng, h, w, ratio, camera, level):
    """Corners [4, 2] of a sheet of width / height `ratio`, turned and in perspective, in pixels of
    a page [h, w]."""
    turn = np.deg2rad(rng.normal(0, camera.turn * level))
    cos, sin = np.cos(turn), np.sin(turn)
    rotation = np.array([[cos, sin], [-sin, cos]])
    upright = (SQUARE - 0.5) * (ratio, 1)
    corners = upright @ rotation
    slips = rng.uniform(-1, 1, (4, 2))
    corners += slips * camera.tilt * level

    # about as large as the page allows, near its middle
    corners -= corners.min(0)
    span = np.ptp(corners, 0)
    scale = rng.uniform(*camera.fill) * min(w / span[0], h / span[1])
    room = (w, h) - span * scale
    return corners * scale + room * rng.uniform(0.3, 0.7, 2)


class View(NamedTuple):
    """How a sheet of w x h pixels is seen on a page: bent within a plane, then in perspective.
    waves: [2, 3], amplitude in pixels, frequency and phase of the bends in x and in y. folds: pairs
    of a height (0..1) and the kinks [2] in x and in y, in pixels. matrix: [3, 3], the homography
    from the plane to page pixels."""

    w: int
    h: int
    waves: np.ndarray
    folds: list
    matrix: np.ndarray


def draw_bends(rng, size, level):
    """Random waves and folds, see `View`, of a sheet with text size `size`."""
    waves = rng.uniform((0, 2, 0), 6, (2, 3))
    waves[:, 0] = rng.normal(0, 0.15, 2) * size * level

    count = rng.integers(1, 4)
    if rng.random() >= 0.1 + 0.5 * level:
        count = 0
    folds = []
    for _ in range(count):
        folds.append((rng.uniform(0.15, 0.85), rng.normal(0, 0.5 * size * level, 2)))

    return waves, folds


def displacement(q, view):
    """What is added to a point q [..., 2] of the plane to reach the point u of the sheet that lies
    there. Its slope stays well below 1, so that q follows from u by iteration."""
    y_x = q[..., ::-1] / (view.h, view.w)  # the sheet waves in x as y grows, in y as x grows
    amplitude, frequency, phase = view.waves.T
    moves = amplitude * np.sin(frequency * y_x + phase)
    return moves + sum(kinks * np.abs(y_x[..., :1] - at) for at, kinks in view.folds)


def sheet_to_page(points, view):
    """Points [N, P, 2] on the sheet -> [N, P, 2] on the page."""
    q = points
    for _ in range(30):
        q = points - displacement(q, view)
    return cv2.perspectiveTransform(q, view.matrix)


def page_to_sheet(view, page_h, page_w, step=8):
    """Sheet x and y under the page's pixels, two float32 [page_h, page_w]: exact at every `step`
    pixels, linear between."""
    rows = page_h // step + 3
    cols = page_w // step + 3
    grid = (np.indices((cols, rows)).T - 0.5) * step  # [rows, cols, 2]

    q = cv2.perspectiveTransform(grid, np.linalg.inv(view.matrix))
    u = np.float32(q + displacement(q, view))
    u = cv2.resize(u, (cols * step, rows * step))
    return cv2.split(u[step : step + page_h, step : step + page_w])


# ---------------------------------------------------------------- labels


def join_words(words):
    """Words of a line -> one `Word` for every run of words whose gaps are at most 0.7 of their
    height."""
    first, *others = sorted(words, key=lambda word: word.low[0])
    runs = [first]
    for word in others:
        text, low, high = runs[-1]
        if word.low[0] - high[0] > 0.7 * (word.high - word.low)[1]:
            runs.append(word)
        else:
            runs[-1] = Word(
                f"{text} {word.text}",
                np.minimum(low, word.low),
                np.maximum(high, word.high),
            )
    return runs


def tighten(word, ink):
    """A `Word` that reaches from the highest to the lowest of its ink on the sheet [h, w]; as it is
    where it is too small to have any."""
    (left, top), (right, bottom) = np.int32((word.low, word.high))
    darkness = ink[top:bottom, left:right].max(1, initial=0)
    if not darkness.any():
        return word
    rows = top + np.flatnonzero(darkness >= darkness.max() / 2)
    low = np.array([left, rows[0] - 1])
    high = np.array([right, rows[-1] + 2])
    return Word(word.text, low, high)


def label_rule(words, ink):
    """A double rule, printed as `Word`s -> the two lines of each run of it, long and thin."""
    labels = []
    for run in join_words(words):
        text, low, high = tighten(run, ink)
        thickness = (high - low) * (0, 0.4)
        across = (high - low) * (1, 0)
        labels.append(Word(text, low, low + across + thickness))
        labels.append(Word(text, high - across - thickness, high))
    return labels


def black_out(words, ink):
    for _, low, high in words:
        (left, top), (right, bottom) = np.int32((low, high))
        ink[top:bottom, left:right] = 255


def shine_through(ink, size):
    """Lay the last lines again on the ink [h, w] of a text size, below all print, mirrored and
    pale, as if they shone through from the back. Returns their one `Word`, or none where they have
    no room."""
    top = np.flatnonzero(ink.max(1))[-1] + int(size)
    room = len(ink) - top - int(size)
    if room < 2 * size:
        return []

    back = ink[top - room : top, ::-1] // 4
    lay_ink(ink, back, 0, top)
    left, y, width, height = cv2.boundingRect(np.uint8(back > 15))
    low = np.array([left, top + y])
    return [Word(None, low, low + (width, height))]


def label_as_competition(rng, ink, lines, size):
    """Lists of `Word`s as the receipt competition labels printed lines of a text size. Rules have
    two labels, and colons are as high as their dots. Print of the back that shines through is one
    label, and a few lines are blacked out and have none: both are drawn on the ink [h, w]."""
    labels = [shine_through(ink, size)]
    hidden = rng.integers(len(lines), size=rng.integers(4))
    for number, words in enumerate(lines):
        if not words[0].text.strip("="):
            labels.append(label_rule(words, ink))
        elif number in hidden:
            black_out(words, ink)
        else:
            labels.append([tighten(word, ink) if word.text == ":" else word for word in words])
    return labels


def rectangles(low, high):
    """Top left and bottom right corners, [N, 2] each -> upright quads [N, 4, 2]."""
    return np.where(SQUARE, high[:, None], low[:, None])


def place_labels(rng, lines, unit, view):
    """Labels on the page for the words of each line on the sheet: dicts of points [4, 2] and the
    transcription, a quad for each word, or an upright rectangle for each run of words."""
    if unit == "line":
        lines = [join_words(words) for words in lines]
    texts, low, high = zip(*itertools.chain(*lines))

    quads = sheet_to_page(rectangles(np.array(low), np.array(high)), view)

    # people draw upright rectangles, a little loose: each side by a share of the height
    if unit == "line":
        low, high = quads.min(1), quads.max(1)  # [N, 2]
        height = (high - low)[:, 1:]
        least = -0.06, -0.06, -0.05, -0.05  # left, top, right, bottom
        most = 0, 0, 0.05, 0.05
        slips = rng.uniform(least, most, (len(quads), 4))
        slips *= height
        quads = rectangles(low + slips[:, :2], high + slips[:, 2:])

    return [{"points": quad, "transcription": text} for quad, text in zip(quads, texts)]


# ---------------------------------------------------------------- the page


class Plan(NamedTuple):
    """What a page will be. hangul: share of its phrases (0..1). aspect: width / height of the page.
    leading: distance between lines, in text sizes."""

    camera: Camera
    hangul: float
    words: float
    aspect: float
    leading: float


def plan_page(rng, words, unit):
    """A random `Plan` of about `words` words."""
    photo = rng.random() < 0.5
    hangul = rng.choice([0, 0, 0.12, 0.9])
    if photo and rng.random() < 0.75:
        aspect = rng.uniform(0.7, 0.8)
    else:
        aspect = rng.uniform(0.45, 0.85)
    leading = rng.uniform(1.08, 1.3)

    if unit == "competition":
        photo = True
        hangul = rng.choice([0, 0.12, 0.9])

    if unit == "line":  # mostly narrow scans, as in SROIE
        photo = rng.random() < 0.05
        words *= rng.uniform(0.6, 1.2)
        aspect = np.clip(rng.normal(0.51, 0.08), 0.36, 0.75)
        leading = rng.uniform(1.15, 1.6)

    return Plan(PHOTO if photo else SCAN, hangul, words, aspect, leading)


def synthetic_page(seed, size=1280, words=117, unit="word", difficulty=0.5):
    """Draw a page [H, W, 3] uint8 RGB of about `words` words, its longer side `size` pixels, and
    return it with its labels: dicts of points [4, 2] float64 in page pixels (x, y), clockwise from
    the text's top left, and of the transcription. Pixel (i, j) covers [i, i+1) x [j, j+1).

    seed: int or ints. unit: "word" draws photographs and scans with a quad for each word; "line"
    mostly narrow grey scans with an upright rectangle for each run of words up to a wide gap, the
    convention of SROIE; "competition" photographs with the labels of `label_as_competition`, a quad
    each. difficulty: 0..1, scales wear, warp, light, blur and noise."""
    rng = np.random.default_rng(seed)
    plan = plan_page(rng, words, unit)
    camera = plan.camera
    shape = size, round(size * plan.aspect)

    # where the sheet lies; its own pixels are about as large as the page's
    ratio = plan.aspect
    if camera is PHOTO:
        ratio *= rng.uniform(0.72, 1)
    level = difficulty * 0.4 if unit == "line" else difficulty
    corners = sheet_corners(rng, *shape, ratio, camera, level)
    edges = np.linalg.norm(corners - np.roll(corners, -1, 0), axis=1)
    w = int(edges[::2].mean())
    h = int(edges[1::2].mean())

    # what is printed on it
    above = rng.uniform(0, 5)
    if unit != "line":
        above = 0
    spaced = unit == "competition"
    lines = [Line("gap", above), *Till(rng, plan.words, plan.hangul, spaced).write()]
    if spaced:
        lines.append(Line("gap", max(0, rng.uniform(-6, 8))))
    kinds = ("text", "rule") if spaced else ("text",)
    ink, printed, text_size = draw_sheet(rng, lines, w, h, plan.leading, kinds)
    if spaced:
        printed = label_as_competition(rng, ink, printed, text_size)

    # how it is bent, worn and seen
    waves, folds = draw_bends(rng, text_size, difficulty)
    ink = wear_ink(rng, ink, text_size, difficulty)
    sheet = draw_paper(rng, ink, folds, difficulty)
    matrix = cv2.getPerspectiveTransform(np.float32(SQUARE * (w, h)), np.float32(corners))
    view = View(w, h, waves, folds, matrix)

    # the picture of it
    draw_ground = draw_desk if camera is PHOTO else draw_lid
    page = draw_ground(rng, *shape)
    x, y = page_to_sheet(view, *shape)
    cv2.remap(sheet, x - 0.5, y - 0.5, cv2.INTER_LINEAR, page, cv2.BORDER_TRANSPARENT)
    page = photograph(rng, page, text_size, camera, difficulty)

    return page, place_labels(rng, printed, unit, view)
