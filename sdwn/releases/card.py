"""The dataset card of a release or an export; dataset hubs read its YAML header."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from huggingface_hub import DatasetCardData
from jinja2 import Environment, PackageLoader, StrictUndefined, TemplateError

from sdwn.config import ModelConfig
from sdwn.errors import IntegrityError
from sdwn.models.builtin import terms
from sdwn.planning.plan import PlannedSynset
from sdwn.releases.manifest import Manifest
from sdwn.storage.codecs import CODECS
from sdwn.storage.columns import BLACK, COLUMNS

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
    """Return the card as Markdown.

    Args:
        manifest: of the release.
        present: the synsets that have images here.
        columns: the names of their records' columns.
        layout: of the files.

    Raises:
        IntegrityError: the manifest's settings are damaged.
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
        model = ModelConfig(**settings["model"]) if settings else None
        encoding = layout.encoding
        if encoding is None:
            encoding = _encoding(settings["storage"]) if settings else "as imported"
        prompts = Counter(row.prompt for row in present if row.prompt)
        return environment.get_template("card.md").render(
            header=_header(manifest, model, layout.data_files),
            manifest=manifest,
            settings=settings,
            terms=terms(model.name) if model else None,
            licence=LICENCES.get(model.name) if model else None,
            hub_model=model and not model.builtin and model.name.count("/") == 1,
            black=sum(manifest.statuses.get(name, 0) for name in BLACK),
            same=sum(count for count in prompts.values() if count > 1),
            example=present[0].synset if present else "dog.n.01",
            layout=layout.name,
            encoding=encoding,
            columns=[column for column in COLUMNS if column.name in columns],
        )
    except (TemplateError, LookupError, TypeError, ValueError) as error:
        raise IntegrityError(f"the manifest's settings are damaged: {error}") from None


def _header(manifest: Manifest, model: ModelConfig | None, data_files: str | None) -> str:
    name, tags, tasks = manifest.name, ["wordnet", "imagenet"], ["image-classification"]
    licence = LICENCES.get(model.name) if model else manifest.licence
    if model is not None:
        name = f"{model.name if model.builtin else 'Stable Diffusion'} x {name}"
        if not model.builtin:
            tags = ["stable-diffusion", *tags]
    if manifest.origin == "run":
        tags = ["synthetic", *tags]
        tasks.append("text-to-image")  # imports may have no prompts to learn from
    optional: dict[str, Any] = {} if licence else {"license_name": "see-the-card"}
    if data_files:
        optional["configs"] = [{"config_name": "default", "data_files": data_files}]
    data = DatasetCardData(
        language="en",
        license=licence or "other",
        pretty_name=name,
        task_categories=tasks,
        size_categories=size_category(manifest.images),
        tags=tags,
        **optional,
    )
    return str(data.to_yaml()).strip()


def _encoding(storage: dict[str, Any]) -> str:
    return f"{storage['codec']}, {CODECS[storage['codec']].loss(storage['quality'])}"


def _escaped(value: Any) -> str:
    r"""Keep a value within its line and its cell.

    >>> _escaped("a|b\nc `d`")
    'a\\|b c d'
    """
    return " ".join(str(value).split()).replace("|", "\\|").replace("`", "").replace("<", "&lt;")


def size_category(images: int) -> str:
    """Return the size class that dataset hubs have for so many images.

    >>> size_category(999), size_category(1000), size_category(262_040), size_category(10**9)
    ('n<1K', '1K<n<10K', '100K<n<1M', '10M<n<100M')
    """
    if images < 1000:
        return "n<1K"
    bounds = ("1K", "10K", "100K", "1M", "10M", "100M")
    power = min(len(str(images)) - len("1000"), len(bounds) - 2)
    return f"{bounds[power]}<n<{bounds[power + 1]}"
