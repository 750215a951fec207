"""What does an invented receipt look like? Synthetic pages with exact labels: a till writes lines,
a printer sets them on a sheet, which is worn, bent, laid on a ground and photographed."""

import itertools
from statistics import NormalDist

import cv2
import numpy as np

# quantiles of the normal distribution: random bytes become noise by one table look-up
NORMAL = np.array([NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)])


def add_noise(image, seed, sigma):
    table = np.round(NORMAL * sigma).clip(-127, 127).astype(np.int8)
    noise = np.frombuffer(np.random.default_rng(seed).bytes(image.size), np.uint8)
    return cv2.add(image, cv2.LUT(noise.reshape(image.shape), table), dtype=cv2.CV_8U)


def smooth_field(seed, height, width, cells=4):
    """Random smooth field [height, width] float32 within 0..1."""
    coarse = np.random.default_rng(seed).random((cells, cells), np.float32)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 1)


def multiply(image, factor):
    """uint8 [H, W, 3] times factor [H, W], rounded."""
    return cv2.multiply(image, cv2.merge([np.float32(factor)] * 3), dtype=cv2.CV_8U)


def shade(image, seed, depth):
    """Darken one side of a random straight line with a soft edge by up to `depth`."""
    rng = np.random.default_rng(seed)
    angle, offset, softness = rng.uniform((0, -0.3, 0.02), (2 * np.pi, 0.3, 0.3))
    y, x = (np.arange(n, dtype=np.float32) / n - 0.5 for n in image.shape[:2])
    side = (x * np.cos(angle) + (y * np.sin(angle))[:, None] - offset) / softness
    return multiply(image, 1 - depth * (side.clip(-1, 1, out=side) + 1) / 2)


# What receipts say: "_" is a space, "#" a digit, "|" parts a line's cells
LATIN = {
    "shop": "Sunny_Corner Green_Harbour Maple Golden_Olive Lucky_Star Fresh_Garden Moon_River 99",
    "kind": "Ltd. Store Co. Bistro Cafe Sons_(M) Express Enterprise Mart Restaurant Trading",
    "place": """1##,_Lake_Road ##,_Oak_Street,_#####_Ashford Lot_1##_&_2##,_Station_Road,_Easton
        Newton (######-K) GST_ID_No:_00######## Tel:_0#-###_####_Fax:_0#-###_####""",
    "meta": """Date|1#/0#/201# Time|1#:2#:4# Receipt|A###### Invoice_No.|000##### Cashier|Anna
        Table|## Till|POS-## Tel|0##-####### Member|##-####-# Served_by|Kumar Tax_ID|0#######""",
    "title": "Tax_Invoice Receipt Sales_Slip Cash_Bill",
    "heads": "Item|Qty|Price|Amount Description|No|U.Price|Total",
    "item": """Milk Bread Coffee Tea Rice Egg_Sandwich Apple Juice Chicken Soup Noodle Butter A4
        Mint Paper Battery Soap 500ml 12pcs Large Hot Set Lemon Cake Fried_Fish Bolt 2kg w/
        No.5 (R)""",
    "part": "Subtotal Tax_6% Discount Rounding_Adj Service_10% Net_Amount Total_(excl._Tax)",
    "total": "TOTAL Total_Due AMOUNT_DUE Grand_Total TOTAL_(incl._tax)",
    "pay": "Cash Change Visa_Card Tendered Card_**#### Approval_###### Points Balance",
    "foot": "THANK_YOU Please_come_again Goods_sold_are_not_returnable Have_a_nice_day! Call_us",
}
HANGUL = {
    "shop": "햇살_초록 바다 행복_하늘 가온 소담 별빛_나무 우리 참좋은 큰길 한빛_모퉁이",
    "kind": "식당 마트 카페 분식 약국 문구 베이커리 상회 본점 (주) 편의점 정육점",
    "place": "서울시_강남구_중앙로_## 부산시_은행길_1## 성남시 대표:_김민준 02-###-####",
    "meta": "일시|202#-0#-1# 시간|1#:3#:5# 영수증_번호|A###### 계산원|이서연 사업자|###-#####",
    "title": "영수증 매출_전표 주문서 신용_승인",
    "heads": "상품명|수량|단가|금액",
    "item": "우유 식빵 커피 녹차 김밥 라면 비빔밥 된장_찌개 주스 비누 생수 소 세트 1+1 500ml 아이스 매운",
    "part": "소계 과세_물품가액 부가세 할인_금액 면세_금액 공급_가액 봉사료",
    "total": "합계 총_액 받을_금액",
    "pay": "현금 거스름돈 신용카드 받은_금액 카드_**#### 승인_###### 포인트 잔액",
    "foot": "감사합니다 또_오세요 교환_및_환불은_7일_이내 영수증을_꼭_지참해_주세요",
}


