"""The dataset card, filled from a release's own record; dataset hubs read its YAML header."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from huggingface_hub import DatasetCardData
from jinja2 import Environment, PackageLoader, StrictUndefined, TemplateError

from sdwn.config import ModelConfig
from sdwn.errors import IntegrityError
from sdwn.models.notices import terms
from sdwn.planning.plan import PlannedSynset
from sdwn.releases.manifest import Manifest
from sdwn.storage.columns import BLACK, COLUMNS


@dataclass(frozen=True, slots=True)
class Form:
    """A layout of files: what of the templates describes it, and what a hub should load of it."""

    name: str
    data_files: str | None
    codec: str | None = None


RELEASE = Form("release", "metadata.parquet")

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


def card(
    manifest: Manifest,
    present: Sequence[PlannedSynset],
    names: Collection[str],
    form: Form = RELEASE,
) -> str:
    """Write the card as Markdown.

    ``present`` are the synsets that have images here, ``names`` the columns of their records.

    Raises:
        IntegrityError: the manifest's settings are no run's.
    """
    try:
        return _rendered(manifest, present, names, form)
    except (TemplateError, LookupError, TypeError, ValueError) as error:
        raise IntegrityError(f"the manifest's settings are damaged: {error}") from None


def _rendered(
    manifest: Manifest, present: Sequence[PlannedSynset], names: Collection[str], form: Form
) -> str:
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
    model = ModelConfig(**settings["model"]) if settings else None
    return environment.get_template("card.md").render(
        header=_header(manifest, model, form),
        manifest=manifest,
        settings=settings,
        terms=terms(model.name) if model else None,
        licence=LICENCES.get(model.name) if model else None,
        hub_model=_on_a_hub(model),
        black=sum(manifest.statuses.get(name, 0) for name in BLACK),
        same=_same_prompts(present),
        example=present[0].synset if present else "dog.n.01",
        form=form,
        encoding=_encoding(settings, form),
        columns=[column for column in COLUMNS if column.name in names],
    )


def _header(manifest: Manifest, model: ModelConfig | None, form: Form) -> str:
    licence = LICENCES.get(model.name) if model else manifest.licence
    optional: dict[str, Any] = {} if licence else {"license_name": "see-the-card"}
    if form.data_files:
        optional["configs"] = [{"config_name": "default", "data_files": form.data_files}]
    data = DatasetCardData(
        language="en",
        license=licence or "other",
        pretty_name=_name(manifest, model),
        task_categories=_tasks(manifest),
        size_categories=size_category(manifest.images),
        tags=_tags(manifest, model),
        **optional,
    )
    return str(data.to_yaml()).strip()


def _name(manifest: Manifest, model: ModelConfig | None) -> str:
    if model is None:
        return manifest.name
    return f"{model.name if model.builtin else 'Stable Diffusion'} x {manifest.name}"


def _tasks(manifest: Manifest) -> list[str]:
    # Without prompts there is nothing to learn to draw from.
    drawn = ["text-to-image"] if manifest.origin == "run" else []
    return ["image-classification", *drawn]


def _tags(manifest: Manifest, model: ModelConfig | None) -> list[str]:
    made = ["synthetic"] if manifest.origin == "run" else []
    by = ["stable-diffusion"] if model is not None and model.builtin is None else []
    return [*made, *by, "wordnet", "imagenet"]


def _on_a_hub(model: ModelConfig | None) -> bool:
    return model is not None and model.builtin is None and model.name.count("/") == 1


def _same_prompts(present: Sequence[PlannedSynset]) -> int:
    """Count the synsets that share their prompt with another."""
    counts = Counter(row.prompt for row in present if row.prompt)
    return sum(count for count in counts.values() if count > 1)


def _encoding(settings: dict[str, Any] | None, form: Form) -> str:
    if form.codec:
        return form.codec
    if settings is None:
        return "as imported"
    storage = settings["storage"]
    quality = f"quality {storage['quality']}" if storage["codec"] == "jpeg" else "lossless"
    return f"{storage['codec']}, {quality}"


def _escaped(value: Any) -> str:
    r"""Keep a value within its line and its cell.

    >>> _escaped("a|b\nc `d`")
    'a\\|b c d'
    """
    return " ".join(str(value).split()).replace("|", "\\|").replace("`", "").replace("<", "&lt;")


def size_category(images: int) -> str:
    """Name a size class as dataset hubs do.

    >>> size_category(262_040)
    '100K<n<1M'
    """
    bounds = [(10**3, "1K"), (10**4, "10K"), (10**5, "100K"), (10**6, "1M"), (10**7, "10M")]
    if images < bounds[0][0]:
        return "n<1K"
    for (low, low_name), (high, high_name) in pairwise(bounds):
        if low <= images < high:
            return f"{low_name}<n<{high_name}"
    return "10M<n<100M"
