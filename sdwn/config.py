"""The settings of a run, read from strict YAML: which images, how made, how stored."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from sdwn.batches import off_grid
from sdwn.errors import UsageError
from sdwn.io import read_text
from sdwn.storage.codecs import CODECS

# The catalog of arXiv 2211.01777.
PAPER_CATALOG = "sdwn-26204"

# Random weights in diffusers' own classes; a model of few things; and none at all, for rehearsals.
BUILTIN = "builtin:"
BUILTIN_MODELS = ("builtin:tiny", "builtin:miniature", "builtin:noise")

_PATHS = "prompts catalog.file catalog.table evaluation.checkpoint evaluation.embedding".split()
# Paths, or names of something else where there is no such file or folder.
_NAMES = dict.fromkeys(("model.name", "model.config", "model.vae"), Path.exists)
_NAMES["evaluation.groups"] = Path.is_file
# Lists of what is added to a model, each with a name that may be a path.
_ADDED = ("lora", "textual_inversion")

# What pydantic says, as a regular expression, and what is plainer.
_PLAIN_WORDS = {
    "^Value error, ": "",
    "a valid tuple": "a list, as [a, b]",
    "a valid dictionary": "a section of settings",
    r" or instance of \w+": "",
}
# Unquoted, YAML reads {lemma} as a mapping.
_QUOTES = '; text that begins with { needs quotes in YAML, as in prompt: "{lemma}, {definition}"'
PROMPT_FIELDS = ("definition", "lemma", "a_lemma", "lemmas", "synset", "hypernym", "hypernyms")

# Of a concept: exports write an image's number with four digits.
MOST_IMAGES = 10_000

Positive = Annotated[int, Field(gt=0, lt=2**31)]
Pixels = Annotated[int, Field(gt=0, le=8192, multiple_of=8)]


class Section(BaseModel):
    """A part of a config: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)


def later_setting(default: Any) -> Any:
    """Return a field for a setting that earlier versions lacked; its default is not written."""
    # So neither a plan's digest nor a file changes for who does not use it.
    return Field(default, exclude_if=lambda value: value == default)


class Record(BaseModel):
    """A record in a JSON file: immutable, its types exact; unknown keys are of later versions."""

    model_config = ConfigDict(frozen=True, strict=True)


class CatalogConfig(Section):
    """The choice of concepts: synsets by name, a named catalog, subtrees, a list, or their union.

    ``synsets`` are lemmas that only one noun has (``zebra``), names (``dog.n.01``) or wnids.
    ``name`` joins ``sdwn-26204``, ``closure`` and ``imagenet-1k`` with ``+``. ``roots`` adds
    everything below these synsets, the roots themselves not counted. ``file`` adds the synset
    names or wnids in a text file, one a line. ``only``, named as ``synsets`` are, keeps these
    of the result. ``table`` takes the place of them all: a CSV, JSONL or Parquet file with an id
    and a prompt a row (docs/concepts.md); ``only`` then has ids.
    """

    synsets: tuple[str, ...] = ()
    name: str | None = None
    roots: tuple[str, ...] = ()
    file: Path | None = None
    only: tuple[str, ...] = ()
    table: Path | None = later_setting(None)

    @model_validator(mode="after")
    def _names_something(self) -> CatalogConfig:
        synsets = self.synsets or self.name or self.roots or self.file
        if bool(synsets) == bool(self.table):
            raise ValueError("give at least one of synsets, name, roots, file; or a table alone")
        return self


class AddedWeights(Section):
    """Weights that change a model: a safetensors file, or a folder or hub name that has one.

    ``file`` says which, where there are several.
    """

    name: Annotated[str, Field(min_length=1)]
    file: str | None = None
    revision: str | None = None


class LoraSettings(AddedWeights):
    """A LoRA, and how strongly it changes the model."""

    scale: float = 1.0


class InversionSettings(AddedWeights):
    """A textual inversion; ``token`` stands for it in prompts, its own name unless given."""

    token: str | None = None


