"""Writer of a release: its parts one after another, then the files that describe them.

::

    images-00000.h5, ...  ->  metadata.parquet  ->  concepts.parquet, missing.csv, skipped.csv
                              (rows of a part,      -> README.md -> manifest.json -> SHA256SUMS
                              as it is added)          each covers what came before it
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from huggingface_hub import DatasetCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

import sdwn
from sdwn.config import ModelConfig
from sdwn.errors import IntegrityError
from sdwn.io import Advance, atomic, csv_text, file_sha256, is_stray, now, sync, write_text
from sdwn.models.builtin import terms
from sdwn.paths import ReleasePaths
from sdwn.planning.plan import Concept, Plan, image_settings
from sdwn.planning.tables import SCHEMA, as_table, write_concepts
from sdwn.releases.release import (
    FileRecord,
    Manifest,
    Missing,
    Release,
    ReleasePlan,
    count_images,
    user_columns,
)
from sdwn.releases.staged_folder import JOURNAL, StagedFolder
from sdwn.storage.codecs import CODECS
from sdwn.storage.columns import BLACK, COLUMNS, Table, names, texts, write_parquet
from sdwn.storage.shards import ImageFile
from sdwn.wordnet.taxonomy import read_taxonomy

Attributes = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Origin:
    """The origin of a release's images; ``record`` is what its manifest has of it as it is.

    ``plans`` have all their concepts, with or without images here; an import has no plan, only
    ``imported`` concepts. ``taxonomy`` is what WordNet records of them, None for an old run.
    """

    record: Mapping[str, Any]
    plans: tuple[Plan, ...] = ()
    imported: Sequence[Concept] = ()
    missing: Sequence[Concept] = ()  # what the run had not made
    missing_shards: str = ""
    skipped: Sequence[Sequence[str]] = ()  # files that could not be taken, and why
    taxonomy: pa.Table | None = None


def release_origin(release: Release) -> Origin:
    """Return the origin of the images of a release, or of a subset."""
    described, paths = release.described, release.paths
    skipped, taxonomy = "", release.part(paths.taxonomy.name)
    if described.skipped:
        skipped = release.part(paths.skipped.name).read_text(encoding="utf-8")
    recorded = {"origin", "catalog", "source", "licence", "selection", "evaluation"}
    return Origin(
        described.model_dump(include=recorded),
        plans=tuple(release.plan(one.digest) for one in described.plans),
        imported=() if described.plans else [*release.concepts.values()],
        missing=release.missing,
        missing_shards=described.missing.shards if described.missing else "",
        skipped=[*csv.reader(StringIO(skipped))][1:],
        taxonomy=read_taxonomy(taxonomy) if taxonomy.exists() else None,
    )


# What a part is made of, in JSON's terms; what writes it, with the attributes given, and returns
# its SHA-256; and the digest of its plan, empty for an import.
Part = tuple[Any, Callable[[Path, Attributes], str], str]


def write_release(
    staged: StagedFolder, origin: Origin, parts: Iterable[Part], advance: Advance = lambda _: None
) -> None:
    """Write a release's parts into a folder, then the files that describe them.

    ``advance`` is called with the number of images of a part that a killed attempt has finished.
    """
    paths, sums, task_runs = ReleasePaths(staged.root), dict[str, str](), dict[str, str]()
    concepts = {plan.digest: plan.table for plan in origin.plans} or {"": as_table(origin.imported)}
    settings = {plan.digest: image_settings(plan.config) for plan in origin.plans}
    images = Counter[str]()
    # Not a path, for Arrow takes one as text, and not every path is.
    with paths.metadata.open("wb") as metadata, ExitStack() as stack:
        writer: pq.ParquetWriter | None = None
        for inputs, write, plan in parts:
            path = paths.part(len(sums))
            if plan not in concepts:  # what it is copied from was altered
                foreign = f"foreign: of plan {plan[:12] or 'none'}, which its release does not list"
                raise IntegrityError(f"{path.name}: {foreign}; get the release again")
            # A kill may fall between a part and its record, and a disk may fail between attempts.
            digest = file_sha256(path) if path.is_file() else ""
            finished = {"inputs": json.loads(json.dumps(inputs)), "sha256": digest}
            kept = staged.finished.get(path.name) == finished
            if not kept:
                of_plan = settings.get(plan, {})
                attributes = {"kind": "part", "plan_digest": plan}
                attributes["model"] = of_plan["model"]["name"] if of_plan else ""
                with atomic(path) as temporary:
                    digest = write(temporary, {**attributes, "settings": json.dumps(of_plan)})
                staged.finish(path.name, {"inputs": inputs, "sha256": digest})
            sums[path.name] = digest
            with ImageFile(path) as file:
                if kept:
                    advance(len(file))
                offsets, made = file.offsets + np.uint64(file.blob_start), file.task_runs
                images[plan] += len(file)
                table = metadata_table(path.name, file.rows(), offsets, concepts[plan], plan)
            if writer is None:
                # A release may have grown by a table with further columns of its user.
                own = (one.drop_columns(SCHEMA.names).schema for one in concepts.values())
                schema = pa.unify_schemas([table.schema, *own])
                writer = stack.enter_context(pq.ParquetWriter(metadata, schema, compression="zstd"))
            both = [schema.empty_table(), table]
            writer.write_table(pa.concat_tables(both, promote_options="default"))
            del table, both, file  # not beside the rows of the next part
            for run in made:  # which each part that has images of it records
                key = json.dumps(run, sort_keys=True)
                # Others on the same kind of device differ in these alone.
                alike = {n: v for n, v in run.items() if n not in ("host", "job", "started")}
                task_runs[key] = json.dumps(alike, sort_keys=True)
    # What attempts under other options have left.
    written = {JOURNAL, paths.metadata.name, paths.evaluations.name, *sums}
    for path in paths.root.iterdir():
        if path.name not in written and not is_stray(path.name):
            path.unlink()
    sync(paths.metadata)
    plans = [
        ReleasePlan(
            digest=plan.digest,
            catalog=plan.catalog,
            settings=settings[plan.digest],
            concepts=paths.concepts(number).name,
            images=images[plan.digest],
        )
        for number, plan in enumerate(origin.plans)
    ]
    for number, one in enumerate(concepts.values()):
        write_concepts(paths.concepts(number), one)
    kinds = sorted(Counter(task_runs.values()).items()) if plans else []
    made_on = [{**json.loads(kind), "task_runs": count} for kind, count in kinds]
    _describe(paths, origin, sums, {**origin.record, "plans": plans, "made_on": made_on})


def _describe(paths: ReleasePaths, origin: Origin, sums: dict[str, str], made: Any) -> None:
    """Write tables, card, the manifest, which begins with ``made``, and all checksums."""

    def record(path: Path) -> FileRecord:
        sha256 = sums.get(path.name) or file_sha256(path)
        return FileRecord(file=path.name, bytes=path.stat().st_size, sha256=sha256)

    missing = None
    if origin.taxonomy is not None:
        write_parquet(paths.taxonomy, origin.taxonomy)
    if origin.missing:
        rows = [(row.id, row.name, row.images) for row in origin.missing]
        write_text(paths.missing, csv_text(("id", "name", "images"), rows))
        images = sum(row.images for row in origin.missing)
        missing = Missing(shards=origin.missing_shards, concepts=len(rows), images=images)
    if origin.skipped:
        write_text(paths.skipped, csv_text(("file", "reason"), origin.skipped))
    with paths.metadata.open("rb") as content, pq.ParquetFile(content) as file:
        columns = file.schema_arrow.names
        counted = sorted({"id", "status", "truncated", "retried_fp32"}.intersection(columns))
        # A part's rows at a time: of ten million images all would be a gigabyte.
        tables = (file.read_row_group(part, counted) for part in range(file.num_row_groups))
        known = [plan.table for plan in origin.plans] or [as_table(origin.imported)]
        counts, present = count_images(tables, known)
    concepts = map(paths.concepts, range(max(1, len(origin.plans))))
    tabled = (paths.metadata, *concepts, paths.taxonomy, paths.missing, paths.skipped)
    every_file = (*map(paths.root.joinpath, sums), *tabled)
    files = [record(path) for path in every_file if path.exists()]
    manifest = Manifest(
        sdwn=sdwn.__version__,
        created=now(),
        **made,
        **counts,
        missing=missing,
        skipped=len(origin.skipped),
        bytes=sum(file.bytes for file in files),
        files=files,
    )
    layout = CardLayout("release", "metadata.parquet")
    write_text(paths.card, card(manifest, present, columns, layout))
    manifest = manifest.model_copy(update={"files": [*files, record(paths.card)]})
    write_text(paths.manifest, manifest.model_dump_json(indent=2) + "\n")
    write_text(paths.sums, manifest.sums(file_sha256(paths.manifest)))


def cut_parts(sizes: Sequence[float], least: float) -> list[tuple[int, int]]:
    """Cut a row of sizes into spans of at least ``least``; what is left goes with the last.

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


