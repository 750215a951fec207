"""What does an invented receipt look like? Drawing of synthetic pages with exact labels: a till
writes lines, a printer sets them on a sheet, the sheet is worn, bent, laid on a ground and
photographed."""

import itertools
from statistics import NormalDist

import cv2
import numpy as np

# quantiles of the normal distribution: random bytes become noise by one table look-up
NORMAL = np.array([NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)])


def add_noise(image, seed, sigma):
    table = np.round(NORMAL * sigma).clip(-127, 127).astype(np.int8)
    noise = np.frombuffer(np.random.default_rng(seed).bytes(image.size), np.uint8).reshape(
        image.shape
    )
    return cv2.add(image, cv2.LUT(noise, table), dtype=cv2.CV_8U)


def smooth_field(seed, height, width, cells=4):
    """Random smooth field [height, width] float32 within 0..1."""
    coarse = np.random.default_rng(seed).random((cells, cells), np.float32)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 1)


def shade(image, seed, depth):
    """Darken one side of a random straight line with a soft edge by up to `depth`."""
    height, width = image.shape[:2]
    rng = np.random.default_rng(seed)
    angle, offset, softness = (
        rng.uniform(0, 2 * np.pi),
        rng.uniform(-0.3, 0.3),
        rng.uniform(0.02, 0.3),
    )
    x = (np.arange(width, dtype=np.float32) / width - 0.5) * np.cos(angle)
    y = (np.arange(height, dtype=np.float32) / height - 0.5) * np.sin(angle)
    side = ((x + y[:, None] - offset) / softness).clip(-1, 1)
    gain = 1 - depth * (side + 1) / 2
    return cv2.multiply(image, cv2.merge([gain.astype(np.float32)] * 3), dtype=cv2.CV_8U)


# ---------------------------------------------------------------- what receipts say

# What receipts say, Latin and Hangul: "_" is a space, "#" a digit, "|" parts a line's cells.
WORDS = {
    "shop": (
        "Sunny_Corner Green_Harbour Maple Golden_Olive Lucky_Star Fresh_Garden Moon_River 99_Hill",
        "햇살_초록 바다 행복_하늘 가온 소담 별빛_나무 우리 참좋은 큰길 한빛_모퉁이",
    ),
    "kind": (
        "Ltd. Store Co. Bistro Cafe Sons_(M) Express Enterprise Mart Restaurant Trading Pharmacy",
        "식당 마트 카페 분식 약국 문구 베이커리 상회 본점 (주) 편의점 정육점",
    ),
    "place": (
        "1##,_Lake_Road ##,_Oak_Street,_#####_Ashford Lot_1##_&_2##,_Station_Road,_Easton Newton "
        "(######-K) GST_ID_No:_00######## Tel:_0#-###_####_Fax:_0#-###_#### Lowell,_#####_Marlow",
        "서울시_강남구_중앙로_## 부산시_은행길_1## 성남시 대표:_김민준 02-###-#### 역삼동_2##",
    ),
    "meta": (
        "Date|1#/0#/201# Time|1#:2#:4# Receipt|A###### Invoice_No.|000##### Cashier|Anna Table|## "
        "Till|POS-## Tel|0##-####### Member|##-####-# Served_by|Kumar Pax|# Tax_ID|0####### Ref.|",
        "일시|202#-0#-1# 시간|1#:3#:5# 영수증_번호|A###### 계산원|이서연 테이블|# 사업자|###-#####",
    ),
    "title": ("Tax_Invoice Receipt Sales_Slip Cash_Bill", "영수증 매출_전표 주문서 신용_승인"),
    "heads": ("Item|Qty|Price|Amount Description|No|U.Price|Total", "상품명|수량|단가|금액"),
    "item": (
        "Milk Bread Coffee Tea Rice Egg_Sandwich Apple Juice Chicken Soup Noodle Butter Cheese A4 "
        "Paper Battery Soap 500ml 12pcs Large Hot Set Mint Lemon Cake Fried_Fish Tofu Bolt 2kg w/ "
        "Beef Roll Water Bag Brush XL Sugar No.5 Cable_3m (R) Ginger",
        "우유 식빵 커피 녹차 김밥 라면 만두 비빔밥 불고기 된장_찌개 사과 주스 치킨 샐러드 버터 대 "
        "볼펜 건전지 비누 생수 소 세트 1+1 500ml 아이스 매운 국산 냉동_만두 간장 두부",
    ),
    "part": (
        "Subtotal Tax_6% Discount Rounding_Adj Service_10% Net_Amount Total_Sales_(excl._Tax)",
        "소계 과세_물품가액 부가세 할인_금액 면세_금액 공급_가액 봉사료",
    ),
    "total": ("TOTAL Total_Due AMOUNT_DUE Grand_Total TOTAL_(incl._tax)", "합계 총_액 받을_금액"),
    "pay": (
        "Cash Change Visa_Card Tendered Card_**#### Approval_###### Points Balance",
        "현금 거스름돈 신용카드 받은_금액 카드_**#### 승인_###### 포인트 잔액",
    ),
    "foot": (
        "THANK_YOU Please_come_again Goods_sold_are_not_returnable,_thank_you Have_a_nice_day! "
        "Keep_this_receipt_for_exchange_within_7_days Questions?_Call_our_service_desk",
        "감사합니다 또_오세요 교환_및_환불은_7일_이내 영수증을_꼭_지참해_주세요 부가세_포함_가격",
    ),
}