class Till:
    """Writes a receipt of about `words` words, a share `hangul` of them in Hangul, to `lines`:
    tuples (kind, height, weight, cells). A cell (x, text) begins at x if that is left of 0.5, and
    ends there if right of it. Kinds: text, which is labelled, mark (a rule, a bar code) and gap."""

    def __init__(self, rng, words, hangul):
        self.rng, self.words, self.hangul, self.large = rng, words, hangul, words >= 40
        self.lines, self.count, self.upper = [], 0, rng.random() < 0.4
        self.sayings = [
            {kind: itertools.cycle(rng.permutation(text.split())) for kind, text in words.items()}
            for words in (LATIN, HANGUL)
        ]
        self.rule = str(rng.choice(["-", "-", "=", "*", "_", ".", "- "])) * 35
        self.colon = str(rng.choice([" : ", ": ", ":", " "]))
        self.head_x, self.name_x = rng.choice([0, 0.5, 0.5, 0.5]), rng.choice([0, 0.65])
        self.columns = [0.58, 0.78] if rng.random() < 0.75 else [0.72]
        self.codes = self.large and rng.random() < 0.6

    def say(self, kind):
        text = next(self.sayings[int(self.rng.random() < self.hangul)][kind]).replace("_", " ")
        return "".join(str(self.rng.integers(10)) if c == "#" else c for c in text)

    def money(self):
        value = self.rng.lognormal(2.5, 1.2)
        return f"{int(value) * 100:,}" if self.hangul > 0.5 else f"{value:,.2f}"

    def add(self, *cells, height=1.0, weight=0):
        cells = [(x, text.upper() if self.upper else text) for x, text in cells]
        self.lines.append(("text", height, weight, cells))
        self.count += sum(len(text.split()) for _, text in cells)

    def until(self, share, rule, write):
        while self.count < share * self.words:
            write()
        if self.rng.random() < rule:
            self.lines.append(("mark", 0.8, 0, [(0.5, self.rule)]))
        self.lines.append(("gap", max(0, self.rng.uniform(-2, 1)), 0, None))

    def meta(self):
        pairs = [self.say("meta").replace("|", self.colon) for _ in range(2)]
        self.add(*zip((0, 1), pairs[: 1 + (self.large and self.rng.random() < 0.5)]))

    def item(self):
        if self.codes:
            self.add((0, f"88{self.rng.integers(10**8)}"))
        names = [self.say("item") for _ in range(self.rng.integers(1, 4) if self.large else 1)]
        count = str(int(self.rng.integers(1, 10) ** 0.7)) + self.rng.choice(["", "", "x"])
        middle = list(zip(self.columns, (count, self.money()))) if self.large else []
        self.add((0, " ".join(names)[:22].strip()), *middle, (1, self.money()))

    def sum(self, kind, **style):
        self.add((self.name_x, self.say(kind)), (1, self.money()), **style)

    def write(self):
        """The receipt from its shop to its bar code."""
        rng, large, shop = self.rng, self.large, f"{self.say('shop')} {self.say('kind')}"
        self.add((self.head_x, shop), height=rng.uniform(1, 1.8), weight=int(rng.choice([0, 300])))
        self.until(0.16, 0.4, lambda: self.add((self.head_x, self.say("place"))))
        if large:
            self.add((self.head_x, self.say("title")), height=rng.uniform(1, 1.5), weight=200)
        self.until(0.3, 0.8, self.meta)
        if large and rng.random() < 0.8:
            heads = self.say("heads").split("|")
            self.add((0, heads[0]), *zip(self.columns, heads[1:]), (1, heads[3]), weight=100)
        self.until(0.64, 0.8, self.item)
        self.until(0.76, 0.3, lambda: self.sum("part"))
        self.sum("total", height=rng.uniform(1, 1.7), weight=int(rng.choice([0, 300])))
        self.until(0.84, 0.6, lambda: self.sum("pay"))
        self.until(0.95, 0.1, lambda: self.add((0.5, self.say("foot"))))
        if large and rng.random() < 0.25:
            bars = "".join(rng.choice(["|", "||", "| "], 35))
            self.lines.append(("mark", rng.uniform(1.5, 3), 400, [(0.5, bars)]))
        return self.lines


