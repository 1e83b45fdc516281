"""Export of a release, or of some of its images, in a format of others or as a smaller release.

::

    Release --> ExportSource --> ExportFormat.write: a file, or some folders, a span of its rows
                (by split, then by    folders, imagefolder: each image a file
                concept or shuffled;  webdataset: tars; parquet: tables
                encoded in threads)
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from io import BytesIO
from itertools import chain, islice, pairwise, product
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from sdwn import io
from sdwn.errors import UsageError, some
from sdwn.evaluation.evaluate import keep_computed
from sdwn.paths import ReleasePaths
from sdwn.planning.plan import LISTED_BY, table_text
from sdwn.planning.tables import as_table
from sdwn.releases import writer
from sdwn.releases.release import INNER_COLUMNS, Release, wnids_or_labels
from sdwn.releases.splits import split_images
from sdwn.releases.staged_folder import StagedFolder, build, require_free
from sdwn.releases.writer import Attributes, CardLayout, cut_parts
from sdwn.storage.codecs import CODECS, EXCHANGED
from sdwn.storage.images import MADE_BY_MODEL, encode, open_image
from sdwn.storage.shards import join

THREADS = 16  # more than processors: some wait for the disk
ROWS = 1000  # records that are Python objects at the same time
TRIALS = 16  # images that are encoded to estimate how much smaller or larger a codec makes them
# A unit of folders, for an export that is resumed: each file would be too many lines in a journal.
CONCEPTS = 50
GROUP_ROWS = 100  # readers of Parquet show a page of rows by reading whole groups of them
# As datasets' ClassLabel, timm and ReleaseDataset have it; no tensor can hold an empty value.
NO_CLASS = -1
# What a reader looks for first.
_FIRST_COLUMNS = (
    *("id", "label", "wnid", "synset", "number", "status", "cls", "imagenet_class", "prompt"),
    *("negative_prompt", "seed", "width", "height", "sha256"),
)
_LONGEST_NAME = 150  # a file name may have 255 bytes; a number and an extension are still to come
# Files of an export that lie beside its folders.
_BESIDE = {"README.md", "synsets.csv", "concepts.csv", "classes.txt"}
# Between separators, these words make Hugging Face datasets take a folder for one split of
# several, and leave out every folder without such a word.
_SPLIT_WORD = re.compile(
    r"(?<![^-._ 0-9])(train|training|validation|valid|dev|val|test|testing|eval|evaluation)"
    r"(?![^-._ 0-9])"
)

Span = tuple[int, int]  # the first of some rows, and one past the last
Result = TypeVar("Result")


class ExportImage(NamedTuple):
    """An image to write: its record, its bytes, and the extension of a file that holds them."""

    row: dict[str, Any]
    payload: bytes
    extension: str


class ExportSource:
    """The images to export; ``table`` is the release's metadata in their order.

    Its column ``cls`` is the label to train on, an index of ``classes``: ImageNet-1k's where every
    image is of one, else the images' wnids or labels. A step of the export is a concept's images,
    or one image of a random order: ``starts`` are their rows, ``splits`` the steps of each split.
    """

    def __init__(self, release: Release, options: ExportOptions, advance: io.Advance) -> None:
        self.release, self.concepts, self.advance = release, release.present, advance
        stored, self._quality = options.codec == "stored", options.quality
        # The codec that the images of each codec get, and the codecs whose images are kept.
        self._codecs = dict.fromkeys(CODECS, "png" if stored else options.codec)
        self._codecs |= {name: name for name in EXCHANGED if stored}
        self._kept = {old for old, new in self._codecs.items() if old == new and not self._quality}
        self._shorter_side = options.resize or 1 << 30
        self._xmp = MADE_BY_MODEL if release.manifest.origin == "run" else b""
        order = pa.array(list(release.concepts), pa.string())
        ranks = pc.index_in(release.metadata["id"], order).to_numpy().astype("i8")
        rows = np.lexsort((release.metadata["number"].to_numpy(), ranks))
        shares = options.splits or {"": 1.0}
        splits = split_images(release, shares)
        steps = ranks + len(order) * splits
        if options.shuffle is not None:
            rows = np.random.default_rng(options.shuffle).permutation(rows)
            steps = np.arange(len(rows))
        rows = rows[np.argsort(splits[rows], kind="stable")]
        self.starts = np.flatnonzero(np.diff(steps[rows], prepend=-1, append=-1))
        stops = np.searchsorted(self.starts, np.cumsum(np.bincount(splits))).tolist()
        self.splits = dict(zip(shares, pairwise([0, *stops]), strict=True))
        table = release.metadata.take(pa.array(rows)).combine_chunks()
        names, self.classes = wnids_or_labels(table), list(release.classes)
        if table["imagenet_class"].null_count:
            self.classes = sorted({*names.unique().to_pylist()} - {None}, key=path_name)
        if "cls" in table.column_names:  # of a user's own table
            self.classes = []
        if self.classes:
            index = pc.index_in(names, pa.array(self.classes, pa.string())).cast(pa.int64())
            table = table.append_column("cls", pc.fill_null(index, NO_CLASS))
        known, place = table["imagenet_class"], table.column_names.index("imagenet_class")
        self.table = table.set_column(place, "imagenet_class", pc.fill_null(known, NO_CLASS))
        kept = [name for name in self.table.column_names if name not in INNER_COLUMNS]
        first = [name for name in _FIRST_COLUMNS if name in kept]
        self.schema: pa.Schema = self.table.select(list(dict.fromkeys([*first, *kept]))).schema

    @cached_property
    def concept_folders(self) -> dict[str, str]:
        """Name a folder for each concept, by id: by its name, or all by id where names repeat."""
        names = {one.id: path_name(one.name) for one in self.concepts}
        unique = len(set(names.values())) == len(names)
        return names if unique else {one: path_name(one) for one in names}

    @cached_property
    def class_folders(self) -> dict[str, str]:
        """Name the folder of each concept's class, by id: by wnid, else label, else id."""
        classes = {one.id: one.wnid or one.label for one in self.concepts}
        named = set(classes.values())
        # No name ends in a percent sign: an id is another class than a label that reads so.
        alone = {one: path_name(one) + "%" * (one in named) for one in classes}
        return {one: path_name(name) if name else alone[one] for one, name in classes.items()}

    def encoding(self) -> str | None:
        """Describe how the images are encoded; None if all keep their bytes."""
        stored = set(self.table["codec"].unique().to_pylist())
        sides = pc.min_element_wise(self.table["width"], self.table["height"])
        smaller = pc.max(sides).as_py() > self._shorter_side
        if stored <= self._kept and not smaller:
            return None
        now = sorted({self._codecs[codec] for codec in stored})
        encoded = " and ".join(f"{one}, {CODECS[one].loss(self._quality)}" for one in now)
        before = " and ".join(sorted(stored & set(EXCHANGED)))
        anew = f", anew from {before}" if before else ""
        size = f", the shorter side at most {self._shorter_side} pixels (Lanczos)" * smaller
        return f"{encoded}{anew}{size}"

    def counts(self) -> dict[str, dict[str, int]]:
        """Count the images and concepts of each split; nothing where there is but one."""
        rows = {name: slice(*self.starts[[*span]].tolist()) for name, span in self.splits.items()}
        ids = {name: self.table[span]["id"] for name, span in rows.items() if name}
        return {name: {"images": len(i), "synsets": len(i.unique())} for name, i in ids.items()}

    def sizes(self) -> Any:
        """Estimate how many bytes the images of each step take, once they are encoded."""
        trials = np.unique(np.linspace(0, len(self.table) - 1, TRIALS).astype(int))
        rows = self.table.take(pa.array(trials)).to_pylist()
        encoded = sum(len(self._image(row).payload) for row in rows)
        ratio = encoded / sum(int(row["bytes"]) for row in rows)
        stored = np.add.reduceat(self.table["bytes"].to_numpy(), self.starts[:-1], dtype="i8")
        return stored * ratio

    def map(self, span: Span, use: Callable[[ExportImage], Result]) -> Iterator[Result]:
        """Encode the images of a span and call ``use`` on each, in threads; results in order."""
        batches = self.table[slice(*span)].to_batches(max_chunksize=ROWS)
        records = chain.from_iterable(batch.to_pylist() for batch in batches)
        results = io.in_threads(lambda row: use(self._image(row)), records, THREADS, 2 * THREADS)
        # An error in the caller must not leave threads that still write.
        with closing(results):
            for result in results:
                yield result
                self.advance(1)

    def _image(self, row: dict[str, Any]) -> ExportImage:
        record, codec = {name: row[name] for name in self.schema.names}, self._codecs[row["codec"]]
        smaller = min(row["width"], row["height"]) > self._shorter_side
        if row["codec"] in self._kept and not smaller:
            return ExportImage(record, self.release.payload(row), CODECS[codec].extension)
        try:
            image = self.release.image(row)
            if smaller:
                sides = (self._shorter_side, self._shorter_side)
                image = ImageOps.cover(image, sides, Image.Resampling.LANCZOS)
            payload = encode(np.asarray(image), codec, self._quality, self._xmp)
        except (OSError, ValueError) as error:
            name = f"{row['id']} {row['number']}"
            raise UsageError(f"{name} cannot be {codec}: {error}; choose another codec") from None
        # Earlier imports recorded the size before the image was turned upright by its EXIF.
        record["width"], record["height"] = open_image(payload, codec).size
        record["sha256"] = hashlib.sha256(payload).hexdigest()
        return ExportImage(record, payload, CODECS[codec].extension)