_FIRST = (
    *("id", "label", "wnid", "synset", "number", "status", "imagenet_class", "plan"),
    *("part", "row", "offset", "bytes"),
)


def metadata_table(part: str, rows: Table, offsets: Any, concepts: pa.Table, plan: str) -> pa.Table:
    """Return the rows of a part as Arrow: each image's location, and what its concept adds."""
    ids = pa.array(texts(rows["id"]))
    own = [name for name in concepts.column_names if name not in SCHEMA.names]
    found = concepts.select(["label", "imagenet_class", *own]).take(
        pc.index_in(ids, concepts["id"].combine_chunks())
    )
    columns: dict[str, Any] = {
        "id": ids,
        "label": pc.fill_null(found["label"], ""),
        "plan": pa.array([plan or None] * len(ids), pa.string()).dictionary_encode(),
        "part": pa.array([part] * len(ids)).dictionary_encode(),
        "row": pa.array(range(len(ids)), pa.uint32()),
        "offset": pa.array(offsets[:-1], pa.uint64()),
        "bytes": pa.array(np.diff(offsets), pa.uint32()),
        "imagenet_class": found["imagenet_class"],
    }
    for name, values in rows.items():
        if name in ("status", "codec"):
            columns[name] = pa.array(names(values, name))
        elif name == "sha256":
            columns[name] = pa.array([value.tobytes().hex() for value in values])
        elif name in ("wnid", "synset"):
            columns[name] = pa.array([text or None for text in texts(values)], pa.string())
        else:
            columns[name] = pa.array(texts(values) if values.dtype.kind == "S" else values)
    order = (*_FIRST, *sorted(set(columns) - set(_FIRST)))
    return pa.table({name: columns[name] for name in order} | {n: found[n] for n in own})