class Printer:
    """A type face as a till prints it, its letters at their natural places or apart; coarse ones
    are set small and magnified. Sizes are in pixels; a baseline is row 1.25 s + 2 of a mask."""

    def __init__(self, rng):
        self.face = cv2.FontFace(str(rng.choice(["sans", "uni", "italic"], p=[0.6, 0.35, 0.05])))
        self.apart, self.space = rng.choice([0, rng.uniform(0, 0.1)]), rng.uniform(0.25, 0.4)
        self.dots, self.stretch = rng.choice([1, 1, 0.7, 0.55]), 1.0
        self.weight = int(rng.choice([300, 400, 400, 500, 600]))

    def set_text(self, text, s, weight):
        """A run of words -> ink mask [h, w] uint8 and each word's (text, x0, y0, x1, y1) around its
        ink, from cap height to baseline at least."""
        base, x, words = int(1.25 * s) + 2, 2.0 + s // 8, []
        mask = np.zeros((int(1.7 * s) + 4, 2 * s * (len(text) + 1)), np.uint8)
        for word in text.split():
            start = int(x) - 2
            for char in word:
                cv2.putText(mask, char, (round(x), base), 255, self.face, s, weight)
                x += cv2.getTextSize((0, 0), char, (0, 0), self.face, s, weight)[2] + self.apart * s
            ink = mask[:, start : int(x) + 3]
            ink = ink > min(60, int(ink.max()) // 2)  # the thinnest print is pale
            cols, rows = start + np.flatnonzero(ink.any(0)), np.flatnonzero(ink.any(1))
            top, bottom = min(rows[0], base - 0.66 * s), max(rows[-1] + 1, base)
            words.append((word, cols[0], top, cols[-1] + 1, bottom))
            x += self.space * s
        return mask[:, : int(x)], words

    def set_line(self, ink, cells, size, bold, left, y, width):
        """Set cells into ink, narrower where they would touch: words (text, x0, y0, x1, y1)."""
        s = max(7, round(size * min(1.0, max(self.dots, 14 / size))))
        scale, texts = size / s, [self.set_text(text, s, self.weight + bold) for _, text in cells]
        anchors = np.array([x * width for x, _ in cells])
        shares = np.array([0.5 if x == 0.5 else float(x > 0.5) for x, _ in cells])
        widths = scale * np.array([mask.shape[1] for mask, _ in texts])
        before, after = widths * shares, widths * (1 - shares)  # of a cell, beside its anchor
        room = np.diff(anchors, prepend=0, append=width) + 1
        fit = min(self.stretch, *(room / (np.append(before, 0) + np.append(0, after) + 1e-9)))
        words, pad, top = [], 0.09 * size, round(y - (0.25 + 2 / s) * size)
        starts = (left + anchors - before * fit).astype(int).tolist()
        for (mask, boxes), start in zip(texts, starts):
            if s < 0.9 * size:  # magnified: dots, not a blur
                mask = cv2.threshold(mask, 90, 255, cv2.THRESH_BINARY)[1]
            mask = cv2.resize(mask, None, fx=scale * fit, fy=scale)[max(-top, 0) :]
            under = ink[max(top, 0) :, start:][: mask.shape[0], : mask.shape[1]]
            np.maximum(under, mask[: under.shape[0], : under.shape[1]], out=under)  # clipped
            for word, *box in boxes:
                x0, y0, x1, y1 = np.array(box) * scale * (fit, 1, fit, 1) + (start, top) * 2
                words.append((word, x0 - pad, y0 - pad, x1 + pad, y1 + pad))
        return words


def draw_sheet(rng, lines, w, h, leading):
    """Lines, `leading` text sizes apart -> ink mask [h, w] uint8, the labelled words of each line
    ((text, x0, y0, x1, y1) in sheet pixels) and the text size, which fills the sheet."""
    printer, margin = Printer(rng), rng.uniform(0.04, 0.09) * w
    units = sum(height for _, height, _, _ in lines) * leading + 1.6
    width, size = w - 2 * margin, min(h / units, 0.11 * w)
    texts = [(height, cells) for kind, height, _, cells in lines if kind == "text"]
    # lengths in letters, with two for a Hangul syllable, as in its old two-byte code
    lengths = [k * sum(len(text.encode("cp949")) + 1 for _, text in cells) for k, cells in texts]
    fit = width / ((0.55 + printer.apart) * size * np.percentile(lengths, 80))
    size, printer.stretch = size * min(1, fit / 0.66), float(np.clip(fit, 0.66, 1))
    ink, found = np.zeros((h, w), np.uint8), []
    y = 0.8 * size + max(0, h - size * units) * rng.uniform(0.1, 0.5)
    for kind, height, bold, cells in lines:
        if cells:
            words = printer.set_line(ink, cells, size * height, bold, margin, y, width)
        if kind == "text":
            found.append(words)
        y += height * size * leading
    return ink, found, size


def draw_paper(rng, ink, size, folds, level):
    """Ink mask [h, w] uint8 -> sheet [h, w, 3] uint8 in two colours: print that fades and breaks
    into dots, paper grain, creases."""
    h, w = ink.shape
    faded = 3.5 * smooth_field(rng, h, w, rng.integers(2, 8)) - 2
    grain = 3.5 * smooth_field(rng, h, w, int(max(h, w) / max(size * 0.09, 1.6))) - 2
    gone = faded.clip(0, 1) * rng.uniform(-0.7, 1), grain.clip(0, 1) * rng.uniform(-1, 1)
    keep = 1 - level * np.maximum(gone, 0).sum(0)
    ink = cv2.multiply(ink, np.maximum(keep, 0.3), dtype=cv2.CV_8U)
    white = 250 - rng.uniform(0, 22) - rng.uniform(0, 12) * np.array([0, 0.5, 2])
    black = rng.uniform(5, 80) + np.array([0, 0, 1]) * rng.uniform(0, 40) * (rng.random() < 0.25)
    sheet = cv2.LUT(cv2.merge([ink] * 3), np.linspace(white, black, 256).astype(np.uint8)[None])
    light = 1 + (smooth_field(rng, h, w, 50) - 0.5) * 0.04 * level
    for at, *_ in folds:
        d = np.linspace(-at, 1 - at, h, dtype=np.float32)[:, None]
        crease = np.sign(d) * np.exp(-np.abs(d) / 0.1) * 0.09 * rng.choice([-1, 1])
        light *= 1 + level * (crease + np.exp(-((d / 0.003) ** 2)) * rng.uniform(-0.2, 0.1))
    return multiply(sheet, light)


def sheet_corners(rng, h, w, ratio, photo, level):
    """Corners [4, 2] in page pixels of a turned sheet of width / height `ratio`, in perspective."""
    turn = np.deg2rad(rng.normal(0, (5 if photo else 0.8) * level))
    corners = np.array([[-ratio, -1], [ratio, -1], [ratio, 1], [-ratio, 1]]) / 2
    corners = corners @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    corners += rng.uniform(-1, 1, (4, 2)) * (0.035 if photo else 0.003) * level
    corners, span = corners - corners.min(0), np.ptp(corners, 0)
    scale = rng.uniform(*((0.9, 0.98) if photo else (0.98, 1.005))) * min(w / span[0], h / span[1])
    return corners * scale + ((w, h) - span * scale) * rng.uniform(0.3, 0.7, 2)


def draw_bends(rng, size, level):
    """A sheet's waves in x and y (pixels, frequency, phase) [2, 3], its folds (height, kinks)."""
    waves = rng.uniform((0, 2, 0), 6, (2, 3))
    waves[:, 0] = rng.normal(0, 0.15, 2) * size * level
    n, kink = int(rng.integers(1, 4)) * (rng.random() < 0.1 + 0.5 * level), 0.5 * size * level
    return waves, [(rng.uniform(0.15, 0.85), rng.normal(0, kink, 2)) for _ in range(n)]


def displacement(q, bends, w, h):
    """From the plane's coordinate q [..., 2] to the sheet's: u = q + displacement(q). Its slope
    stays well under 1, so that q follows from u by iteration."""
    waves, folds = bends
    y_x = q[..., ::-1] / (h, w)  # the sheet waves in x as y grows, in y as x grows
    move = waves[:, 0] * np.sin(waves[:, 1] * y_x + waves[:, 2])
    return move + sum(kinks * np.abs(y_x[..., :1] - at) for at, kinks in folds)


def page_to_sheet(matrix, bends, w, h, page_h, page_w, step=8):
    """Sheet xy under the page's pixels, two float32 [page_h, page_w], linear from step to step."""
    rows, cols = -(-page_h // step) + 2, -(-page_w // step) + 2
    grid = np.stack(np.meshgrid(np.arange(cols) - 0.5, np.arange(rows) - 0.5), -1) * step
    q = cv2.perspectiveTransform(grid.reshape(1, -1, 2), np.linalg.inv(matrix)).reshape(grid.shape)
    u = cv2.resize(np.float32(q + displacement(q, bends, w, h)), (cols * step, rows * step))
    return cv2.split(u[step : step + page_h, step : step + page_w])


def background(rng, h, w, photo):
    """Wood, cloth, a desk or a scanner's lid, uint8 [h, w, 3]."""
    if not photo:
        grey = rng.uniform(225, 255) if rng.random() < 0.75 else rng.uniform(5, 60)
        return np.full((h, w, 3), int(grey), np.uint8)
    colour = rng.uniform(30, 190) * (1 + rng.uniform(-0.2, 0.2) * np.array([1, 0, -1]))
    grain = [side // step + 2 for side, step in zip((h, w), rng.choice([3, 20, 200], 2))]
    light = 1 + 0.07 * cv2.resize(rng.standard_normal(grain, np.float32), (w, h))
    return multiply(np.full((h, w, 3), colour.astype(np.uint8)), light)


def photograph(rng, image, size, photo, level):
    """Uneven light and a shadow, blur (it follows the text size), noise, tone and JPEG: image
    [H, W, 3] uint8 -> uint8."""
    light = 1 + (smooth_field(rng, *image.shape[:2], 2) - 0.5) * (0.4 if photo else 0.07) * level
    image, dark = multiply(image, light), rng.uniform(0.15, 0.5) * level
    if photo and rng.random() < 0.6:
        image = shade(image, rng, dark)
    sigma = rng.uniform(0, 0.075 if photo else 0.04) * size * (0.3 + 0.7 * level)
    image = cv2.GaussianBlur(image, (0, 0), max(0.3, sigma))
    image = add_noise(image, rng, rng.uniform(1, 14) * level)
    low, high = (0 if photo else max(0, rng.uniform(-1, 1.2) * level)), rng.uniform(0.82, 1.15)
    tone = np.clip((np.linspace(0, 1, 256) - low) / (high - low), 0, 1) ** rng.uniform(0.85, 1.2)
    image = cv2.LUT(image, (tone * 255).astype(np.uint8))
    grey = rng.random() < (0.1 if photo else 0.95)
    image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY if grey else cv2.COLOR_RGB2BGR)
    quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.uniform(95 - 55 * level, 96))]
    return cv2.imdecode(cv2.imencode(".jpg", image, quality)[1], cv2.IMREAD_COLOR_RGB)


