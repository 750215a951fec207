"""How is what was predicted kept? As the competition's JSON, written whole or not at all, or as a
.jsonl file, to which each page adds its line, so that a command that was stopped goes on."""

import json
from pathlib import Path

import numpy as np

from cleval import from_top_left
from files import DataError, UsageError, lock, read_json, replace_file
from formats import pages_to_json
from labels import Page, read_competition

SUFFIXES = ".json", ".jsonl"


def read_predictions(path):
    """{page name: (polygons, scores)} of a predictions file, or of several .jsonl files that a
    pattern names. Raises DataError."""
    pages = read_competition(path, need_pictures=False)
    return {page.name: (page.polygons, np.array(page.confidences)) for page in pages}


def sureness(name, scores):
    """(the confidence that 90 % of a page's words reach, the number of words, the page's name) of
    scores [N]. Sorted, the pages to label next come first (Lewis and Gale 1994)."""
    return np.quantile(scores, 0.1) if len(scores) else 0.0, len(scores), name


def page_line(page, polygons, scores):
    """A page and its words as a line of a .jsonl file, in the competition's form. Outlines begin at
    the upper left: once corrected they are labels, and metrics take the first half of a label's
    points for the top of the word."""
    words = Page(page.name, page.path, size=page.size)
    for number, (polygon, score) in enumerate(zip(polygons, scores), 1):
        words.add(f"{number:04d}", from_top_left(polygon), confidence=score)
    return json.dumps(pages_to_json([words], predicted=True), ensure_ascii=False) + "\n"


def write_predictions(path, pages, found):
    """Write (polygons, scores) of pages, see `write_lines`."""
    write_lines(path, [page_line(page, *words) for page, words in zip(pages, found)])


def write_lines(path, lines):
    """Write lines of pages as a file of predictions, whole or not at all: a .jsonl file, or JSON
    in the competition's form."""
    if not str(path).endswith(".jsonl"):
        entries = [line.removeprefix('{"images": {').removesuffix("}}\n") for line in lines]
        lines = ['{"images": {', ",\n".join(entries), "}}\n"]
    replace_file(path, "".join(lines))


def resume_lines(path, made_of, place=None):
    """Open a .jsonl file to append the lines of pages. Half a line, which a kill left, is cut off.
    Returns the file, locked and in bytes, and {name of a page in it: its `sureness`}.

    made_of: words for all that its pages depend on; place: the folder that they come from, a
    picture in it or a label file. Both are kept in its first line. Raises UsageError if that line
    is another one or another command writes the file, DataError if a line is damaged."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    file = lock(path)
    if file is None:
        raise UsageError(path, "another command writes it", "wait for it, or name another file")
    file = file.detach()  # in bytes

    # the first line says what the file was made of
    folder = Path(place or "")  # names of pages are relative to it
    if folder.is_file() and folder.suffix not in SUFFIXES:  # a picture
        folder = folder.parent
    made_of += f", {folder.resolve()}"
    sheet = {"images": {}, "made_of": made_of}
    header = f"{json.dumps(sheet)}\n".encode()
    file.seek(0)
    first = file.readline()
    if first != header:
        if not header.startswith(first):  # nothing, or half of it after a kill, may be replaced
            problem = "exists, and was not written for this folder with these weights and values"
            raise UsageError(path, problem, "name another file, or repeat its command")
        file.truncate(0)
        file.write(header)

    # the pages that are there, up to the end of the last whole line
    done = {}
    end = len(header)
    number = 1
    while (line := file.readline()).endswith(b"\n"):
        number += 1
        try:
            for name, entry in read_json(path, line.decode())["images"].items():
                scores = [word.get("confidence", 1.0) for word in entry["words"].values()]
                done[name] = sureness(name, scores)
        except (KeyError, TypeError, AttributeError, ValueError):
            raise DataError(
                path, f"line {number} is damaged", "remove it, its pages are read again"
            ) from None
        end += len(line)
    file.truncate(end)
    return file, done