class ExportFormat(NamedTuple):
    """A format: how an export is cut into units, and how one unit is named and written."""

    # A unit's name, for its split, its index in there, and the number of units in there.
    name: Callable[[str, int, int], str]
    # Writes and syncs a unit: the export's folder, the unit's name, the images, which rows.
    write: Callable[[Path, str, ExportSource, Span], None]
    # For Hugging Face datasets, the files of a split; None where it finds them itself.
    data_files: Callable[[str], str | None]
    least: int | None  # bytes of a unit, which is a file; None: it has CONCEPTS concepts


def path_name(name: str) -> str:
    """Turn a concept's name or id into one harmless component of a path.

    Different names stay different; ``urllib.parse.unquote`` gives back all but overlong ones.

    >>> path_name("dog.n.01"), path_name("read/write_head.n.01"), path_name("test_tube.n.01")
    ('dog.n.01', 'read%2Fwrite_head.n.01', 'tes%74_tube.n.01')
    """
    quoted = quote(name, safe="", errors="surrogatepass")
    if not quoted or quoted[0] in ".-~" or quoted in _BESIDE:
        # Only the empty name becomes a lone percent sign.
        quoted = f"%{ord(quoted[0]):02X}{quoted[1:]}" if quoted else "%"
    quoted = _SPLIT_WORD.sub(lambda word: f"{word[0][:-1]}%{ord(word[0][-1]):02X}", quoted)
    if len(quoted) <= _LONGEST_NAME:
        return quoted
    # Longer than any name that is not cut, and so never equal to one; a percent sign ends no word.
    return f"{quoted[:_LONGEST_NAME]}%{hashlib.sha256(quoted.encode()).hexdigest()[:32]}"