def cut_line(words):
    """Words of a line (text, x0, y0, x1, y1) -> runs with gaps of at most 0.7 of their height."""
    runs = []
    for word in sorted(words, key=lambda word: word[1]):
        if not runs or word[1] - runs[-1][-1][3] > 0.7 * (word[4] - word[2]):
            runs.append([])
        runs[-1].append(word)
    return runs


def place_labels(rng, lines, unit, matrix, bends, w, h):
    """Words of each line (text, x0, y0, x1, y1) on the sheet -> dicts of points [4, 2] on the page
    and the transcription: a quad a word, or an upright rectangle a run, as a hand draws it."""
    runs = [run for words in lines for run in (cut_line(words) if unit == "line" else zip(words))]
    boxes = [(*np.min([b[1:3] for b in run], 0), *np.max([b[3:] for b in run], 0)) for run in runs]
    q = corners = np.array(boxes)[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
    for _ in range(30):  # from the sheet's coordinates to the plane's
        q = corners - displacement(q, bends, w, h)
    quads = cv2.perspectiveTransform(q, matrix)
    if unit == "line":
        low, high = quads.min(1), quads.max(1)  # [N, 2]
        hand = rng.uniform((-0.06, -0.06, -0.05, -0.05), (0, 0, 0.05, 0.05), (len(quads), 4))
        boxes = np.concatenate([low, high], 1) + hand * (high - low)[:, 1:]
        quads = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
    texts = [" ".join(word[0] for word in run) for run in runs]
    return [{"points": quad, "transcription": text} for quad, text in zip(quads, texts)]


def synthetic_page(seed, size=1280, words=117, unit="word", difficulty=0.5):
    """Seed (int or ints) -> page [H, W, 3] uint8 RGB, its longer side `size`, of about `words`
    words, and its labels: dicts of points [4, 2] float64 (x, y) page pixels (pixel (i, j) covers
    [i, i+1) x [j, j+1)), clockwise from the text's top left, and transcription.

    unit "word": photographs and scans, a quad a word. "line": mostly narrow grey scans, an upright
    rectangle a run of text cut at wide gaps, the habit of SROIE's labels. difficulty 0..1 scales
    wear, warp, light, blur and noise."""
    rng, line = np.random.default_rng(seed), unit == "line"
    photo, hangul = rng.random() < 0.5, float(rng.choice([0, 0, 0.12, 0.9]))
    aspect = rng.uniform(0.7, 0.8) if photo and rng.random() < 0.75 else rng.uniform(0.45, 0.85)
    leading = rng.uniform(1.08, 1.3)
    if line:
        photo, words = rng.random() < 0.05, words * rng.uniform(0.6, 1.2)
        aspect, leading = np.clip(rng.normal(0.51, 0.08), 0.36, 0.75), rng.uniform(1.15, 1.6)
    page_h, page_w = size, round(size * aspect)
    ratio, turned = aspect * (rng.uniform(0.72, 1) if photo else 1), 0.4 if line else 1
    corners = sheet_corners(rng, page_h, page_w, ratio, photo, difficulty * turned)
    edges = np.linalg.norm(corners - np.roll(corners, -1, 0), axis=1)
    w, h = int(edges[[0, 2]].mean()), int(edges[[1, 3]].mean())
    lines = [("gap", line * rng.uniform(0, 5), 0, None), *Till(rng, words, hangul).write()]
    ink, found, text = draw_sheet(rng, lines, w, h, leading)
    bends = draw_bends(rng, text, difficulty)
    sheet = draw_paper(rng, ink, text, bends[1], difficulty)
    square = np.float32([[0, 0], [w, 0], [w, h], [0, h]])
    matrix = cv2.getPerspectiveTransform(square, np.float32(corners))
    page = background(rng, page_h, page_w, photo)
    x, y = page_to_sheet(matrix, bends, w, h, page_h, page_w)
    cv2.remap(sheet, x - 0.5, y - 0.5, cv2.INTER_LINEAR, page, cv2.BORDER_TRANSPARENT)
    page = photograph(rng, page, text, photo, difficulty)
    return page, place_labels(rng, found, unit, matrix, bends, w, h)
