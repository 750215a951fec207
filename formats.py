"""How do other tools write labels? Pages as the competition's JSON, ICDAR's, PaddleOCR's and
labelme's files, and what such a file could not hold."""

import json
from collections import Counter
from pathlib import Path

import numpy as np

from cleval import rectangle_around
from db_postprocess import DECIMALS
from files import DataError
from labels import LINE_END, Word, parse_icdar_line


def page_words(page):
    """The Words of a page, rounded."""
    polygons = [np.round(polygon, DECIMALS).tolist() for polygon in page.polygons]
    confidences = [round(confidence, 6) for confidence in page.confidences]
    return map(Word, page.ids, polygons, page.texts, page.ignore, confidences)


def pages_to_json(pages, predicted=False):
    """The competition's JSON object of pages; a word lacks what is as usual, but those that are
    predicted always have a confidence, which tells their file from one of labels."""
    images = {}
    for page in pages:
        images[page.name] = entry = {"words": {}}
        for word in page_words(page):
            entry["words"][word.id] = out = {"points": word.points}
            if word.text is not None:
                out["transcription"] = word.text
            if predicted or word.confidence != 1:
                out["confidence"] = word.confidence
            if word.ignore:
                out["ignore"] = True
        if page.size:
            entry["img_w"], entry["img_h"] = map(int, page.size)
        if page.group is not None:
            entry["group"] = page.group
    return {"images": images}


def to_json(pages, split, folder):
    yield f"{split or 'train'}.json", json.dumps(pages_to_json(pages), ensure_ascii=False)


def to_paddle(pages, split, folder):
    """PPOCRLabel shows FOLDER/PICTURE of the folder that it opens, and keeps what fileState.txt
    says was looked at; it and PaddleOCR know `###` and `*` only as ignored."""
    lines = seen = ""
    for page in pages:
        words = []
        for word in page_words(page):
            text = "###" if word.ignore and word.text != "*" else word.text or ""
            words.append({"transcription": text, "points": word.points, "difficult": word.ignore})
        lines += f"{folder}/{page.name}\t{json.dumps(words, ensure_ascii=False)}\n"
        seen += f"{folder}/{page.name}\t1\n"
    yield Path(split or "", "Label.txt"), lines
    yield Path(split or "", "fileState.txt"), seen


def to_icdar(pages, split, folder):
    for page in pages:
        if len(Path(page.name).parts) > 1:
            raise DataError(f"image {page.name}", "ICDAR knows no sub folders", "move its picture")
        lines = [icdar_line(word) + "\n" for word in page_words(page)]
        yield Path(split or "", f"gt_{Path(page.name).stem}.txt"), "".join(lines)


def icdar_line(word):
    """A word's four corners, those of its smallest rectangle if it has more, and its text, in
    quotes where it would be read as something else."""
    points = word.points
    if len(points) != 4:
        points = rectangle_around(points).tolist()
    numbers = [f"{round(v, DECIMALS):.12g}" for point in points for v in point]
    text = "###" if word.ignore else LINE_END.sub(" ", word.text or "")
    if parse_icdar_line(",".join([*numbers, text]))[1] != (text or None):
        text = f'"{text}"'
    return ",".join([*numbers, text])


def to_labelme(pages, split, folder):
    for page in pages:
        shapes = []
        for word in page_words(page):
            shape = {
                "label": "text",
                "points": word.points,
                "group_id": None,
                "shape_type": "polygon",
                "description": word.text or "",
                "flags": {"ignore": True} if word.ignore else {},
                "id": word.id,
                "confidence": word.confidence,
            }
            shapes.append(shape)
        width, height = page.size or (None, None)
        sheet = {
            "version": "5.5.0",
            "flags": {},
            "shapes": shapes,
            "imagePath": page.name,
            "imageData": None,
            "imageWidth": width,
            "imageHeight": height,
            "group": page.group,
        }
        name = f"{Path(page.name).stem}.json"
        yield Path(split or "", name), json.dumps(sheet, ensure_ascii=False)


FORMATS = {"json": to_json, "icdar": to_icdar, "paddle": to_paddle, "labelme": to_labelme}


def losses(placed, again):
    """What differs between pages {path of the picture: Page} and what was read back of them, as
    counts by kind. Raises DataError where a label would go with another picture."""
    outlines = "outlines (their smallest rectangle is kept)"
    kinds = "ids", outlines, "texts", "ignore flags", "confidences"  # of a Word
    by_path = {page.path: page for page in again}
    lost = Counter()
    for path, page in placed.items():
        if path not in by_path:
            raise DataError(f"image {page.name}", "another would be taken for it", "rename it")
        other = by_path[path]
        for kind in "name", "size", "group":
            lost[f"{kind}s"] += getattr(page, kind) != getattr(other, kind)
        for word, read in zip(page_words(page), page_words(other)):
            for kind, *values in zip(kinds, word, read):
                # "" has no characters, and the characters of a missing text are guessed
                a, b = (None if value == "###" else value for value in values)
                lost[kind] += a != b
    return +lost