# --- The dataset card --------------------------------------------------------------------------

# Identifiers as the hub has them; each model's page states its own.
LICENCES = {
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    **{
        f"stabilityai/stable-diffusion-{name}": "openrail++"
        for name in ("2", "2-base", "2-1", "2-1-base", "xl-base-1.0")
    },
    "PixArt-alpha/PixArt-XL-2-1024-MS": "openrail++",
}


class CardLayout(NamedTuple):
    """A layout of files, which a template of its name describes.

    ``data_files`` are those that a hub should load, where it does not find them itself;
    ``encoding`` is of the images, where it is not the release's own; ``shuffle`` the seed of their
    order, if they are in none by concept; ``splits`` has the numbers of each split.
    """

    name: str
    data_files: str | list[dict[str, str]] | None
    encoding: str | None = None
    shuffle: int | None = None
    classes: int = 0  # that labels to train on are of
    splits: Mapping[str, Mapping[str, int]] = {}


# Markdown, not HTML.
_CARDS = Environment(
    loader=PackageLoader("sdwn", "templates/card"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,
)
# A value keeps within its line and its cell of a table.
_MARKS = str.maketrans({"|": "\\|", "`": "", "<": "&lt;"})
_CARDS.filters["md"] = lambda value: " ".join(str(value).split()).translate(_MARKS)


def card(
    manifest: Manifest,
    present: pa.Table,
    columns: Collection[str],
    layout: CardLayout,
) -> str:
    """Return the dataset card of a release or an export as Markdown; hubs read its YAML header.

    ``present`` are the concepts that have images there.
    """
    settings, made = manifest.settings, manifest.origin == "run"
    model, encoding, licence, title = None, "as imported", manifest.licence, manifest.name
    if settings:
        model, storage = ModelConfig(**settings["model"]), settings["storage"]
        encoding = f"{storage['codec']}, {CODECS[storage['codec']].loss(storage['quality'])}"
        licence, title = LICENCES.get(model.name), f"{model.name} x {title}"
    optional: dict[str, Any] = {} if licence else {"license_name": "see-the-card"}
    if layout.data_files:
        optional["configs"] = [{"config_name": "default", "data_files": layout.data_files}]
    wordnet = present["wnid"].null_count < len(present)
    bounds = ("1K", "10K", "100K", "1M", "10M", "100M")  # the hub's size classes, up to 10M<n<100M
    power = min(len(str(manifest.images)) - len("1000"), len(bounds) - 2)
    header = DatasetCardData(
        language="en",
        license=licence or "other",
        pretty_name=title,
        # Imports may have no prompts to learn from.
        task_categories=["image-classification"] + ["text-to-image"] * made,
        size_categories="n<1K" if power < 0 else f"{bounds[power]}<n<{bounds[power + 1]}",
        tags=["synthetic"] * made
        + ["stable-diffusion"] * (model is not None and "stable-diffusion" in model.name)
        + ["wordnet", "imagenet"] * wordnet,
        **optional,
    )
    first = pc.list_flatten(pc.list_slice(present["prompts"], 0, 1))
    # Their hashes, for a million different texts would be here twice.
    hashes = (hash(text) for chunk in first.chunks for text in chunk.to_pylist())
    _, alike = np.unique(np.fromiter(hashes, np.int64), return_counts=True)
    unit = "synset" if present["id"].equals(present["wnid"]) else "concept"
    labelled = not pc.any(pc.equal(present["label"], "")).as_py()
    labels = ', labels="label"' if labelled else ", labels=None"
    most = pc.min_max(pc.add(present["first_image"], present["images"])).as_py()
    return _CARDS.get_template("card.md").render(
        header=str(header.to_yaml()).strip(),
        manifest=manifest,
        settings=settings,
        terms=terms(model.name) if model else None,
        licence=licence if model else None,
        hub_model=model and not model.builtin and model.name.count("/") == 1,
        black=sum(manifest.statuses.get(name, 0) for name in BLACK),
        same=int(alike[alike > 1].sum()),
        layout=layout.name,
        export=layout,
        split=next(iter(layout.splits), ""),
        encoding=layout.encoding or encoding,
        unit=unit,
        key="wnid" if unit == "synset" else "id",
        each=" to ".join(str(count or 0) for count in dict.fromkeys(most.values())),
        example=present["synset" if unit == "synset" else "id"][0].as_py() if present else "",
        labels=labels if present["wnid"].null_count else "",
        wordnet=wordnet,
        columns=[column for column in COLUMNS if column.name in columns],
        own=user_columns(columns),
    )
