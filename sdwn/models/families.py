"""Families of pipelines: what each takes, and the settings that fit a model.

Any text-to-image pipeline of diffusers works, from plain texts. One whose class stands in
:data:`FAMILIES` is given each prompt's embedding, encoded once and alone, and each image's noise.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ConfigDict, JsonValue, TypeAdapter, ValidationError

from sdwn.config import GenerationConfig, ModelConfig, RunConfig
from sdwn.errors import SdwnError, UsageError
from sdwn.io import read_json
from sdwn.models.added import add_inversion_tokens, check_added, with_all_vectors
from sdwn.models.weights import INDEX, components, find_folder, source, weights_folder

if TYPE_CHECKING:
    import torch


def denoiser(pipeline: Any) -> Any:
    """Return the network that takes the steps: a UNet or a transformer."""
    return getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)


# Families


def plain_noise(
    pipeline: Any, height: int, width: int, generator: torch.Generator, patch: int = 1
) -> torch.Tensor:
    """Draw an image's noise, (1, channels, height, width) of the latents, in float32."""
    import torch

    factor = pipeline.vae_scale_factor * patch
    shape = 1, denoiser(pipeline).config.in_channels, height // factor, width // factor
    return torch.randn(shape, generator=generator)


def packed_noise(
    pipeline: Any, height: int, width: int, generator: torch.Generator, patch: int = 2, **more: Any
) -> torch.Tensor:
    """Draw an image's noise, (1, patches, channels) in float32, as the pipeline packs it."""
    import torch

    made = pipeline.prepare_latents(
        batch_size=1,
        num_channels_latents=denoiser(pipeline).config.in_channels // patch**2,
        height=height,
        width=width,
        dtype=torch.float32,
        device=torch.device("cpu"),
        generator=generator,
        **more,
    )
    noise: torch.Tensor = made[0] if isinstance(made, tuple) else made
    return noise


def count_tokens(
    tokenizer: Any,
    prompts: Sequence[str],
    before: str = "",
    after: str = "",
    dropped: int | str = 0,
) -> list[int]:
    """Count the tokens of prompts between two texts, start and end included, less ``dropped``."""

    def count(texts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(texts, truncation=False, verbose=False).input_ids]

    first = dropped if isinstance(dropped, int) else count([dropped])[0]
    return [tokens - first for tokens in count([before + prompt + after for prompt in prompts])]


def count_in_chat(
    tokenizer: Any, prompts: Sequence[str], system: str = "", **options: Any
) -> list[int]:
    """Count the tokens of prompts as messages of a chat, by the tokenizer's own template."""
    above = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    chats = [
        [*above, {"role": "user", "content": [{"type": "text", "text": text}] if system else text}]
        for text in prompts
    ]
    made = tokenizer.apply_chat_template(chats, tokenize=True, return_dict=True, **options)
    return [len(ids) for ids in made["input_ids"]]


def count_captions(
    tokenizer: Any,
    prompts: Sequence[str],
    clean_caption: bool = False,
    complex_human_instruction: Sequence[str] | None = None,
) -> list[int]:
    """Count the tokens of prompts as PixArt reads them, and SANA below an instruction."""
    captions = [prompt.lower().strip() for prompt in prompts]
    if clean_caption:
        from diffusers import PixArtAlphaPipeline  # takes seconds

        # Of all its parts, cleaning needs none.
        pipeline = PixArtAlphaPipeline.__new__(PixArtAlphaPipeline)
        captions = pipeline._text_preprocessing(list(prompts), clean_caption=True)
    above = "\n".join(complex_human_instruction or ())
    # Its first and last token are among those that reach the network.
    dropped = count_tokens(tokenizer, [above])[0] - 2 if above else 0
    return count_tokens(tokenizer, captions, before=above, dropped=dropped)


