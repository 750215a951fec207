"""What is judged? A checkpoint, an ONNX model of one or a file of predictions, read once a command,
and which pages it has seen before."""

import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial

import pictures
import predictions
from command import parse_value
from db_postprocess import DECODING
from dbnet import ORIGIN, load_checkpoint
from engine import choose_runtime, find_package, load_engine
from files import DataError, UsageError, read_bytes
from folding import network_of
from hparams import FIELDS, Hparams, saved_hparams
from interval import SEEN
from labels import lookalike, sheet_files
from predict import Network

# what the metadata of an ONNX model say: values, and the pages that it has seen
EXPORTED = ("backbone", "size", "fit", "look", "text_height", *DECODING)
EXPORTED_SEEN = {way: SEEN.get(way, way).replace(" ", "_") for way in (*ORIGIN, "tuned")}


def warn(where, remark):
    print(f"warning: {where}: {remark}", file=sys.stderr)


@dataclass(eq=False)
class Source:
    """A checkpoint, an ONNX model of one or a predictions file, read once a command."""

    path: str
    state: dict  # of a checkpoint; of an ONNX model its origin alone; of predictions empty
    hp: Hparams | None  # of a network, with the values of flags
    regions: dict  # of a predictions file: {page name: (polygons, scores)}
    engine: str | None = None  # of --engine

    def override(self, values):
        """Take other values, and say where they bring pages to another size than its own. Raises
        UsageError for a first look that does not know how high text should become."""
        own = self.hp
        self.hp = replace(own, **values)
        if self.hp.look and not self.hp.text_height:
            problem = "it does not record how high text was in its training"
            raise UsageError(self.path, problem, "instead of --size auto name a size in px")
        if (own.size, own.fit) != (self.hp.size, self.hp.fit):
            taken = f"size {self.hp.size}, fit {self.hp.fit}"
            sizes = f"{taken} instead of its own {own.size}, {own.fit}"
            remark = "text will be larger or smaller than the network was trained on"
            warn(self.path, f"{sizes}; {remark}")

    def origin(self):
        """Which pages the network and its ancestors have seen, see `seen_digests`; older files do
        not record it."""
        return self.state.get("origin") or {"unknown": [self.path]}

    def weights(self):
        """A checkpoint's weights {name: tensor}, the averaged ones where there are any."""
        return self.state.get("ema") or self.state.get("model") or {}

    def digest(self):
        """The digest of the weights, in half precision, so that a checkpoint and its --export have
        the same; without weights that of the files."""
        if not self.weights():
            return " ".join(map(pictures.picture_digest, sheet_files(self.path)))
        content = b"".join(tensor.half().numpy().tobytes() for tensor in self.weights().values())
        return pictures.bytes_digest(content)

    def runtime(self, device):
        """The engine.Runtime of its network. Raises UsageError."""
        return choose_runtime(device, self.engine, self.hp.amp, not self.weights())

    def network(self, device, **options):
        """A Network on a device. Raises DataError, UsageError."""
        runtime = self.runtime(device)
        make = partial(network_of, self.state, self.path, device)
        # the digest is that of half precision: only the size tells float32 from it
        size = sum(tensor.nbytes for tensor in self.weights().values())
        onnx = None if size else self.path  # which has no weights here
        model = load_engine(runtime, f"{self.digest()}-{size}", make, onnx)
        return Network(model, replace(self.hp, amp=runtime.amp), **options)


def load_source(path, engine=None):
    """The Source at a path: by its suffix predictions or an ONNX model, else a checkpoint. Raises
    DataError, UsageError."""
    if path.endswith(predictions.SUFFIXES):
        return Source(path, {}, None, predictions.read_predictions(path))
    if path.endswith(".onnx"):
        return Source(path, *read_onnx(path), {}, engine)
    state = load_checkpoint(path)
    return Source(path, state, state["hparams"], {}, engine)


