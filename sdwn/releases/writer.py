"""Writer of a release: its parts one after another, then the files that describe them.

::

    images-00000.h5, ...  ->  metadata.parquet  ->  concepts.parquet, missing.csv, skipped.csv
                              (rows of a part,      -> README.md -> manifest.json -> SHA256SUMS
                              as it is added)          each covers what came before it
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, pairwise
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
from sdwn.io import Advance, atomic, csv_text, file_sha256, is_stray, now, sync, write_text
from sdwn.models.builtin import terms
from sdwn.paths import ReleasePaths
from sdwn.planning.plan import Concept, Plan, image_settings
from sdwn.planning.tables import SCHEMA, as_table, write_concepts
from sdwn.releases.release import (
    FileRecord,
    Manifest,
    Missing,
    ReleasePlan,
    count_images,
    sums_text,
    user_columns,
)
from sdwn.releases.staged_folder import JOURNAL, StagedFolder
from sdwn.storage.codecs import CODECS
from sdwn.storage.columns import BLACK, COLUMNS, Table, names, texts, write_parquet
from sdwn.storage.shards import ImageFile

# What a smaller release takes over into its manifest.
RECORDED = ("origin", "catalog", "source", "licence", "selection", "evaluation")

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


# What a part is made of, in JSON's terms; what writes it, with the attributes given, and returns
# its SHA-256; and the index of its plan in the origin.
Part = tuple[Any, Callable[[Path, Attributes], str], int]


def write_release(
    staged: StagedFolder, origin: Origin, parts: Iterable[Part], advance: Advance = lambda _: None
) -> None:
    """Write a release's parts into a folder, then the files that describe them.

    ``advance`` is called with the number of images of a part that a killed attempt has finished.
    """
    paths, sums, task_runs = ReleasePaths(staged.root), dict[str, str](), dict[str, str]()
    concepts = [plan.table for plan in origin.plans] or [as_table(origin.imported)]
    images = [0] * len(concepts)
    attributes: list[dict[str, Any]] = [
        {
            "kind": "part",
            "plan_digest": plan.digest if plan else "",
            "model": plan.config.model.name if plan else "",
            "settings": json.dumps(image_settings(plan.config) if plan else {}),
        }
        for plan in origin.plans or [None]
    ]
    # Not a path, for Arrow takes one as text, and not every path is.
    with paths.metadata.open("wb") as metadata, ExitStack() as stack:
        writer: pq.ParquetWriter | None = None
        for inputs, write, of_plan in parts:
            path = paths.part(len(sums))
            # A kill may fall between a part and its record, and a disk may fail between attempts.
            digest = file_sha256(path) if path.is_file() else ""
            finished = {"inputs": json.loads(json.dumps(inputs)), "sha256": digest}
            kept = staged.finished.get(path.name) == finished
            if not kept:
                with atomic(path) as temporary:
                    digest = write(temporary, attributes[of_plan])
                staged.finish(path.name, {"inputs": inputs, "sha256": digest})
            sums[path.name] = digest
            with ImageFile(path) as file:
                if kept:
                    advance(len(file))
                offsets, made = file.offsets + np.uint64(file.blob_start), file.task_runs
                images[of_plan] += len(file)
                plan = file.attributes.get("plan_digest")
                table = metadata_table(path.name, file.rows(), offsets, concepts[of_plan], plan)
            if writer is None:
                # A release may have grown by a table with further columns of its user.
                own = (one.drop_columns(SCHEMA.names).schema for one in concepts)
                schema = pa.unify_schemas([table.schema, *own])
                writer = pq.ParquetWriter(metadata, schema, compression="zstd")
                stack.enter_context(writer)
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
            settings=image_settings(plan.config),
            concepts=paths.concepts(number).name,
            images=images[number],
        )
        for number, plan in enumerate(origin.plans)
    ]
    for number, one in enumerate(concepts):
        write_concepts(paths.concepts(number), one)
    _describe(paths, origin, plans, sums, Counter(task_runs.values()))


def _describe(
    paths: ReleasePaths,
    origin: Origin,
    plans: list[ReleasePlan],
    sums: dict[str, str],
    task_runs: Counter[str],
) -> None:
    """Write tables, card, manifest and checksums; ``sums`` has those of the parts."""

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
        wanted, ids = {"status", "truncated", "retried_fp32"}.intersection(columns), set[str]()
        for part in range(file.num_row_groups):
            ids |= set(file.read_row_group(part, ["id"])["id"].unique().to_pylist())
        # A concept that several plans make images of counts once.
        every = chain(*(plan.concepts for plan in origin.plans), origin.imported)
        present = list({row.id: row for row in every if row.id in ids}.values())
        # A part's rows at a time: of ten million images all would be a gigabyte.
        tables = (file.read_row_group(part, sorted(wanted)) for part in range(file.num_row_groups))
        counts = count_images(tables, present)
    concepts = map(paths.concepts, range(max(1, len(plans))))
    tabled = (paths.metadata, *concepts, paths.taxonomy, paths.missing, paths.skipped)
    written = [*(paths.root / name for name in sums), *filter(Path.exists, tabled)]
    files = list(map(record, written))
    kinds = sorted(task_runs.items()) if origin.plans else []
    manifest = Manifest(
        sdwn=sdwn.__version__,
        created=now(),
        **origin.record,
        **counts,
        plans=plans,
        missing=missing,
        skipped=len(origin.skipped),
        bytes=sum(file.bytes for file in files),
        made_on=[{**json.loads(kind), "task_runs": count} for kind, count in kinds],
        files=files,
    )
    write_text(paths.card, card(manifest, present, columns))
    manifest = manifest.model_copy(update={"files": [*files, record(paths.card)]})
    write_text(paths.manifest, manifest.model_dump_json(indent=2) + "\n")
    found = {file.file: file.sha256 for file in [*manifest.files, record(paths.manifest)]}
    write_text(paths.sums, sums_text(found))


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


def metadata_table(part: str, rows: Table, offsets: Any, concepts: pa.Table, plan: Any) -> pa.Table:
    """Return the rows of a part as Arrow: each image's location, and what its concept adds."""
    ids = pa.array(texts(rows["id"]))
    own = [name for name in concepts.column_names if name not in SCHEMA.names]
    found = concepts.select(["label", "imagenet_class", *own]).take(
        pc.index_in(ids, concepts["id"].combine_chunks())
    )
    columns: dict[str, Any] = {
        "id": ids,
        "label": pc.fill_null(found["label"], ""),
        "plan": pa.array([str(plan) if plan else None] * len(ids), pa.string()).dictionary_encode(),
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


RELEASE = CardLayout("release", "metadata.parquet")


def card(
    manifest: Manifest,
    present: Sequence[Concept],
    columns: Collection[str],
    layout: CardLayout = RELEASE,
) -> str:
    """Return the dataset card of a release or an export as Markdown; hubs read its YAML header."""
    environment = Environment(
        loader=PackageLoader("sdwn", "templates/card"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML
    )
    # A value keeps within its line and its cell of a table.
    marks = str.maketrans({"|": "\\|", "`": "", "<": "&lt;"})
    environment.filters["md"] = lambda value: " ".join(str(value).split()).translate(marks)
    settings, made = manifest.settings, manifest.origin == "run"
    model, encoding, licence, title = None, "as imported", manifest.licence, manifest.name
    if settings:
        model, storage = ModelConfig(**settings["model"]), settings["storage"]
        encoding = f"{storage['codec']}, {CODECS[storage['codec']].loss(storage['quality'])}"
        licence, title = LICENCES.get(model.name), f"{model.name} x {title}"
    optional: dict[str, Any] = {} if licence else {"license_name": "see-the-card"}
    if layout.data_files:
        optional["configs"] = [{"config_name": "default", "data_files": layout.data_files}]
    wordnet = any(row.wnid for row in present)
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
    same = Counter(row.prompt for row in present if row.prompt)
    unit = "synset" if all(row.id == row.wnid for row in present) else "concept"
    labels = ', labels="label"' if all(row.label for row in present) else ", labels=None"
    counts = sorted({row.first_image + row.images for row in present} or {0})
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
        export=layout,
        split=next(iter(layout.splits), ""),
        encoding=layout.encoding or encoding,
        unit=unit,
        key="wnid" if unit == "synset" else "id",
        each=" to ".join(map(str, dict.fromkeys((counts[0], counts[-1])))),
        example=(present[0].synset if unit == "synset" else present[0].id) if present else "",
        labels="" if all(row.wnid for row in present) else labels,
        wordnet=wordnet,
        columns=[column for column in COLUMNS if column.name in columns],
        own=user_columns(columns),
    )
