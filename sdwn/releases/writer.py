"""Writer of a release: its parts one after another, then the files that describe them.

::

    images-00000.h5, ...  ->  metadata.parquet  ->  synsets.csv, missing.csv, skipped.csv
                              (rows of a part,      -> README.md -> manifest.json -> SHA256SUMS
                              as it is added)          each covers what came before it
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import DatasetCardData
from jinja2 import Environment, PackageLoader, StrictUndefined, TemplateError

import sdwn
from sdwn.config import ModelConfig
from sdwn.errors import IntegrityError
from sdwn.io import Advance, atomic, csv_text, file_sha256, is_stray, now, sync, write_text
from sdwn.models.builtin import terms
from sdwn.paths import ReleasePaths
from sdwn.planning.plan import PlannedSynset, table_text
from sdwn.releases.release import FileRecord, Manifest, Missing, count_images, sums_text
from sdwn.releases.staged_folder import JOURNAL, StagedFolder
from sdwn.storage.codecs import CODECS
from sdwn.storage.columns import BLACK, COLUMNS, Table, names, texts
from sdwn.storage.shards import ImageFile
from sdwn.wordnet.taxonomy import write_taxonomy

# What distinguishes a run of a task from others on the same kind of device.
_OF_ONE_TASK_RUN = ("host", "job", "started")

# What a manifest has of the origin as it is.
RECORDED = (
    *("origin", "catalog", "source", "licence", "selection"),
    *("plan_digest", "settings", "evaluation"),
)

Attributes = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Origin:
    """The origin of a release's images: what its manifest records beside counts.

    ``synsets`` are all of the plan, with or without images here. ``taxonomy`` is what WordNet
    records of them, None for an old run.
    """

    origin: str
    catalog: str
    synsets: tuple[PlannedSynset, ...]
    plan_digest: str | None = None
    settings: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    source: str | None = None
    licence: str | None = None
    selection: str | None = None
    missing: tuple[PlannedSynset, ...] = ()  # what the run had not made
    missing_shards: str = ""
    skipped: tuple[tuple[str, str], ...] = ()  # files that could not be taken, and why
    taxonomy: pa.Table | None = None


class ReleaseWriter:
    """Writer of a release into a folder; leaving the block after its last part describes them."""

    def __init__(
        self, staged: StagedFolder, origin: Origin, advance: Advance = lambda _: None
    ) -> None:
        self._staged, self._origin, self._advance = staged, origin, advance
        self._paths = ReleasePaths(staged.root)
        self._classes = {row.wnid: row.imagenet_class for row in origin.synsets}
        self._files: list[FileRecord] = []
        self._metadata: pq.ParquetWriter | None = None
        self._task_runs: dict[str, str] = {}

    def __enter__(self) -> ReleaseWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._metadata is not None:
            self._metadata.close()
            self._metadata_file.close()
        if kind is None:
            self._describe()

    def add_part(self, inputs: Any, write: Callable[[Path, Attributes], str]) -> None:
        """Add a part; one that a killed attempt has finished is kept, and reported as progress.

        ``write`` writes the file, with the attributes given, and returns its SHA-256; ``inputs``
        says in JSON's terms what it is made of.
        """
        path, origin = self._paths.part(len(self._files)), self._origin
        # A kill may fall between a part and its record, and a disk may fail between attempts.
        digest = file_sha256(path) if path.is_file() else ""
        finished = {"inputs": json.loads(json.dumps(inputs)), "sha256": digest}
        kept = self._staged.finished.get(path.name) == finished
        if not kept:
            attributes = {
                "kind": "part",
                "plan_digest": origin.plan_digest or "",
                "model": origin.settings["model"]["name"] if origin.settings else "",
                "settings": json.dumps(origin.settings or {}),
            }
            with atomic(path) as temporary:
                digest = write(temporary, attributes)
            self._staged.finish(path.name, {"inputs": inputs, "sha256": digest})
        self._record(path, digest)
        with ImageFile(path) as file:
            if kept:
                self._advance(len(file))
            offsets, sessions = file.offsets + np.uint64(file.blob_start), file.sessions
            batch = metadata_table(path.name, file.rows(), offsets, self._classes)
        if self._metadata is None:
            # Arrow takes a path as text, and not every path is.
            self._metadata_file = self._paths.metadata.open("wb")
            self._metadata = pq.ParquetWriter(self._metadata_file, batch.schema, compression="zstd")
        self._metadata.write_table(batch)
        for session in sessions:
            same = {key: value for key, value in session.items() if key not in _OF_ONE_TASK_RUN}
            # A task run is recorded in each part that has images of it.
            self._task_runs[json.dumps(session, sort_keys=True)] = json.dumps(same, sort_keys=True)

    def _record(self, path: Path, digest: str | None = None) -> None:
        digest = digest or file_sha256(path)
        self._files.append(FileRecord(file=path.name, bytes=path.stat().st_size, sha256=digest))

    def _describe(self) -> None:
        """Write tables, card, manifest and checksums; each covers those before it."""
        origin, paths = self._origin, self._paths
        # What attempts under other options have left.
        kept = {JOURNAL, paths.metadata.name, *(file.file for file in self._files)}
        for path in paths.root.iterdir():
            if path.name not in kept and not is_stray(path.name):
                path.unlink()
        sync(paths.metadata)
        self._record(paths.metadata)
        write_text(paths.synsets, table_text(origin.synsets))
        self._record(paths.synsets)
        if origin.taxonomy is not None:
            write_taxonomy(paths.taxonomy, origin.taxonomy)
            self._record(paths.taxonomy)
        missing = None
        if origin.missing:
            rows = [(row.wnid, row.synset) for row in origin.missing]
            write_text(paths.missing, csv_text(("wnid", "synset"), rows))
            self._record(paths.missing)
            each = origin.settings["images_per_synset"] if origin.settings else 0
            missing = Missing(
                shards=origin.missing_shards, synsets=len(rows), images=len(rows) * each
            )
        if origin.skipped:
            write_text(paths.skipped, csv_text(("file", "reason"), origin.skipped))
            self._record(paths.skipped)
        with paths.metadata.open("rb") as content, pq.ParquetFile(content) as file:
            columns = file.schema_arrow.names
            counting = {"wnid", "status", "truncated", "redone"} & set(columns)
            table = file.read(columns=sorted(counting))
        wnids = set(table["wnid"].unique().to_pylist())
        present = [row for row in origin.synsets if row.wnid in wnids]
        kinds = Counter(self._task_runs.values()) if origin.origin == "run" else Counter[str]()
        manifest = Manifest(
            sdwn=sdwn.__version__,
            created=now(),
            **{name: getattr(origin, name) for name in RECORDED},
            **count_images(table, present),
            missing=missing,
            skipped=len(origin.skipped),
            bytes=sum(file.bytes for file in self._files),
            made_on=[{**json.loads(kind), "task_runs": n} for kind, n in sorted(kinds.items())],
            files=self._files,
        )
        write_text(paths.card, card(manifest, present, columns))
        self._record(paths.card)
        manifest = manifest.model_copy(update={"files": self._files})
        write_text(paths.manifest, manifest.model_dump_json(indent=2) + "\n")
        digests = {file.file: file.sha256 for file in self._files}
        digests[paths.manifest.name] = file_sha256(paths.manifest)
        write_text(paths.sums, sums_text(digests))


def cut_parts(sizes: Sequence[float], least: float) -> list[tuple[int, int]]:
    """Cut a row of sizes into spans of at least ``least``; what is left goes with the last.

    So a span of small things has less than twice ``least``.

    >>> cut_parts([3, 3, 3, 3, 3], 5)
    [(0, 2), (2, 5)]
    """
    ends, total = list[int](), 0.0
    for end, size in enumerate(sizes, start=1):
        total += size
        if total >= least:
            ends.append(end)
            total = 0
    ends[-1:] = [len(sizes)]
    return list(pairwise([0, *ends]))


_FIRST = ("wnid", "synset", "number", "status", "imagenet_class", "part", "row", "offset", "bytes")


def metadata_table(
    part: str, rows: Table, offsets: Any, classes: Mapping[str, int | None]
) -> pa.Table:
    """Return the rows of a part as Arrow, with each image's location and its ImageNet class.

    Image i is the bytes ``offsets[i]`` to ``offsets[i + 1]`` of the file named ``part``.
    """
    wnids = texts(rows["wnid"])
    columns: dict[str, Any] = {
        "part": pa.array([part] * len(wnids)).dictionary_encode(),
        "row": pa.array(range(len(wnids)), pa.uint32()),
        "offset": pa.array(offsets[:-1], pa.uint64()),
        "bytes": pa.array(np.diff(offsets), pa.uint32()),
        "imagenet_class": pa.array([classes.get(wnid) for wnid in wnids], pa.int16()),
    }
    for name, values in rows.items():
        if name in ("status", "codec"):
            columns[name] = pa.array(names(values, name))
        elif name == "sha256":
            columns[name] = pa.array([value.tobytes().hex() for value in values])
        else:
            columns[name] = pa.array(texts(values) if values.dtype.kind == "S" else values)
    order = (*_FIRST, *sorted(set(columns) - set(_FIRST)))
    return pa.table({name: columns[name] for name in order})


# --- The dataset card --------------------------------------------------------------------------

# Identifiers as the hub has them; each model's page states its own.
LICENCES = {
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2": "openrail++",
    "stabilityai/stable-diffusion-2-base": "openrail++",
    "stabilityai/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-2-1-base": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "PixArt-alpha/PixArt-XL-2-1024-MS": "openrail++",
}


class CardLayout(NamedTuple):
    """A layout of files, which a template of its name describes.

    ``data_files`` are those that a hub should load, where it does not find them itself;
    ``encoding`` is of the images, where it is not the release's own.
    """

    name: str
    data_files: str | None
    encoding: str | None = None


RELEASE = CardLayout("release", "metadata.parquet")


def card(
    manifest: Manifest,
    present: Sequence[PlannedSynset],
    columns: Collection[str],
    layout: CardLayout = RELEASE,
) -> str:
    """Return the dataset card of a release or an export as Markdown; hubs read its YAML header.

    ``present`` are the synsets that have images there, ``columns`` those of their records.
    """
    environment = Environment(
        loader=PackageLoader("sdwn", "templates/card"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML
    )
    environment.filters["md"] = _escaped
    settings = manifest.settings
    try:
        model, encoding, licence = None, "as imported", manifest.licence
        title, tags, tasks = manifest.name, ["wordnet", "imagenet"], ["image-classification"]
        if settings:
            model, storage = ModelConfig(**settings["model"]), settings["storage"]
            loss = CODECS[storage["codec"]].loss(storage["quality"])
            encoding, licence = f"{storage['codec']}, {loss}", LICENCES.get(model.name)
            title = f"{model.name if model.builtin else 'Stable Diffusion'} x {title}"
            tags = tags if model.builtin else ["stable-diffusion", *tags]
        if manifest.origin == "run":
            tags = ["synthetic", *tags]
            tasks.append("text-to-image")  # imports may have no prompts to learn from
        optional: dict[str, Any] = {} if licence else {"license_name": "see-the-card"}
        if layout.data_files:
            optional["configs"] = [{"config_name": "default", "data_files": layout.data_files}]
        # The hub's size classes, up to 10M<n<100M.
        bounds = ("1K", "10K", "100K", "1M", "10M", "100M")
        power = min(len(str(manifest.images)) - len("1000"), len(bounds) - 2)
        size = "n<1K" if power < 0 else f"{bounds[power]}<n<{bounds[power + 1]}"
        header = DatasetCardData(
            language="en",
            license=licence or "other",
            pretty_name=title,
            task_categories=tasks,
            size_categories=size,
            tags=tags,
            **optional,
        )
        same = Counter(row.prompt for row in present if row.prompt)
        return environment.get_template("card.md").render(
            header=str(header.to_yaml()).strip(),
            manifest=manifest,
            settings=settings,
            terms=terms(model.name) if model else None,
            licence=licence if model else None,
            hub_model=model and not model.builtin and model.name.count("/") == 1,
            black=sum(manifest.statuses.get(name, 0) for name in BLACK),
            same=sum(count for count in same.values() if count > 1),
            layout=layout.name,
            encoding=layout.encoding or encoding,
            example=present[0].synset if present else "dog.n.01",
            columns=[column for column in COLUMNS if column.name in columns],
        )
    except (TemplateError, LookupError, TypeError, ValueError) as error:
        raise IntegrityError(f"the manifest's settings are damaged: {error}") from None


def _escaped(value: Any) -> str:
    r"""Keep a value within its line and its cell.

    >>> _escaped("a|b\nc `d`")
    'a\\|b c d'
    """
    return " ".join(str(value).split()).replace("|", "\\|").replace("`", "").replace("<", "&lt;")