class ModelConfig(Section):
    """The pipeline: a hub name, a local folder in diffusers format, or ``builtin:NAME``.

    Or a single ``.safetensors`` file of the original layout, which is converted once; ``config``
    is a hub name or folder in diffusers format with its settings, diffusers' choice unless given.
    ``vae`` is another VAE, a hub name or folder.
    """

    name: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    variant: str | None = None
    config: str | None = later_setting(None)
    lora: tuple[LoraSettings, ...] = later_setting(())
    textual_inversion: tuple[InversionSettings, ...] = later_setting(())
    vae: str | None = later_setting(None)

    @field_validator("name")
    @classmethod
    def _known_builtin(cls, name: str) -> str:
        if name.startswith(BUILTIN) and name not in BUILTIN_MODELS:
            raise ValueError(f"no model {name!r}; built in: {', '.join(BUILTIN_MODELS)}")
        return name

    @model_validator(mode="after")
    def _has_weights(self) -> ModelConfig:
        if self.config and not self.name.lower().endswith(".safetensors"):
            raise ValueError("config: the settings of a single .safetensors file; leave it out")
        if self.builtin == "noise" and self.added:
            raise ValueError(f"{self.name} has no weights that {self.added[0][0]} could change")
        return self

    @property
    def builtin(self) -> str | None:
        """Its name among the built-in ones, None for a real model."""
        return self.name.removeprefix(BUILTIN) if self.name.startswith(BUILTIN) else None

    @property
    def added(self) -> list[tuple[str, AddedWeights]]:
        """The weights that change the model, each with the name of its setting."""
        listed = [(name, one) for name in _ADDED for one in getattr(self, name)]
        return [*listed, ("vae", AddedWeights(name=self.vae))] if self.vae else listed


class GenerationConfig(Section):
    """Settings of sampling, in diffusers' own terms.

    ``scheduler: null`` is the model's own. ``batch_size`` counts images; without it each task
    takes what suits its card. ``channels_last``, ``compile`` (torch.compile of the denoiser: true
    or ``blocks``, its repeated blocks; ``whole``, all of it) and ``attention`` (a backend of
    diffusers) are faster on most GPUs and may change last bits. ``options`` are further
    arguments of the pipeline's call, such as ``clip_skip``. ``quantization`` of the denoiser and
    the text encoders takes less memory and changes images.
    """

    height: Pixels = 512
    width: Pixels = 512
    num_inference_steps: Positive = 50
    guidance_scale: Annotated[float, Field(ge=0)] = 7.5
    scheduler: str | None = "PNDMScheduler"
    negative_prompt: Annotated[str, Field(pattern=r"^[^\x00]*$")] | None = None
    safety_checker: bool = True
    precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    batch_size: Positive | None = None
    channels_last: bool = False
    compile: Literal["blocks", "whole"] | bool = False
    attention: str | None = later_setting(None)
    quantization: Literal["torchao-int8", "bitsandbytes-8bit", "bitsandbytes-4bit"] | None = (
        later_setting(None)
    )
    options: dict[str, JsonValue] = later_setting({})

    @field_validator("compile", mode="before")
    @classmethod
    def _blocks(cls, chosen: Any) -> Any:
        return True if chosen == "blocks" else chosen  # as the digest of a plan has it


class StorageConfig(Section):
    """The encoding of images, and how many of them share a shard.

    A shard holds ``images_per_shard`` images (1,000 unless given), or as many as
    ``images_per_second`` makes in ``shard_hours``; either is rounded to whole synsets.
    ``quality`` is JPEG's alone, 95 unless given; the other codecs are lossless.
    """

    codec: Literal[tuple(CODECS)] = "webp"  # type: ignore[valid-type]
    quality: Annotated[int, Field(ge=1, le=100)] | None = None
    images_per_shard: Positive | None = None
    shard_hours: Annotated[float, Field(gt=0, le=1e6)] | None = None
    images_per_second: Annotated[float, Field(gt=0, le=1e6)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, content: Any) -> Any:
        if isinstance(content, dict):
            codec = CODECS.get(str(content.get("codec")))
            if codec is not None and content.get("quality") is None:
                content = {**content, "quality": codec.default_quality}
            sizes = ("images_per_shard", "shard_hours", "images_per_second")
            if all(content.get(size) is None for size in sizes):
                content = {**content, "images_per_shard": 1000}
        return content

    @model_validator(mode="after")
    def _one_way(self) -> StorageConfig:
        if self.quality is not None and CODECS[self.codec].default_quality is None:
            raise ValueError(f"quality is JPEG's alone; {self.codec} is lossless")
        of_time = [self.shard_hours, self.images_per_second].count(None)
        if of_time != (0 if self.images_per_shard is None else 2):
            or_time = "shard_hours together with images_per_second"
            raise ValueError(f"give either images_per_shard, or {or_time}")
        return self