# --- Folders of images -------------------------------------------------------------------------
def _folders(named_by: str, data_files: Callable[[str], str | None]) -> ExportFormat:
    """Return the format of folders that an attribute of the source names."""
    by_concept = named_by == "concept_folders"

    def write_file(name: str, content: bytes) -> None:
        Path(name).write_bytes(content)
        io.sync(Path(name))

    def write(root: Path, name: str, source: ExportSource, span: Span) -> None:
        # By id, how the names of its files begin.
        begins, folders = dict[str, str](), getattr(source, named_by)
        split = root / Path(name).parent
        for id_ in source.table["id"][slice(*span)].unique().to_pylist():
            one, folder = source.release.concepts[id_], split / folders[id_]
            folder.mkdir(parents=True, exist_ok=True)
            begins[one.id] = f"{folder}/{folder.name if by_concept else path_name(one.id)}"
            if by_concept:
                # The three lines that the paper describes; of what is no synset, label and id.
                lines = [("prompt", prompt) for prompt in one.prompts or ("",)]
                keys = ("synset", "wnid", "label", "id")[: 2 if one.id == one.wnid else 4]
                lines += [(key, value) for key in keys if (value := getattr(one, key))]
                text = "".join(f"{key}: {' '.join(s.splitlines())}\n" for key, s in lines)
                write_file(f"{begins[one.id]}.txt", text.encode())

        def write_image(image: ExportImage) -> None:
            name = f"{begins[image.row['id']]}_{image.row['number']}.{image.extension}"
            write_file(name, image.payload)

        for _result in source.map(span, write_image):
            pass
        for path in {root, split, *(Path(begin).parent for begin in begins.values())}:
            io.sync(path)

    return ExportFormat(
        name=lambda split, index, _: f"{split and split + '/'}concepts-{index:05d}",
        write=write,
        data_files=data_files,
        least=None,
    )