def count_below_system_prompt(
    tokenizer: Any, prompts: Sequence[str], system_prompt: str | None = None
) -> list[int]:
    """Count the tokens of prompts as Lumina 2 reads them."""
    above = _LUMINA_SYSTEM if system_prompt is None else system_prompt
    return count_tokens(tokenizer, prompts, before=above + " <Prompt Start> ")


@dataclass(frozen=True, slots=True)
class TextInput:
    """The number of tokens that a text encoder takes of a prompt, and their counter.

    ``limit`` holds unless the option ``max_sequence_length`` says otherwise; None is the
    tokenizer's own, whatever the options. ``count`` counts what the pipeline puts around prompts,
    too; it takes, by name, those options of the call that change this.
    """

    limit: int | None = None
    count: Callable[..., list[int]] = count_tokens


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of pipeline, as far as settings, prompts and noise depend on it."""

    # What encode_prompt returns, in order, by the names of the call's arguments; None: what the
    # call makes itself. A pipeline without any encodes the texts itself, in every call.
    embeddings: tuple[str | None, ...] = ()
    # The part that holds the tokenizer of each text encoder.
    encoders: Mapping[str, TextInput] = field(default_factory=lambda: {"tokenizer": TextInput()})
    # Draws an image's noise; None: the pipeline does.
    noise: Callable[[Any, int, int, torch.Generator], torch.Tensor] | None = plain_noise
    float32: bool = False  # latents stay so, whatever the precision of the network
    patch: int = 2  # so many latents, along each side, are one for the network
    # Above ``off``, this setting has each step predict twice, for classifier-free guidance.
    scale: str | None = "guidance_scale"
    off: float = 1.0
    negative: bool = True  # the call takes a negative prompt
    # By part, the precision where fp16 is too narrow, as the models' cards say.
    instead_of_fp16: Mapping[str, str] = field(default_factory=dict)

    def precisions(self, wanted: str) -> dict[str, str]:
        """Return the precision of a run's weights, as the default, and of parts with another."""
        return {"default": wanted} | dict(self.instead_of_fp16 if wanted == "fp16" else {})