def read_onnx(path):
    """({"origin": as of a checkpoint}, Hparams) of an ONNX model that --export wrote, by its
    metadata. Raises DataError, UsageError."""
    onnx = find_package("onnx")
    if not onnx:
        raise UsageError(path, "needs a package", "pip install onnx")
    graph = read_bytes(path)
    try:
        model = onnx.load_from_string(graph)
        about = {entry.key: entry.value for entry in model.metadata_props}
        # older models lack what was not exported then
        kept = [key for key in EXPORTED if key in about]
        values = {key: parse_value(FIELDS[key].type, about[key]) for key in kept}
        origin = {way: about[key].split() for way, key in EXPORTED_SEEN.items()}
        tuned = ",".join(origin.pop("tuned"))
        # it does not know the pages of its run
        return {"origin": origin}, saved_hparams({**values, "tuned": tuned, "data": ""}, path)
    except Exception as error:  # noqa: BLE001 (what protobuf makes of any bytes)
        raise DataError(path, f"not a model of --export ({error})", "export it again") from None


def mix(source, other):
    """A Source whose weights are the mean of two checkpoints' (Wortsman et al. 2022): where one
    began with the other, it often keeps what both can do. Raises UsageError where their networks
    differ."""
    if not other.weights():
        raise UsageError(f"--mix {other.path}", "has no weights", "give a checkpoint")
    if (source.hp.backbone, source.hp.neck) != (other.hp.backbone, other.hp.neck):
        raise UsageError(f"--mix {other.path}", f"not the same network as {source.path}")
    theirs = other.weights()
    weights = {key: (ours.float() + theirs[key]) / 2 for key, ours in source.weights().items()}

    # the mean has seen what either has seen
    origin = {key: set() for key in ORIGIN}
    for one in (source, other):
        for key, values in one.origin().items():
            origin[key].update(values)
    origin = {key: sorted(values) for key, values in origin.items()}
    return replace(source, state=source.state | {"model": weights, "ema": None, "origin": origin})


def check_pages(source, pages, needed=True):
    """Raises DataError if a predictions file lacks any of the pages. needed=False: only if it lacks
    all of them; if it lacks some, a warning says so."""
    missing = [page.name for page in pages if page.name not in source.regions]
    if not missing:
        return
    problem = f"{len(missing)} of {len(pages)} pages are not in it (first: {missing[0]})"
    if needed or len(missing) == len(pages):
        hint = lookalike(missing[0], source.regions)
        raise DataError(source.path, problem, f"a page without words needs an entry too{hint}")
    warn(source.path, f"{problem}; it does not vote on them")


def page_digest(page):
    return page.digest or pictures.picture_digest(page.path)


def seen_digests(origin, hp):
    """{way, of SEEN: set of digests of the pages that a checkpoint and its ancestors have seen so}.
    origin: as a checkpoint records it."""
    ways = {"tuned": hp.tuned.split(",") if hp else ()} | origin
    return {way: {*digests} for way, digests in ways.items() if way in SEEN}


def warn_of_leaks(source, pages):
    """Warn on stderr of pages that a Source has seen before, by the digests in it, and if an
    ancestor of it did not record any. Returns {way, of SEEN: number of pages} as a Counter."""
    origin = source.origin()
    if origin["unknown"]:
        files = ", ".join(origin["unknown"])
        remark = f"pages that {files} trained on, and that chose its epoch, are not known"
        warn(source.path, remark)

    digests = [page_digest(page) for page in pages]
    counts = Counter()
    for way, seen in seen_digests(origin, source.hp).items():
        names = [page.name for page, digest in zip(pages, digests) if digest in seen]
        if names:
            share = f"{len(names)} of these {len(pages)} pages (first: {names[0]})"
            warn(source.path, f"{SEEN[way]} {share}; the score will be optimistic")
            counts[way] = len(names)
    return counts


def count_seen(sources, pages):
    """{way, of SEEN: number of pages that any of several Sources has seen so}, for a difference or
    a vote. The largest of the Sources' own numbers would be too small: each may have seen other
    pages."""
    seen = [seen_digests(source.origin(), source.hp) for source in sources if source.hp]
    counts = {}
    for way in SEEN:
        digests = set().union(*(theirs.get(way, ()) for theirs in seen))
        # files of predictions have seen nothing: then no picture has to be there
        counts[way] = sum(page_digest(page) in digests for page in pages) if digests else 0
    return counts