# --- Tars, as the webdataset library reads them ------------------------------------------------
def _write_tar(root: Path, name: str, source: ExportSource, span: Span) -> None:
    # Readers take each field's type from the first samples, which may have nothing there.
    texts = [one.name for one in source.schema if pa.types.is_string(one.type)]
    # USTAR ends at names of 100 bytes, and PAX headers hold times.
    with (
        io.atomic(root / name) as temporary,
        tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT) as tar,
    ):
        for image in source.map(span, lambda image: image):
            row = image.row | {name: "" for name in texts if image.row[name] is None}
            # Readers take the first dot as the end of a sample's name.
            key = f"{path_name(row['id']).replace('.', '%2E')}_{row['number']:04d}"
            # Each sample has the same members: readers of batches need that.
            members = {
                image.extension: image.payload,
                "json": json.dumps(row).encode(),
                "txt": row.get("prompt", "").encode(),
            }
            if source.classes:
                members["cls"] = str(row["cls"]).encode()
            for extension, content in members.items():
                # Its other fields record nothing of when, where and by whom.
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, BytesIO(content))


# --- Tables with images, as Hugging Face datasets reads them -----------------------------------
def _write_table(root: Path, name: str, source: ExportSource, span: Span) -> None:
    columns = [*source.schema]
    # Where training scripts of text-to-image models look for the prompt.
    if "prompt" in source.schema.names and "text" not in source.schema.names:
        columns.insert(0, pa.field("text", pa.string()))
    names = [one.name for one in columns]
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    features |= {one.name: _feature(one.type) for one in columns}
    if source.classes:
        features["cls"] = {"names": source.classes, "_type": "ClassLabel"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    image_type = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema([pa.field("image", image_type), *columns], metadata=metadata)
    # Encoded images become no smaller, and two are never the same.
    packed = {"image.bytes": "none", "image.path": "zstd", **dict.fromkeys(names, "zstd")}

    def record(image: ExportImage) -> dict[str, Any]:
        path = f"{path_name(image.row['id'])}_{image.row['number']:04d}.{image.extension}"
        content = {"bytes": image.payload, "path": path}
        return {"image": content, "text": image.row.get("prompt"), **image.row}

    with (
        io.atomic(root / name) as temporary,
        pq.ParquetWriter(
            temporary, schema, compression=packed, use_dictionary=names, write_statistics=names
        ) as writer,
    ):
        records = source.map(span, record)
        while group := list(islice(records, GROUP_ROWS)):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


def _feature(kind: pa.DataType) -> dict[str, Any]:
    """Describe a column as the datasets library does."""
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "Sequence"}
    return {"dtype": str(kind), "_type": "Value"}


