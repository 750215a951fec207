"""Two sets of pages as people photograph them, from labelled scans and from drawn receipts.

python tests/by_hand/photographs.py turned DATA OUT [30]   DATA's val pages turned by -30 to 30
                                                           degrees, on other ground
python tests/by_hand/photographs.py hangul OUT             40 drawn receipts, mostly Hangul,
                                                           photographed

OUT is a data folder with a val split; other detectors read it by tests/by_hand/peers.py."""

import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import augment
import formats
import labels
import pictures
from files import write_json
from hparams import Hparams, read_hparams
from synth import synthetic_page

ROOT = Path(__file__).resolve().parents[2]


def write_set(out, pages):
    """Pages (name, image uint8 [H, W, 3], polygons, texts, ignore, group) -> OUT/val.json,
    images/."""
    folder = Path(out, "images")
    folder.mkdir(parents=True)
    entries = []
    for name, image, polygons, texts, ignore, group in pages:
        path = folder / name
        cv2.imwrite(str(path), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
        page = labels.Page(name, path, size=image.shape[1::-1], group=group)
        for k, (polygon, text, skip) in enumerate(zip(polygons, texts, ignore), 1):
            page.add(f"{k:04d}", polygon, text, bool(skip))
        entries.append(page)
    write_json(Path(out, "val.json"), formats.pages_to_json(entries))
    print(f"{out}: {len(entries)} pages")


def turned(folder, most=30, seed=0):
    """Val pages of a data folder, each turned by its own angle of at most so many degrees."""
    angles = np.random.default_rng(seed)
    for k, page in enumerate(labels.load_labels(folder, "val")):
        image = pictures.read_image(page.path)
        angle = float(angles.uniform(-most, most))
        image, polygons, cut = augment.stress(image, page.polygons, "turned", angle, (seed, k))
        ignore = np.array(page.ignore, bool) | cut
        yield Path(page.name).stem + ".jpg", image, polygons, page.texts, ignore, page.group


def is_hangul(text):
    return any("가" <= letter <= "힣" for letter in text)


def hangul(count=40, side=1400):
    """Drawn receipts of which most words are Hangul, as the strengths of photographs.json take
    them."""
    values = read_hparams(ROOT / "hparams" / "photographs.json")
    hp = replace(Hparams(**values), size=side, aug_scale=0.3, aug_rotate=12.0, aug_turn=0.0)
    seed, made = 0, 0
    while made < count:
        seed += 1
        image, words = synthetic_page((seed, 77), size=1400, unit="line")
        texts = [word["transcription"] for word in words]
        if np.mean([is_hangul(text) for text in texts]) < 0.4:
            continue
        polygons = [word["points"] for word in words]
        rng, photo_rng = np.random.default_rng((seed, 1)), np.random.default_rng((seed, 2))
        width, height = augment.draw_canvas(photo_rng, hp)
        shape = (height, width)
        ground = augment.draw_ground(photo_rng, shape)
        pose = augment.draw_pose(photo_rng, hp, shape)
        size = image.shape[1::-1]
        fit = 0.8 * min(width / size[0], height / size[1])
        centre = np.array([width, height]) / 2
        matrix = augment.draw_homography(rng, hp, *size, fit, centre)
        image, polygons, cut = augment.warp_page(
            image, polygons, matrix, shape, bend=pose.bend, ground=ground
        )
        image = augment.augment_colours(image, rng, hp)
        image = augment.augment_photograph(image, photo_rng, hp)
        made += 1
        yield f"hangul_{seed:04d}.jpg", image, polygons, texts, cut, f"hangul {seed}"


def main():
    if sys.argv[1:2] == ["turned"] and len(sys.argv) in (4, 5):
        write_set(sys.argv[3], turned(sys.argv[2], *map(float, sys.argv[4:])))
    elif sys.argv[1:2] == ["hangul"] and len(sys.argv) == 3:
        write_set(sys.argv[2], hangul())
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