class Till:
    """Writes a receipt of about `words` words, a share `hangul` of them in Hangul, to `lines`:
    tuples (kind, height, weight, cells). A cell (x, text) begins at x if that is left of 0.5, and
    ends there if right of it. Kinds: text, rule, gap, bars, code, logo; only text is labelled."""

    def __init__(self, rng, words, hangul):
        self.rng, self.words, self.hangul, self.large = rng, words, hangul, words >= 40
        self.lines, self.count, self.upper = [], 0, rng.random() < 0.4
        pairs = {kind: [rng.permutation(s.split()) for s in pair] for kind, pair in WORDS.items()}
        self.sayings = {kind: [itertools.cycle(s) for s in pair] for kind, pair in pairs.items()}
        self.rule = str(rng.choice(["-", "-", "=", "*", "_", ".", "- "]))
        self.colon = str(rng.choice([" : ", ": ", ":", " "]))
        self.head_x, self.name_x = rng.choice([0, 0.5, 0.5, 0.5]), rng.choice([0, 0.65])
        self.columns = [0.58, 0.78] if self.large and rng.random() < 0.75 else [0.72]
        self.value_x, self.two_rows = rng.choice([0, 0, 0.3]), rng.random() < 0.6 and self.large

    def say(self, kind):
        text = next(self.sayings[kind][int(self.rng.random() < self.hangul)]).replace("_", " ")
        return "".join(str(self.rng.integers(10)) if c == "#" else c for c in text)

    def money(self):
        value = self.rng.lognormal(2.5, 1.2)
        return f"{int(value) * 100:,}" if self.hangul > 0.5 else f"{value:,.2f}"

    def add(self, *cells, height=1.0, weight=0):
        cells = [(x, text.upper() if self.upper else text) for x, text in cells if text]
        self.lines.append(("text", height, weight, cells))
        self.count += sum(len(text.split()) for _, text in cells)

    def block(self, kind, chance, height, cells=None):
        if self.rng.random() < chance:
            self.lines.append((kind, height, 0, cells))

    def until(self, share, rule, write):
        while self.count < share * self.words:
            write()
        self.block("rule", rule, 0.8, self.rule)
        self.block("gap", 0.3, self.rng.uniform(0.2, 1))

    def meta(self):
        name, value = self.say("meta").split("|")
        apart = [(0, name), (self.value_x, f": {value}")]
        cells = apart if self.value_x and self.large else [(0, name + self.colon + value)]
        other = self.say("meta").replace("|", self.colon)
        self.add(*cells, *[(1, other)] * (self.large and self.rng.random() < 0.5))

    def item(self):
        names = self.rng.integers(1, 6) if self.large else 1
        name = " ".join(self.say("item") for _ in range(names))
        if self.two_rows:
            self.add((0, name))
            name = "88" + str(self.rng.integers(10**8))
        count = str(int(self.rng.integers(1, 10) ** 0.7)) + self.rng.choice(["", "", "x"])
        middle = zip(self.columns, (count, self.money()))
        self.add((0, name), *(middle if self.large else ()), (1, self.money()))

    def sum(self, kind, **style):
        self.add((self.name_x, self.say(kind)), (1, self.money()), **style)

    def write(self):
        """The receipt from its logo to its bar code."""
        rng, large = self.rng, self.large
        self.block("logo", 0.3 * large, rng.uniform(1.5, 3))
        shop, title = f"{self.say('shop')} {self.say('kind')}", self.say("title") * large
        self.add((self.head_x, shop), height=rng.uniform(1, 1.8), weight=int(rng.choice([0, 300])))
        self.until(0.2, 0.4, lambda: self.add((self.head_x, self.say("place"))))
        if large:
            self.add((self.head_x, title), height=rng.uniform(1, 1.5), weight=200)
        self.until(0.36, 0.8, self.meta)
        if large and rng.random() < 0.8:
            heads = self.say("heads").split("|")
            self.add((0, heads[0]), *zip(self.columns, heads[1:]), (1, heads[3]), weight=100)
        self.until(0.62, 0.8, self.item)
        self.until(0.72, 0.3, lambda: self.sum("part"))
        self.sum("total", height=rng.uniform(1, 1.7), weight=int(rng.choice([0, 300])))
        self.until(0.8, 0.6, lambda: self.sum("pay"))
        self.until(0.97, 0.1, lambda: self.add((0.5, self.say("foot"))))
        self.block(str(rng.choice(["bars", "code"])), 0.35 * large, rng.uniform(1.5, 3.5))
        return self.lines