EXPORT_FORMATS = {
    # For Hugging Face datasets: what lies in folders, and is no text (one ends in .txt).
    "folders": _folders("concept_folders", lambda split: f"{split and split + '/'}*/*[!t]"),
    "imagefolder": _folders("class_folders", lambda split: f"{split}/*/*" if split else None),
    "webdataset": ExportFormat(
        name=lambda split, index, _: f"sdwn-{split and split + '-'}{index:06d}.tar",
        write=_write_tar,
        data_files=lambda split: f"sdwn-{split and split + '-'}*.tar",
        least=1_000_000_000,
    ),
    "parquet": ExportFormat(
        name=lambda split, index, of: f"data/{split or 'train'}-{index:05d}-of-{of:05d}.parquet",
        write=_write_table,
        data_files=lambda split: f"data/{split or 'train'}-*.parquet",
        least=500_000_000,
    ),
}


# --- The export --------------------------------------------------------------------------------

# A smaller release keeps parts, tables and record; it shares nothing with the other formats.
FORMATS = (*EXPORT_FORMATS, "release")


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """The format to export to, one of ``FORMATS``, and how to encode the images."""

    format: str
    codec: str = "stored"  # as in the release (raw as PNG); or png, webp, jpeg
    quality: int | None = None  # from 1 to 100, of JPEG (default: 95); makes WebP lossy
    part_bytes: int | None = None  # that a file has at least
    shuffle: int | None = None  # the seed of a random order of all images
    splits: Mapping[str, float] = field(default_factory=dict)  # shares by name: `split_images`
    resize: int | None = None  # most pixels of an image's shorter side

    def __post_init__(self) -> None:
        form, anew = EXPORT_FORMATS.get(self.format), CODECS.get(self.codec)
        if self.quality is not None and not (anew and anew.takes_quality):
            raise UsageError(f"{self.codec} has no quality: leave it out, or name jpeg or webp")
        kept = self.codec == "stored" and self.resize is None
        if form is None and not (kept and not self.splits and self.shuffle is None):
            advice = "leave out codec, quality, resize, split and shuffle"
            raise UsageError(f"a release keeps its images as they are, in one set: {advice}")
        if form and form.least is None and (self.part_bytes, self.shuffle) != (None, None):
            advice = "leave out the part size, and shuffle when you train"
            raise UsageError(f"{self.format} has a file for each image, in no order: {advice}")
        named = all(re.fullmatch(r"\w+", name) for name in self.splits)
        if self.splits and not (named and abs(sum(self.splits.values()) - 1) < 1e-9):
            found = ", ".join(f"{name}={share:g}" for name, share in self.splits.items())
            expected = "names of letters, digits and _, and shares that are 1 together"
            raise UsageError(f"split: expected {expected}, found {found}")