class EvaluationConfig(Section):
    """The classifier of the release; no part of the plan, so it may change later.

    ``model`` is ``paper`` (ViT-H/14), ``efficientnet-lite0``, any timm model of ImageNet's classes,
    or ``hf-hub:`` or ``local-dir:`` one of its own; ``checkpoint`` a file of other weights.
    ``images``: those of ImageNet-1k classes, or all. The others are scored by the classes
    that are near them in WordNet.
    ``groups`` is a YAML file, a name and a synset a line, for the table of groups and the map's
    colours, or the name of a shipped one; None is ``default``.
    ``embedding`` is a text file of word vectors, GloVe's or word2vec's, that the map places
    classes by; None is the generation model's own text encoder, or WordNet where it is not here.
    """

    model: Annotated[str, Field(min_length=1)] = "paper"
    checkpoint: Path | None = None
    images: Literal["imagenet", "all"] = "imagenet"
    groups: str | None = None
    embedding: Path | None = None


class RunConfig(Section):
    """All settings of a run; everything but ``catalog`` and ``evaluation`` enters the digest.

    The catalog enters as the table of concepts that it gives. ``prompt`` is a template, or a list:
    image n takes template n modulo their number. ``prompts`` is a table of written prompts
    instead, with the columns ``wnid`` or ``synset``, and ``prompt``; a catalog's table has its own.
    """

    catalog: CatalogConfig
    prompt: str | tuple[str, ...] | None = "{definition}"
    prompts: Path | None = later_setting(None)
    images_per_synset: Annotated[int, Field(gt=0, le=MOST_IMAGES, strict=True)] = 10
    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] = 0
    model: ModelConfig
    generation: GenerationConfig = GenerationConfig()
    storage: StorageConfig = StorageConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @property
    def needs_gpu(self) -> bool:
        """True if it cannot run on a CPU; built-in models are small enough for fp16 there."""
        return self.generation.precision == "fp16" and self.model.builtin is None

    @model_validator(mode="before")
    @classmethod
    def _one_origin_of_prompts(cls, content: Any) -> Any:
        if isinstance(content, dict):
            catalog = content.get("catalog")
            table = catalog.get("table") if isinstance(catalog, dict) else None
            given = {"catalog.table": table, **{n: content.get(n) for n in ("prompts", "prompt")}}
            origins = [name for name, value in given.items() if value]
            if len(origins) > 1:
                raise ValueError(f"prompts come from one of {', '.join(origins)}; leave one out")
            if origins and origins[0] != "prompt":
                content = {**content, "prompt": None}
        return content

    @model_validator(mode="after")
    def _batch_of_synsets(self) -> RunConfig:
        # The rows of a table may have other numbers of images.
        size = None if self.catalog.table else self.generation.batch_size
        if size is not None and (reason := off_grid(size, self.images_per_synset)):
            raise ValueError(f"generation.batch_size: {reason}")
        return self

    @field_validator("prompt")
    @classmethod
    def _known_fields(cls, given: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        templates = (given,) if isinstance(given, str) else given or ()
        for template in templates:
            # No format and no attribute: {definition:>99999999} would fill the memory.
            left = re.sub(r"\{\{|\}\}|\{" f"({'|'.join(PROMPT_FIELDS)})" r"\}", "", template)
            # A table of synsets with a carriage return is not read back as it was written.
            # HDF5 would cut it at a NUL.
            if re.search(r"[{}\r\0]", left) or not template.strip():
                valid = ", ".join("{" + name + "}" for name in PROMPT_FIELDS)
                raise ValueError(
                    f"not a template such as {{definition}}: {template!r}; valid fields: {valid}; "
                    "a brace is written {{ or }}; no carriage return or NUL"
                )
        if given == () or len(set(templates)) < len(templates):
            raise ValueError("expected a list of templates, each of them once")
        return templates[0] if len(templates) == 1 else given


def _parse(text: str, source: str) -> Any:
    # Here, for what only reads a release needs none.
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError
    from ruamel.yaml.events import AliasEvent

    # YAML 1.2: 12:00:00 is text, not a number of base 60, and a key that stands twice an error.
    yaml = YAML(typ="safe", pure=True)
    try:
        if any(isinstance(event, AliasEvent) for event in yaml.parse(text)):
            raise UsageError(f"{source}: YAML aliases are not supported; write the value out")
        return yaml.load(text)
    except (YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = text.splitlines()[mark.line : mark.line + 1] if mark else []
        quotes = _QUOTES * ("{" in "".join(line) or "flow mapping" in str(error))
        what = " ".join(str(error).split())[:300]
        raise UsageError(f"{source}: not valid YAML: {what}{quotes}") from None


def read_yaml(path: Path, what: str = "settings") -> dict[str, Any]:
    """Read a YAML mapping; ``what`` names its content in error messages."""
    content = _parse(read_text(path), str(path))
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected a mapping of {what}, found {type(content).__name__}")
    return content


def load_config(path: Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read a run's config, ``key=value`` overrides applied."""
    return with_overrides(read_yaml(path), overrides, path, path.resolve().parent)


def with_overrides(
    content: dict[str, Any], overrides: Sequence[str], path: Path, folder: Path
) -> RunConfig:
    """Return the settings that a file has, ``key=value`` overrides applied."""
    _make_absolute(content, folder, typed=False)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            expected = "expected key=value, as in generation.batch_size=20"
            raise UsageError(f"--set {override}: {expected}")
        *parents, last = key.split(".")
        section = content
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise UsageError(f"--set {override}: {parent} is no section")
        section[last] = _parse(text, f"--set {override}")
        _make_absolute(content, folder, typed=True)
    return validated(RunConfig, content, source=" with --set ".join([str(path), *overrides]))


def _make_absolute(content: dict[str, Any], folder: Path, *, typed: bool) -> None:
    # Tasks may start elsewhere. Paths start at the config's folder; what was typed, and a model's
    # folder, is looked for in the working folder first.
    sections = {**content, "": content}
    named = [(key, sections.get(key.rpartition(".")[0])) for key in (*_PATHS, *_NAMES)]
    if isinstance(model := content.get("model"), dict):
        added = [model[name] for name in _ADDED if isinstance(model.get(name), list)]
        named += [("model.name", one) for one in itertools.chain(*added)]
    for key, values in named:
        section, _, name = key.rpartition(".")
        if not (isinstance(values, dict) and isinstance(text := values.get(name), str) and text):
            continue
        tops = (Path.cwd(), folder) if typed or section == "model" else (folder,)
        there = (top / text for top in tops if _NAMES.get(key, Path.exists)(top / text))
        path = next(there, None if key in _NAMES else tops[0] / text)
        if path and section == "model":
            # It has one name, whatever leads to it: the plan's digest has it. A file's own name
            # stays, for the hub's cache has links to names without an ending.
            path = path.parent.resolve() / path.name if path.is_file() else path.resolve()
        if path:
            values[name] = str(path)


def validated(kind: type[S], content: Any, source: str) -> S:
    """Build a section from plain data; a UsageError names its first mistake in one line."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        # A misspelt key first: it is why another one is missing.
        mistakes = sorted(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    # What may be of several kinds has a mistake of each.
    kinds = re.compile(r"\.(str|bool|(tuple|literal)\[.*\])(?![^.])")
    places = (kinds.sub("", ".".join(map(str, one["loc"]))) for one in mistakes)
    where, *others = dict.fromkeys(places)
    first, message = mistakes[0], mistakes[0]["msg"]
    for pydantics, plain in _PLAIN_WORDS.items():
        message = re.sub(pydantics, plain, message)
    message = f"{where or 'config'}: {message}"
    if first["type"] == "extra_forbidden":
        section: type[Section] = kind
        for part in first["loc"][:-1]:
            if isinstance(part, str):  # a number is a place in a list
                annotation = section.model_fields[part].annotation
                for one in (annotation, *get_args(annotation)):
                    if isinstance(one, type) and issubclass(one, Section):
                        section = one
        message = f"unknown key {where!r}; valid keys here: {', '.join(section.model_fields)}"
    elif first["type"] == "string_type" and isinstance(first["input"], dict):
        message = f"{where}: expected text, found a mapping{_QUOTES}"
    elif first["type"] not in ("value_error", "missing"):
        message += f", found {repr(first['input'])[:80]}"
    raise UsageError(f"{source}: {message}{f' (and {len(others)} more)' if others else ''}")