def lay_ink(ink, mask, x, y):
    """Lay mask [h, w] over ink [H, W] with its top left at (x, y), clipped; the darker stays."""
    x0, y0 = max(x, 0), max(y, 0)
    view = ink[y0 : max(y + mask.shape[0], 0), x0 : max(x + mask.shape[1], 0)]
    if view.size:
        np.maximum(view, mask[y0 - y :, x0 - x :][: view.shape[0], : view.shape[1]], out=view)


class Printer:
    """A type face as a till prints it: natural width, or fixed pitch; coarse ones are set small and
    magnified. Sizes are in pixels; a set line's baseline is row 1.25 s + 2 of its mask."""

    def __init__(self, rng):
        self.face = cv2.FontFace(str(rng.choice(["sans", "uni", "italic"], p=[0.6, 0.35, 0.05])))
        self.pitch, self.space = rng.choice([0, rng.uniform(0.5, 0.6)]), rng.uniform(0.25, 0.4)
        self.dots = rng.choice([1, 1, 0.7, 0.55])
        self.weight = int(rng.choice([3, 4, 4, 5, 6])) * 100
        self.stretch, self.glyphs = 1.0, {}

    def glyph(self, char, s, weight):
        """Ink mask of a character, its pen 1 px from the left, and how far the pen moves on."""
        if (char, s, weight) not in self.glyphs:
            w = cv2.getTextSize((0, 0), char, (0, 0), self.face, s, weight)[2]
            cell = self.pitch * s * (1.7 if char > "ᄀ" else 1) if self.pitch else w
            mask = np.zeros((int(1.7 * s) + 4, max(w, int(cell)) + s), np.uint8)
            left = 1 + max(0, int((cell - w) / 2))
            cv2.putText(mask, char, (left, int(1.25 * s) + 2), 255, self.face, s, weight)
            if cell < w:
                mask = cv2.resize(mask, None, fx=cell / w, fy=1)
            self.glyphs[char, s, weight] = mask, cell
        return self.glyphs[char, s, weight]

    def set_text(self, text, s, weight):
        """A run of words -> ink mask [h, w] uint8 and each word's (text, x0, y0, x1, y1) around its
        ink, from cap height to baseline at least."""
        glyphs = [[self.glyph(char, s, weight) for char in word] for word in text.split()]
        space = (self.pitch or self.space) * s
        width = sum(space + sum(cell for _, cell in word) for word in glyphs)
        mask, base = np.zeros((int(1.7 * s) + 4, int(width) + 2 + s // 4), np.uint8), 1.25 * s + 2
        x, words = 2.0 + s // 8, []
        for word, characters in zip(text.split(), glyphs):
            start = int(x) - 2
            for glyph, cell in characters:
                lay_ink(mask, glyph, round(x) - 1, 0)
                x += cell
            ink = mask[:, start : int(x) + 3] > 60
            cols, rows = start + np.flatnonzero(ink.any(0)), np.flatnonzero(ink.any(1))
            if len(cols):
                top, bottom = min(rows[0], base - 0.66 * s), max(rows[-1] + 1, int(base))
                words.append((word, cols[0], top, cols[-1] + 1, bottom))
            x += space
        return mask, words

    def set_line(self, ink, cells, size, weight, left, y, width):
        """Set cells into ink, narrower where they would meet; where that is too narrow, the first
        cell loses a word, as tills cut names. Returns the words (text, x0, y0, x1, y1)."""
        s = max(7, round(size * min(1.0, max(self.dots, 14 / size))))
        scale, texts = size / s, [self.set_text(text, s, weight) for _, text in cells]
        at = np.array([x for x, _ in cells]) * width
        align = (np.sign(at / width - 0.5) + 1) / 2
        widths = scale * np.array([mask.shape[1] for mask, _ in texts])
        before, after = widths * align, widths * (1 - align)  # of a cell, left and right of its x
        need = np.array([before[0], *(after[:-1] + before[1:]), after[-1]]) + 1e-9
        fit = min(self.stretch, *((np.diff(at, prepend=0, append=width) + 1) / need))
        if fit < 0.7 * self.stretch and cells[0][0] == 0 and " " in cells[0][1]:
            cells = [(0, cells[0][1].rsplit(" ", 1)[0])] + cells[1:]
            return self.set_line(ink, cells, size, weight, left, y, width)
        words, pad, top = [], 0.09 * size, round(y - (0.25 + 2 / s) * size)
        for start, (mask, boxes) in zip((left + at - before * fit).astype(int).tolist(), texts):
            mask = cv2.threshold(mask, 90, 255, cv2.THRESH_BINARY)[1] if s < 0.9 * size else mask
            lay_ink(ink, cv2.resize(mask, None, fx=scale * fit, fy=scale), start, top)
            for word, *box in boxes:
                x0, y0, x1, y1 = np.array(box) * scale * (fit, 1, fit, 1) + (start, top) * 2
                words.append((word, x0 - pad, y0 - pad, x1 + pad, y1 + pad))
        return words


def draw_block(rng, kind, h, w):
    """An unlabelled block [h, about w] uint8: bar code, square code or a logo of plain shapes."""
    if kind == "bars":
        return 255 * np.tile(rng.random(w // 3 + 1) < 0.5, (h, 1)).repeat(3, 1).astype(np.uint8)
    if kind == "code":
        block = np.pad(rng.random((23, 23)) < 0.5, 1, constant_values=True)
        block[:8, :8] = block[:8, -8:] = block[-8:, :8] = np.pad(np.ones((4, 4)), 2) > 0
        return cv2.resize(block.astype(np.uint8) * 255, (h, h), interpolation=cv2.INTER_NEAREST)
    block = np.zeros((h, w), np.uint8)
    for i in range(int(rng.integers(1, 4))):
        sides, radii = int(rng.choice([3, 4, 5, 6, 40, 40])), h * 0.45 * 0.75**i
        angles = rng.uniform(0, 6) + np.arange(sides) * 2 * np.pi / sides
        points = np.stack([np.cos(angles) * rng.uniform(1, 2), np.sin(angles)], 1) * radii
        points = (points + (w / 2, h / 2)).astype(np.int32)
        cv2.fillPoly(block, [points], 255 * (1 - i % 2), cv2.LINE_AA)
    return block


def draw_sheet(rng, lines, w, h, leading, blank):
    """Set lines on a sheet of w x h pixels, `leading` text sizes apart, `blank` of them left free
    above -> ink mask [h, w] uint8, the labelled words of each line ((text, x0, y0, x1, y1) in sheet
    pixels) and the text size, which fills the sheet."""
    printer, margin = Printer(rng), rng.uniform(0.04, 0.09) * w
    units = sum(line[1] for line in lines) * leading + 1.6 + blank
    width, size = w - 2 * margin, min(h / units, 0.11 * w)
    texts = [line for line in lines if line[0] == "text"]
    wide = [x[1] * sum(len(t) + 0.7 * sum(c > "ᄀ" for c in t) + 1 for _, t in x[3]) for x in texts]
    long = np.percentile(wide, 90 if len(lines) > 20 else 75)
    fit = width / ((printer.pitch or 0.55) * size * long)
    size, printer.stretch = size * min(1, fit / 0.66), float(np.clip(fit, 0.66, 1.2))
    ink, found = np.zeros((h, w), np.uint8), []
    y = (0.8 + blank) * size + max(0, h - size * units) * rng.uniform(0.1, 0.5)
    for kind, height, bold, cells in lines:
        if kind == "text":
            weight = printer.weight + bold
            found.append(printer.set_line(ink, cells, size * height, weight, margin, y, width))
        elif kind == "rule":
            row = [(0.5, cells * int(1.8 * width / size / len(cells)))]
            up = size * {"*": 0, "_": 0.75, ".": 0.65}.get(cells, 0.35)  # to the line's middle
            printer.set_line(ink, row, size, printer.weight, margin, y - up, width)
        elif kind != "gap":
            block_w = int(width * rng.uniform(0.4, 0.8))
            block = draw_block(rng, kind, max(int(height * size * leading * 0.85), 8), block_w)
            lay_ink(ink, block, (w - block.shape[1]) // 2, int(y))
        y += height * size * leading
    return ink, found, size


def smooth_noise(rng, h, w, cells):
    """Random field [h, w] float32 about 0, with `cells` features along its longer side."""
    shape = [max(2, int(cells * n / max(h, w)) + 1) for n in (h, w)]
    kind = cv2.INTER_LINEAR if cells > 60 else cv2.INTER_CUBIC
    return cv2.resize(rng.standard_normal(shape, np.float32), (w, h), interpolation=kind)


def shade_by(image, factor, dtype=cv2.CV_32F):
    """image [H, W, 3] times factor [H, W] float32 -> [H, W, 3], float32 or rounded to uint8."""
    return cv2.multiply(image, cv2.merge([factor] * 3), dtype=dtype)


def wear_ink(rng, ink, size, level):
    """Fading, broken dots and dead columns of a print head: ink mask [h, w] uint8 -> uint8."""
    h, w = ink.shape
    keep = np.ones((h, w), np.float32)
    if rng.random() < 0.2 + 0.5 * level:
        faded = np.clip(smooth_noise(rng, h, w, rng.uniform(2, 7)) - 0.2, 0, 1)
        keep -= faded * rng.uniform(0.3, 1) * level
    if rng.random() < 0.4:
        grain = np.clip(smooth_noise(rng, h, w, max(h, w) / max(size * 0.09, 1.6)) - 0.4, 0, 1)
        keep *= np.clip(1.2 - level * rng.uniform(0.3, 1.4) * grain, 0.2, 1)
    if rng.random() < 0.4 * level:
        keep[:, rng.integers(0, w, 4)] *= 0.2
    return cv2.multiply(ink, np.maximum(keep, 0.3), dtype=cv2.CV_8U)


def tint_sheet(rng, ink, size, level):
    """Ink mask [h, w] uint8 -> sheet [h, w, 3] uint8 in two colours, perhaps with unlabelled pen
    strokes and circled fields."""
    white = 250 - rng.uniform(0, 22) - rng.uniform(0, 12) * np.array([0, 0.5, 2])
    black = rng.uniform(5, 80) + np.array([0, 0, 1]) * rng.uniform(0, 40) * (rng.random() < 0.25)
    table = white + np.linspace(0, 1, 256)[:, None] * (black - white)
    sheet = cv2.LUT(cv2.merge([ink] * 3), table.astype(np.uint8)[None])
    for _ in range(int(rng.integers(1, 3)) if rng.random() < 0.7 * level else 0):
        colour = [(30, 40, 140), (150, 30, 40), (40, 40, 45)][rng.integers(0, 3)]
        t, ring = np.linspace(0, 1, 80)[:, None], rng.random() < 0.4
        turns = 12.8 * t + (0, 1.6) if ring else t * rng.uniform(8, 45, 2) + rng.uniform(0, 6, 2)
        reach = rng.uniform(1, 3, 2) if ring else rng.uniform(0.3, 1.1, 2) * (1 - t * 0.7)
        course = np.sin(turns) * reach + (t - 0.5) * (0.3 if ring else rng.uniform(-1, 9, 2))
        points = rng.uniform(0.15, 0.9, 2) * ink.shape[::-1] + size * course
        thick = max(1, int(size / 11))
        cv2.polylines(sheet, [np.int32(points * 8)], False, colour, thick, cv2.LINE_AA, 3)
    return sheet


def shade_sheet(rng, sheet, folds, level):
    """Creases with a light and a dark side, crumples, paper grain and torn edges: sheet [h, w, 3]
    uint8 -> [h, w, 4], the colour times the cover, and the cover."""
    h, w = sheet.shape[:2]
    shade = 1 + smooth_noise(rng, h, w, 50) * 0.012 * level
    if rng.random() < 0.5 * level:
        ridge = np.clip(0.25 - np.abs(smooth_noise(rng, h, w, rng.uniform(4, 9))), 0, 1)
        shade -= ridge * rng.uniform(0.1, 0.3) * level
    upright = [(1, rng.uniform(0.3, 0.7))] if rng.random() < 0.3 * level else []
    for axis, at in [(0, fold[0]) for fold in folds] + upright:
        d = np.linspace(0, 1, (h, w)[axis], dtype=np.float32) - at
        crease = np.sign(d) * np.exp(-np.abs(d) / 0.1) * 0.09 * rng.choice([-1, 1])
        crease += np.exp(-((d / 0.003) ** 2)) * rng.uniform(-0.2, 0.1)
        shade *= np.expand_dims(1 + level * crease, 1 - axis).astype(np.float32)
    teeth = np.abs(np.arange(w) % (w // 40 + 2) - (w // 80 + 1)) * rng.choice([0, 0.5]) * level
    ragged = (teeth + np.abs(smooth_noise(rng, 1, w, 8)[0]) * 0.004 * h * level).astype(int)
    gone = np.arange(ragged.max() + 1)[:, None] < ragged
    out = cv2.merge([*cv2.split(shade_by(sheet, shade, cv2.CV_8U)), np.full((h, w), 255, np.uint8)])
    out[: len(gone)][gone] = 0
    out[::-1][: len(gone)][gone[:, ::-1]] = 0
    return out


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
    """A sheet's waves (pixels, frequency, phase) in x and y and its folds (height, kinks)."""
    waves = [(rng.normal(0, 0.15) * size * level, *rng.uniform((2, 0), 6)) for _ in range(2)]
    n, kink = int(rng.integers(1, 4)) * (rng.random() < 0.1 + 0.5 * level), 0.5 * size * level
    return waves, [(rng.uniform(0.15, 0.85), *rng.normal(0, kink, 2)) for _ in range(n)]


def displacement(q, bends, w, h):
    """From the plane's coordinate q [..., 2] to the sheet's: u = q + displacement(q). Its slope
    stays well under 1, so that q follows from u by iteration."""
    (x_wave, y_wave), folds = bends
    x, y = q[..., 0] / w, q[..., 1] / h
    dx = x_wave[0] * np.sin(x_wave[1] * y + x_wave[2])
    dy = y_wave[0] * np.sin(y_wave[1] * x + y_wave[2])
    for at, kx, ky in folds:
        dx, dy = dx + kx * np.abs(y - at), dy + ky * np.abs(y - at)
    return np.stack([dx, dy], -1)


def sheet_to_page(points, matrix, bends, w, h):
    """Sheet points [N, 2] -> page points [N, 2]: q = u - displacement(q), then the homography."""
    q = points
    for _ in range(30):
        q = points - displacement(q, bends, w, h)
    return cv2.perspectiveTransform(q[None], matrix)[0]


def page_to_sheet(matrix, bends, w, h, page_h, page_w, step=8):
    """Sheet coordinates under the page's pixel centres, two maps [page_h, page_w] float32, exact on
    a grid of `step` pixels and linear in between."""
    rows, cols = -(-page_h // step) + 2, -(-page_w // step) + 2
    grid = np.stack(np.meshgrid(np.arange(cols) - 0.5, np.arange(rows) - 0.5), -1) * step
    q = cv2.perspectiveTransform(grid.reshape(1, -1, 2), np.linalg.inv(matrix)).reshape(grid.shape)
    u = (q + displacement(q, bends, w, h)).astype(np.float32)
    u = cv2.resize(u, (cols * step, rows * step))
    return cv2.split(u[step : step + page_h, step : step + page_w])


def background(rng, h, w, photo):
    """Wood, cloth, a desk or a scanner's lid [h, w, 3] float32 in 0..255."""
    if not photo:
        grey = rng.uniform(225, 255) if rng.random() < 0.75 else rng.uniform(5, 60)
        return np.full((h, w, 3), grey, np.float32)
    kind = rng.integers(0, 4)
    grain = [(h // 20 + 2, 4), (h // 3 + 2, w // 3 + 2), (9, 9), (2, 2)][kind]
    colour = np.array([[150, 105, 65], [110, 112, 120], [45, 42, 40], [170, 165, 155]])[kind]
    colour = colour * rng.uniform(0.7, 1.25) + rng.uniform(-12, 12, 3)
    field = 1 + smooth_noise(rng, h, w, 5) * 0.06
    field += cv2.resize(rng.standard_normal(grain, np.float32), (w, h)) * 0.07
    return cv2.merge([field * np.float32(c) for c in colour])


def compose(rng, sheet, matrix, bends, page_h, page_w, photo, level):
    """Sheet [h, w, 4] on its ground, under uneven light and a photograph's shadow -> page [page_h,
    page_w, 3] uint8."""
    x, y = page_to_sheet(matrix, bends, sheet.shape[1], sheet.shape[0], page_h, page_w)
    *colour, cover = cv2.split(cv2.remap(sheet, x - 0.5, y - 0.5, cv2.INTER_LINEAR))
    clear = 1 - cover * np.float32(1 / 255)
    if photo:  # the sheet's own soft shadow
        low = cv2.GaussianBlur(cv2.resize(cover, None, fx=0.25, fy=0.25), (0, 0), page_w * 0.002)
        clear *= 1 - cv2.resize(low, (page_w, page_h)) * np.float32(0.5 / 255)
    page = shade_by(background(rng, page_h, page_w, photo), clear)
    page = cv2.add(page, cv2.merge(colour), dtype=cv2.CV_32F)
    light = 1 + smooth_noise(rng, page_h, page_w, 2) * np.float32((0.12 if photo else 0.02) * level)
    page, dark = shade_by(page, light, cv2.CV_8U), rng.uniform(0.15, 0.5) * level
    return shade(page, rng.integers(2**31), dark) if photo and rng.random() < 0.6 else page


def photograph(rng, image, size, photo, level):
    """Blur (it follows the text size), noise, tone and JPEG: image [H, W, 3] uint8 -> uint8."""
    sigma = rng.uniform(0, 0.075 if photo else 0.04) * size * (0.3 + 0.7 * level)
    image, n = cv2.GaussianBlur(image, (0, 0), max(0.3, sigma)), int(0.16 * size * level)
    if photo and n > 1 and rng.random() < 0.3:  # the camera moved
        kernel = np.eye(n) if rng.random() < 0.5 else np.ones((1, n))
        image = cv2.filter2D(image, -1, kernel.astype(np.float32) / n)
    image = add_noise(image, rng.integers(2**31), rng.uniform(1, 14) * level)
    low, high = 0, rng.uniform(0.9, 1.15)
    if not photo and rng.random() < 0.6:
        low, high = rng.uniform(0, 1.2 * level), rng.uniform(0.82, 0.95)
    tone = np.clip((np.linspace(0, 1, 256) - low) / (high - low), 0, 1) ** rng.uniform(0.85, 1.2)
    image = cv2.LUT(image, (tone * 255).astype(np.uint8))
    grey = rng.random() < (0.1 if photo else 0.95)
    image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY if grey else cv2.COLOR_RGB2BGR)
    quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.uniform(95 - 55 * level, 96))]
    return cv2.imdecode(cv2.imencode(".jpg", image, quality)[1], cv2.IMREAD_COLOR_RGB)


def cut_line(words):
    """Words of a line (text, x0, y0, x1, y1) -> its runs, cut where a gap is wider than 0.7 of the
    text's height, as people box fields and phrases."""
    runs = []
    for word in sorted(words, key=lambda word: word[1]):
        if runs and word[1] - runs[-1][-1][3] <= 0.7 * (word[4] - word[2]):
            runs[-1].append(word)
        else:
            runs.append([word])
    return runs


def place_labels(rng, lines, unit, matrix, bends, w, h):
    """Words of each line (text, x0, y0, x1, y1) on the sheet -> dicts of points [4, 2] on the page
    and the transcription: a quad a word, or an upright rectangle a run, as a hand draws it."""
    runs = [run for words in lines for run in (cut_line(words) if unit == "line" else zip(words))]
    boxes = [(*np.min([b[1:3] for b in run], 0), *np.max([b[3:] for b in run], 0)) for run in runs]
    corners = np.array(boxes)[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 2)
    quads = sheet_to_page(corners, matrix, bends, w, h).reshape(-1, 4, 2)
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
    wear, warp, light, blur and noise. Raises ValueError for another unit."""
    if unit not in ("word", "line"):
        raise ValueError(f'unit {unit!r}: give "word" or "line"')
    rng, line = np.random.default_rng(seed), unit == "line"
    photo, hangul = rng.random() < 0.5, float(rng.choice([0, 0, 0.12, 0.9]))
    aspect = rng.uniform(0.7, 0.8) if photo and rng.random() < 0.75 else rng.uniform(0.45, 0.85)
    leading, blank = rng.uniform(1.08, 1.3), 0.0
    if line:
        photo, hangul, words = rng.random() < 0.05, 0.0, words * rng.uniform(0.6, 1.2)
        aspect, leading = np.clip(rng.normal(0.51, 0.08), 0.36, 0.75), rng.uniform(1.15, 1.6)
        blank = rng.uniform(0, 5)
    page_h, page_w = size, round(size * aspect)
    ratio, turned = aspect * (rng.uniform(0.72, 1) if photo else 1), 0.4 if line else 1
    corners = sheet_corners(rng, page_h, page_w, ratio, photo, difficulty * turned)
    edges = np.linalg.norm(corners - np.roll(corners, -1, 0), axis=1)
    w, h = int(edges[[0, 2]].mean()), int(edges[[1, 3]].mean())
    lines = Till(rng, words, hangul).write()
    ink, found, text = draw_sheet(rng, lines, w, h, leading, blank)
    sheet = tint_sheet(rng, wear_ink(rng, ink, text, difficulty), text, difficulty)
    bends = draw_bends(rng, text, difficulty)
    sheet = shade_sheet(rng, sheet, bends[1], difficulty)
    square = np.float32([[0, 0], [w, 0], [w, h], [0, h]])
    matrix = cv2.getPerspectiveTransform(square, np.float32(corners))
    image = compose(rng, sheet, matrix, bends, page_h, page_w, photo, difficulty)
    image = photograph(rng, image, text, photo, difficulty)
    return image, place_labels(rng, found, unit, matrix, bends, w, h)