def export(
    release: Release, target: Path, options: ExportOptions, advance: io.Advance = lambda _: None
) -> dict[str, Any]:
    """Write the images into a new folder, and count what is in it; after a kill, resume.

    ``advance`` is called with how many more images are done.
    """
    if not len(release):
        raise UsageError(f"{release.paths.root}: no image to export; choose a larger subset")
    if release.paths.root.resolve() in target.resolve().parents:
        raise UsageError(f"{target} lies inside the release; export into a folder outside of it")
    require_free(target)
    if options.format == "release":
        # Whole concepts each, as one plan made them: the ends of runs of equal values.
        texts = (release.metadata[name].cast(pa.string()) for name in ("id", "plan"))
        ids, plans = (pc.run_end_encode(text.combine_chunks()).run_ends for text in texts)
        starts = [0, *np.union1d(ids, plans).tolist()]
        sizes: Any = np.add.reduceat(release.metadata["bytes"].to_numpy(), starts[:-1], dtype="f8")
        if len(plans) > 1:
            sizes[np.isin(starts[1:], plans)] = np.inf  # a part ends there
        parts = cut_parts(sizes.tolist(), options.part_bytes or io.PART_BYTES)
        spans: Any = [(starts[first], starts[stop]) for first, stop in parts]
        fill, splits = partial(_write_release, release=release, spans=spans, advance=advance), {}
    else:
        form = EXPORT_FORMATS[options.format]
        source = ExportSource(release, options, advance)
        starts, least = source.starts.tolist(), options.part_bytes or form.least or CONCEPTS
        sizes = source.sizes() if form.least else [1.0] * len(starts)
        spans = {
            name: [(starts[a + i], starts[a + j]) for i, j in cut_parts(sizes[a:b], least)]
            for name, (a, b) in source.splits.items()
        }
        fill = partial(_write_units, options=options, source=source, spans=spans)
        splits = source.counts()
    chosen = [release.metadata[name].to_pylist() for name in ("id", "number")]
    images = hashlib.sha256(json.dumps([release.digest, *chosen]).encode()).hexdigest()
    build(target, {**asdict(options), "images": images, "spans": spans}, fill)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    counts = {"images": len(release), "synsets": len(release.present), "bytes": size}
    return {"format": options.format, **counts, "path": str(target), "splits": splits}


def _write_units(
    staged: StagedFolder, options: ExportOptions, source: ExportSource, spans: dict[str, list[Span]]
) -> None:
    """Write the units that are not finished yet, the table of concepts and the card."""
    form, release = EXPORT_FORMATS[options.format], source.release
    # The number of images of each unit, by split.
    units = {split: dict[str, int]() for split in spans}
    for split, inside in spans.items():
        for index, span in enumerate(inside):
            name = form.name(split, index, len(inside))
            units[split][name] = span[1] - span[0]
            if name in staged.finished:
                source.advance(units[split][name])
            else:
                form.write(staged.root, name, source, span)
                staged.finish(name, {})
    io.write_text(staged.root / f"{release.unit}s.csv", _concepts_csv(source))
    if source.classes and options.format != "folders":
        lines = "".join(f"{path_name(name)}\n" for name in source.classes)
        io.write_text(staged.root / "classes.txt", lines)
    if options.format == "webdataset":
        # The number of samples in each tar, as open_clip and as timm look for it.
        sizes = {name: count for tars in units.values() for name, count in tars.items()}
        io.write_text(staged.root / "sizes.json", json.dumps(sizes))
        splits = {
            name or "train": {"name": name, "num_samples": sum(tars.values())}
            | {"filenames": [*tars], "shard_lengths": [*tars.values()]}
            for name, tars in units.items()
        }
        io.write_text(staged.root / "_info.json", json.dumps({"splits": splits}))
    files = [{"split": one, "path": str(form.data_files(one))} for one in options.splits]
    described = CardLayout(
        *(options.format, files or form.data_files(""), source.encoding(), options.shuffle),
        *(len(source.classes), source.counts()),
    )
    present, columns = as_table(source.concepts), release.metadata.column_names
    text = writer.card(release.described, present, columns, described)
    io.write_text(ReleasePaths(staged.root).card, text)


def _concepts_csv(source: ExportSource) -> str:
    """Return the text of an export's table of concepts; several prompts a line each."""
    release = source.release
    present = [replace(one, prompts=("\n".join(one.prompts),)) for one in source.concepts]
    if release.unit == "synset":
        return table_text(present)
    columns = ("id", "label", "wnid", "synset", "imagenet_class", "prompt", "negative_prompt")
    ids = pa.array([one.id for one in present], pa.string())
    first = source.table.take(pc.index_in(ids, source.table["id"])).select(release.user_columns)
    rows = (
        [getattr(one, name) for name in columns]
        + [json.dumps(value) if isinstance(value, list) else value for value in own.values()]
        for one, own in zip(present, first.to_pylist(), strict=True)
    )
    return io.csv_text((*columns, *release.user_columns), rows)