# What diffusers' own pipelines put around a prompt.
_FLUX_2_SYSTEM = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing "
    "on object relationships, object\nattribution and actions without speculation."
)
_QWEN_SYSTEM = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
)
_QWEN_21_SYSTEM = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"
_QWEN_USER, _QWEN_END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
_QWEN_COUNT = partial(count_tokens, before=_QWEN_SYSTEM + _QWEN_USER, after=_QWEN_END, dropped=34)
_QWEN_21_COUNT = partial(
    count_tokens, before=_QWEN_21_SYSTEM + _QWEN_USER, after=_QWEN_END, dropped=_QWEN_21_SYSTEM
)
_QWEN_3_COUNT = partial(count_in_chat, add_generation_prompt=True)
_LUMINA_SYSTEM = (
    "You are an assistant designed to generate superior images with the superior degree of "
    "image-text alignment based on textual prompts or user prompts."
)
_CLIP = TextInput()
_PIXART_COUNT = partial(count_captions, clean_caption=True)
_PROMPT = "prompt_embeds", None
_PAIR = "prompt_embeds", "negative_prompt_embeds"
_POOLED = (*_PAIR, "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
_MASK = "prompt_attention_mask"
_MASKED = ("prompt_embeds", _MASK, "negative_prompt_embeds", f"negative_{_MASK}")
# The end of its own instruction; what stands above it does not count.
_SANA_COUNT = partial(count_captions, complex_human_instruction=("User Prompt: ",))
_SANA = Family(
    _MASKED,
    {"tokenizer": TextInput(300, _SANA_COUNT)},
    float32=True,
    patch=1,
    instead_of_fp16={"text_encoder": "bf16", "vae": "bf16"},
)
# By the pipeline's class; CONTRIBUTING.md says how to add one.
FAMILIES = {
    "StableDiffusionPipeline": Family(_PAIR, patch=1),
    "StableDiffusionXLPipeline": Family(
        _POOLED, {"tokenizer": _CLIP, "tokenizer_2": _CLIP}, patch=1
    ),
    "StableDiffusion3Pipeline": Family(
        _POOLED, {"tokenizer": _CLIP, "tokenizer_2": _CLIP, "tokenizer_3": TextInput(256)}
    ),
    "LatentConsistencyModelPipeline": Family(_PROMPT, patch=1, scale=None, negative=False),
    "PixArtAlphaPipeline": Family(_MASKED, {"tokenizer": TextInput(120, _PIXART_COUNT)}),
    "PixArtSigmaPipeline": Family(_MASKED, {"tokenizer": TextInput(300, _PIXART_COUNT)}),
    "SanaPipeline": _SANA,
    "SanaSprintPipeline": replace(
        _SANA, embeddings=("prompt_embeds", _MASK), scale=None, negative=False
    ),
    "Lumina2Pipeline": Family(_MASKED, {"tokenizer": TextInput(256, count_below_system_prompt)}),
    "ZImagePipeline": Family(
        _PAIR,  # lists of embeddings, each as long as its text
        {"tokenizer": TextInput(512, partial(_QWEN_3_COUNT, enable_thinking=True))},
        float32=True,
        off=0.0,
    ),
    "FluxPipeline": Family(
        ("prompt_embeds", "pooled_prompt_embeds", None),
        {"tokenizer": _CLIP, "tokenizer_2": TextInput(512)},
        noise=packed_noise,
        scale="true_cfg_scale",
        # On cards without bf16: T5's own values do not stay within fp16.
        instead_of_fp16={"text_encoder": "fp32", "text_encoder_2": "fp32"},
    ),
    "ChromaPipeline": Family(
        ("prompt_embeds", None, _MASK, "negative_prompt_embeds", None, f"negative_{_MASK}"),
        {"tokenizer": TextInput(512)},
        noise=packed_noise,
    ),
    "Flux2Pipeline": Family(
        _PROMPT,
        {"tokenizer": TextInput(512, partial(count_in_chat, system=_FLUX_2_SYSTEM))},
        noise=partial(plain_noise, patch=2),
        scale=None,
        negative=False,
    ),
    "Flux2KleinPipeline": Family(
        _PROMPT,
        {"tokenizer": TextInput(512, partial(_QWEN_3_COUNT, enable_thinking=False))},
        noise=partial(plain_noise, patch=2),
        negative=False,
    ),
    "QwenImagePipeline": Family(
        _PROMPT,  # alone, a prompt has no padding to mask
        {"tokenizer": TextInput(512, _QWEN_COUNT)},
        noise=packed_noise,
        scale="true_cfg_scale",
    ),
    "QwenImage21Pipeline": Family(
        ("prompt_embeds", None, None),
        {"processor": TextInput(None, _QWEN_21_COUNT)},
        noise=partial(packed_noise, patch=1, images=None),
        scale="true_cfg_scale",
    ),
}


# A model's files


class PipelineInfo:
    """Facts about a pipeline, from the files of its model in diffusers format."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = read_json(folder / INDEX)
        self.kind = str(self.index.get("_class_name"))
        # By name, the class of each.
        self.parts = components(self.index)
        self.network = self.config("unet" if "unet" in self.parts else "transformer")
        self.vae = self.config("vae")

    def config(self, part: str) -> Mapping[str, Any]:
        """Return the config of a part, empty where it has none."""
        file = self.folder / part / "config.json"
        return read_json(file) if file.is_file() else {}

    @cached_property
    def family(self) -> Family:
        """Its row of the table, or what its call's signature says: an import of seconds."""
        if self.kind in FAMILIES:
            return FAMILIES[self.kind]
        call = self.call
        limit = call["max_sequence_length"].default if "max_sequence_length" in call else None
        # Where both are, guidance_scale is an input of the network.
        scales = [name for name in ("true_cfg_scale", "guidance_scale") if name in call]
        return Family(
            encoders={"tokenizer": TextInput(limit)},
            noise=None,
            patch=1,
            scale=scales[0] if scales else None,
            negative="negative_prompt" in call,
        )

    @cached_property
    def pipeline(self) -> Any:
        """Its class."""
        import diffusers  # takes seconds

        if not hasattr(diffusers, self.kind):
            raise UsageError(
                f"diffusers {diffusers.__version__} has no {self.kind}; upgrade diffusers"
            )
        return getattr(diffusers, self.kind)

    @cached_property
    def call(self) -> Mapping[str, inspect.Parameter]:
        """The arguments that its call takes by name."""
        taken = inspect.signature(self.pipeline.__call__).parameters
        variable = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
        return {k: v for k, v in taken.items() if k != "self" and v.kind not in variable}

    @property
    def pixel_step(self) -> int:
        """The number that an image's height and width are multiples of."""
        # Levels of the VAE, of which each but the unscaled ones halves the size.
        unscaled = {"block_out_channels": 1, "encoder_block_out_channels": 1}
        unscaled["temperal_downsample"] = 0
        halvings = [len(self.vae[key]) - n for key, n in unscaled.items() if self.vae.get(key)]
        return int(2 ** (halvings or [3])[-1]) * self.family.patch

    @property
    def embeds_guidance(self) -> bool:
        """True if its network takes ``guidance_scale`` as an input: no second prediction."""
        return any(self.network.get(key) for key in ("guidance_embeds", "time_cond_proj_dim"))

    def arguments(self, generation: GenerationConfig) -> dict[str, Any]:
        """Return what its call is given for all images of a run."""
        names = ("height", "width", "num_inference_steps", "guidance_scale")
        given: dict[str, Any] = {name: getattr(generation, name) for name in names}
        # Left alone, some sample one of their favourite sizes and shrink the image, and some have
        # a negative prompt of their own beside the embedding.
        given |= {"use_resolution_binning": False}
        given |= {"negative_prompt": None} if self.family.embeddings else {}
        given |= call_options(generation)
        return {name: value for name, value in given.items() if name in self.call}

    def schedules(self, generation: GenerationConfig) -> dict[str, list[Any]]:
        """Return what says how many steps there are, whatever ``num_inference_steps``."""
        given = {"sample_sigmas": self.index.get("sample_sigmas"), **generation.options}
        names = ("sample_sigmas", "sigmas", "timesteps")
        return {k: v for k in names if isinstance(v := given.get(k), list)}

    def guided(self, generation: GenerationConfig) -> bool:
        """Return whether each step predicts a second time, with the negative prompt."""
        family = self.family
        if family.scale is None or self.index.get("is_distilled"):
            return False
        if family.scale == "guidance_scale":
            return generation.guidance_scale > family.off and not self.embeds_guidance
        scale = generation.options.get(family.scale, 0)
        return isinstance(scale, (int, float)) and scale > family.off


def is_guided(config: RunConfig) -> bool:
    """Return whether each step predicts a second time; a guess where the weights are not here."""
    if (folder := find_folder(config)) is None:
        return config.generation.guidance_scale > 1
    return PipelineInfo(folder).guided(config.generation)


class TextReader(NamedTuple):
    """A text encoder's name in its pipeline, its tokenizer, and how many tokens it takes."""

    name: str
    limit: int
    tokenizer: Any
    counter: Callable[[Any, Sequence[str]], list[int]]

    def tokens(self, prompts: Sequence[str]) -> list[int]:
        """Count the tokens of whole prompts."""
        tokenizer = self.tokenizer
        return self.counter(tokenizer, [with_all_vectors(tokenizer, prompt) for prompt in prompts])


def text_readers(
    family: Family, parts: Mapping[str, Any], generation: GenerationConfig
) -> list[TextReader]:
    """Return the text encoders whose tokenizers `parts` has, the one that reads most first."""
    found = []
    for part, taken in family.encoders.items():
        if parts.get(part) is None:
            continue
        tokenizer = getattr(parts[part], "tokenizer", parts[part])
        limit = tokenizer.model_max_length
        if taken.limit is not None:
            limit = generation.options.get("max_sequence_length", taken.limit)
        counted = inspect.signature(taken.count).parameters
        options = {k: v for k, v in generation.options.items() if k in counted}
        name = "text_encoder" + part.removeprefix("tokenizer").removeprefix("processor")
        found.append(TextReader(name, int(limit), tokenizer, partial(taken.count, **options)))
    return sorted(found, key=lambda reader: -reader.limit)


def call_options(generation: GenerationConfig) -> dict[str, Any]:
    """Return the options of a run; lists as tuples, which diffusers' own defaults are."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in generation.options.items()}


# Checking settings

# Each of these can replace any other, which is known without diffusers' import of seconds.
INTERCHANGEABLE = {
    f"{name}Scheduler"
    for name in (
        *("DDIM", "DDPM", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep"),
        *("EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete"),
        *("KDPM2Discrete", "LMSDiscrete", "PNDM", "UniPCMultistep"),
    )
}
# Of models made fit for few steps: they can replace any of those, and none of those them.
_OF_FEW_STEPS = {"LCMScheduler", "TCDScheduler"}
# Its steps draw noise for the batch as a whole, out of no image's generator.
_UNREPEATABLE = "DPMSolverSDEScheduler"
# Arguments that are no option: a run's own settings, its prompts and seeds, and what an option of
# plain values cannot be.
_NO_OPTION = re.compile(
    r"(negative_)?(pooled_)?prompt(_.*)?|(negative_)?(ip_adapter_)?image(_.*)?|mask_image|latents"
    r"|generator|height|width|num_inference_steps|guidance_scale|num_images_per_prompt"
    r"|output_type|return_dict|callback.*|use_resolution_binning"
)
# What loads these settings into a pipeline that takes them.
_LOADERS = {"lora": "load_lora_weights", "textual_inversion": "load_textual_inversion"}


def require_usable(config: RunConfig, *, begun: bool = False, rows_negative: bool = False) -> None:
    """Refuse a model that no task could load, and settings that do not fit it, if it is here."""
    folder = weights_folder(config) if source(config.model) == "folder" else find_folder(config)
    check_settings(config, folder, begun=begun, rows_negative=rows_negative)


def check_settings(
    config: RunConfig, folder: Path | None, *, begun: bool = False, rows_negative: bool = False
) -> list[str]:
    """Refuse settings that the model in a folder does not take, or takes without effect.

    A run that is begun goes on with settings without effect, which an earlier version took: they
    are returned. ``rows_negative``: rows of the run's table have negative prompts of their own.
    """
    info = None if folder is None else PipelineInfo(folder)
    generation, parts = config.generation, info.parts if info else {}
    # Of such a class the other faults cannot be known.
    if info and (wrong_class := _class_fault(info, config.model)):
        raise UsageError(f"model {config.model.name}: {wrong_class}")
    check_added(config.model, parts, folder)
    faults, idle = list[str](), list[str]()
    library = (generation.quantization or "").partition("-")[0]
    if library and importlib.util.find_spec(library) is None:
        faults.append(
            f"generation.quantization {generation.quantization} needs the package {library}; "
            f"install it with: pip install {library}, or leave the setting out"
        )
    # A single file has none, whatever its settings name.
    known = info is not None or source(config.model) == "file"
    if generation.safety_checker and known and "safety_checker" not in parts:
        faults.append(
            f"generation.safety_checker is true, but model {config.model.name} has none; "
            "plan with --set generation.safety_checker=false"
        )
    if info is not None:
        idle += _guidance_faults(info, config, rows_negative)
        faults += [*_call_faults(info, generation), *([] if begun else idle)]
    faults += _scheduler_faults(info, generation.scheduler)
    if faults:
        raise UsageError("; ".join(faults))
    return idle


def _scheduler_faults(info: PipelineInfo | None, wanted: str | None) -> Iterator[str]:
    """Yield a scheduler that cannot take the place of the model's own."""
    own = info.parts.get("scheduler") if info else None
    name = wanted or own
    if name == own != _UNREPEATABLE:
        return
    if name in INTERCHANGEABLE | _OF_FEW_STEPS and own in (None, *INTERCHANGEABLE):
        return
    import diffusers  # takes seconds

    valid = {kind for kind in dir(diffusers) if kind.endswith("Scheduler")}
    if info and own in valid:
        scheduler = getattr(diffusers, own).from_pretrained(info.folder, subfolder="scheduler")
        valid = {kind.__name__ for kind in scheduler.compatibles} | {own}
    valid.discard(_UNREPEATABLE)
    if name not in valid:
        fault = f"{name} does not fit {info.kind}" if info else f"diffusers has no {name}"
        null = "; null is the model's own" if info else ""
        yield f"generation.scheduler: {fault}; valid: {', '.join(sorted(valid))}{null}"


def _class_fault(info: PipelineInfo, model: ModelConfig) -> str:
    """Return why diffusers alone makes no images of a prompt with a model, "" where it does."""
    for name, kind in info.index.items():
        module = kind[0] if isinstance(kind, list) and kind else None
        own = name == "_class_name" and module is not None
        own = own or (info.folder / name / f"{module}.py").is_file()
        if own or "auto_map" in info.config(name):
            return (
                f"its {name.strip('_')} comes with code of its own, which sdwn does not run "
                "(trust_remote_code); choose a model whose classes diffusers has"
            )
    if not {"unet", "transformer"}.intersection(info.parts):
        return f"{info.kind} has neither a UNet nor a transformer; expected text to image"
    if info.kind not in FAMILIES and "prompt" not in info.call:
        return f"{info.kind} takes no text prompt"
    if info.kind not in FAMILIES and info.call.keys() & {"num_frames", "audio_length_in_s"}:
        return f"{info.kind} makes videos or sounds; expected text to image"
    for setting, loader in _LOADERS.items():
        if getattr(model, setting) and not hasattr(info.pipeline, loader):
            return f"diffusers loads no {setting} into {info.kind}; leave model.{setting} out"
    return ""


def _guidance_faults(info: PipelineInfo, config: RunConfig, rows_negative: bool) -> Iterator[str]:
    """Yield what guides nothing."""
    generation, family = config.generation, info.family
    guided, scale = info.guided(generation), generation.guidance_scale
    negative, name = generation.negative_prompt is not None, "generation.negative_prompt"
    if rows_negative and not negative:
        negative, name = True, "the negative_prompt of the table's rows"
    own = family.scale not in (None, "guidance_scale")
    instead = "generation.options.true_cfg_scale" if own else "generation.guidance_scale"
    acts = info.embeds_guidance or (guided and not own)
    if info.kind == "PRXPipeline" and guided and generation.batch_size != 1:
        yield "generation.batch_size: PRXPipeline guides images one at a time; write 1"
    # 0 and 1 both mean none.
    if not acts and scale not in (0, 1):
        reason = f"generation.guidance_scale: {scale:g} has no effect on {info.kind}"
        if family.scale == "guidance_scale" and not info.index.get("is_distilled"):
            yield f"{reason}; write more than {family.off:g} to guide, or 0 not to"
        else:
            more = f", and {instead} and generation.negative_prompt to guide" if own else ""
            yield f"{reason} with these weights; write generation.guidance_scale: 0{more}"
    if negative and not family.negative:
        yield f"{name}: {info.kind} takes none; leave it out"
    elif negative and not guided:
        can_guide = own or (family.scale and not info.embeds_guidance)
        more = f", or write {instead} above {family.off:g}" if can_guide else ""
        yield f"{name} has no effect on {info.kind} without a second prediction; leave it out{more}"
    elif own and guided and not negative and not config.catalog.table:
        yield f"{instead} has no effect without generation.negative_prompt; ' ' is an empty one"


def _type_fault(taken: inspect.Parameter, value: JsonValue) -> str:
    """Return why a value is not of the type that a call's argument has, "" where it is."""
    kind = taken.annotation
    if isinstance(kind, str) or kind is taken.empty:
        return ""
    # Some take null, though they do not say so.
    adapter = TypeAdapter[Any](kind | None, config=ConfigDict(arbitrary_types_allowed=True))
    try:
        adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        return error.errors()[0]["msg"].replace("Input should be", "expected")
    return ""


def _call_faults(info: PipelineInfo, generation: GenerationConfig) -> Iterator[str]:
    """Yield options that a call does not take, steps without effect, sizes that it would round."""
    options, steps = generation.options, generation.num_inference_steps
    for name, value in options.items():
        where = f"generation.options.{name}"
        if _NO_OPTION.fullmatch(name):
            known = name in GenerationConfig.model_fields
            yield f"{where}: {f'write generation.{name}' if known else 'sdwn sets this itself'}"
        elif name not in info.call:
            valid = ", ".join(sorted(key for key in info.call if not _NO_OPTION.fullmatch(key)))
            yield f"{where}: {info.kind} takes no such option; valid: {valid}"
        elif fault := _type_fault(info.call[name], value):
            yield f"{where}: {fault}, found {json.dumps(value)}"
    for name, schedule in info.schedules(generation).items():
        if len(schedule) != steps:
            yield (
                f"generation.num_inference_steps: {steps} has no effect, for {name} has "
                f"{len(schedule)} steps; write {len(schedule)}"
            )
    multiple = info.pixel_step
    for name, size in (("height", generation.height), ("width", generation.width)):
        if size % multiple:
            fitting = filter(None, (size // multiple * multiple, -(-size // multiple) * multiple))
            yield (
                f"generation.{name}: {info.kind} with these weights makes multiples of {multiple} "
                f"pixels, found {size}; write {' or '.join(map(str, fitting))}"
            )


@dataclass(frozen=True, slots=True)
class PromptLengths:
    """Numbers of prompts: ``counted``, and those ``cut`` at an encoder's ``limit`` of tokens."""

    encoder: str
    counted: int
    cut: int
    limit: int

    def __str__(self) -> str:
        return (
            f"{self.cut:,} of {self.counted:,} are longer than {self.limit} tokens ({self.encoder})"
        )


def prompt_lengths(
    folder: Path | None, config: RunConfig, prompts: Iterable[str]
) -> list[PromptLengths]:
    """Count the tokens of 10,000 distinct prompts at most, for each text encoder of a folder."""
    if folder is None:
        return []
    import transformers  # a second; its tokenizers come without torch

    info, loaded = PipelineInfo(folder), {}
    for name, kind in info.parts.items():
        if name in info.family.encoders:
            # Of a processor, which may need torch, only the tokenizer.
            of = getattr(transformers, kind if "Tokenizer" in kind else "AutoTokenizer")
            loaded[name] = of.from_pretrained(folder / name)
    try:
        add_inversion_tokens(loaded, config.model)
    except UsageError:
        raise
    except SdwnError:
        return []  # one is not on this machine
    distinct = list(dict.fromkeys(prompts))
    chosen = distinct[:: -(-len(distinct) // 10_000)]
    found = []
    for one in text_readers(info.family, loaded, config.generation):
        cut = sum(tokens > one.limit for tokens in one.tokens(chosen))
        found.append(PromptLengths(one.name, len(chosen), cut, one.limit))
    return found