# --- A smaller release -------------------------------------------------------------------------
def _write_release(
    staged: StagedFolder, release: Release, spans: list[Span], advance: io.Advance
) -> None:
    """Fill a folder with a release of these rows, a part a span, images copied as they are."""
    write = partial(_write_part, release=release, advance=advance)
    plans = release.metadata["plan"].take(pa.array([start for start, _ in spans])).to_pylist()
    parts = (
        ({"rows": list(span)}, partial(write, span=span), plan or "")
        for span, plan in zip(spans, plans, strict=True)
    )
    writer.write_release(staged, writer.release_origin(release), parts, advance)
    keep_computed(release, ReleasePaths(staged.root))


def _write_part(
    path: Path, attributes: Attributes, release: Release, span: Span, advance: io.Advance
) -> str:
    table = release.metadata.slice(span[0], span[1] - span[0])
    parts, rows = table["part"].to_pylist(), table["row"].to_pylist()
    # Rows that follow one another in a part are copied as one range.
    places = enumerate(pairwise(zip(parts, rows, strict=True)), start=1)
    ends = [end for end, ((part, row), other) in places if other != (part, row + 1)]
    with ExitStack() as stack:
        files = {name: stack.enter_context(release.open_part(name)) for name in {*parts}}
        spans = pairwise([0, *ends, len(rows)])
        ranges = [(files[parts[start]], rows[start], rows[stop - 1] + 1) for start, stop in spans]
        return join(path, attributes, ranges, advance)


# --- Images that a file lists ------------------------------------------------------------------
def select_listed(release: Release, path: Path) -> Release:
    """Select the images that a file lists, in the release's order, each once.

    A table's first column of ``LISTED_BY`` names concepts, and ``number`` images. Without
    ``number``, and in a list of one concept a line, whole concepts are taken.
    """
    called = defaultdict[tuple[str, str], list[str]](list)
    for concept, key in product(release.present, LISTED_BY):
        if name := getattr(concept, key):
            called[key, io.canonical(name)].append(concept.id)
    ids, numbers = (release.metadata[name].to_pylist() for name in ("id", "number"))
    here = list(zip(ids, map(str, numbers), strict=True))
    # An image's id and number; without a number, all of the concept.
    known, chosen = {*here, *((id_, None) for id_ in ids)}, set[tuple[str, str | None]]()
    absent = dict[str, None]()
    for line in io.read_list(path, LISTED_BY):
        # A table that sdwn wrote for spreadsheets may have an apostrophe before it.
        names = (io.canonical(line.name), io.canonical(line.name).removeprefix("'"))
        keys = product(names, (line.key,) if line.key else LISTED_BY)
        found = filter(None, (called.get((key, name)) for name, key in keys))
        number = None if line.number is None else re.sub("^0+(?=.)", "", line.number)
        listed = known & {(id_, number) for id_ in next(found, [])}
        chosen |= listed
        if not listed:
            # A cell may hold anything: as repr() writes it, a name stays one line.
            words = names[0] if number is None else f"{names[0]} {number}"
            absent[f"{words[:40]!r}"] = None
    if absent:
        lacks = f"{path}: {release.paths.root} has no {some([*absent], 3)}"
        lists = f"a column {' or '.join(LISTED_BY)}, and number, or one {release.unit} a line"
        raise UsageError(f"{lacks}; take what it lacks off the list, which has {lists}")
    if not chosen:
        raise UsageError(f"{path}: lists no image; expected a line for each, below the header")
    rows = [one in chosen or (one[0], None) in chosen for one in here]
    return release.subset(rows=np.array(rows, dtype=bool))
