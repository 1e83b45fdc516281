"""What single families of pipelines do otherwise than all others, beside diffusers' own calls.

What holds for every family is tested in test_sampler.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler, TCDScheduler
from sdwn.config import GenerationConfig, RunConfig, load_config
from sdwn.errors import UsageError
from sdwn.generation.sampler import PromptEncoder, Sampler
from sdwn.models.families import (
    FAMILIES,
    PipelineInfo,
    check_settings,
    denoiser,
    prompt_lengths,
    require_usable,
)
from sdwn.models.pipeline import weights_bytes
from sdwn.planning.plan import Concept, ImageSpec
from sdwn.storage.images import Pixels

import families
import families_dit
from conftest import REPOSITORY, SavedModel, Sdwn


def config(model: Path, **generation: Any) -> RunConfig:
    own = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 0.0}
    own |= {"scheduler": None, "safety_checker": False, "precision": "fp32"}
    content = {"catalog": {"name": "closure"}, "model": {"name": str(model)}}
    return RunConfig.model_validate({**content, "generation": own | generation})


def sample(model: Path, prompt: str, **generation: Any) -> Pixels:
    negative = generation.get("negative_prompt")
    spec = ImageSpec(0, Concept("n02084071"), 0, prompt, 5, negative_prompt=negative)
    return Sampler(config(model, **generation)).sample([spec])[0].pixels


def call(plain: Any, prompt: str | None, **arguments: Any) -> Pixels:
    """The image of plain diffusers."""
    plain.set_progress_bar_config(disable=True)
    arguments = {"height": 64, "width": 64, "num_inference_steps": 2} | arguments
    images = plain(prompt, generator=[torch.Generator().manual_seed(5)], **arguments).images
    return np.asarray(images[0])


def refusal(model: Path, **generation: Any) -> str:
    with pytest.raises(UsageError) as caught:
        require_usable(config(model, **generation))
    return str(caught.value)


class TestTokens:
    """The tokens of what a pipeline makes of a prompt, as its encoder is given them."""

    @pytest.mark.parametrize(
        ("make", "options", "prompt"),
        [
            (families.pixart, {}, "A Cat [see https://example.org/cats] (that sits)"),
            (families.pixart, {"clean_caption": False}, "A Cat [see example.org] (that sits) "),
            (families_dit.sana, {}, "a cat"),
            (families_dit.sana, {}, " A Cat "),
            (families_dit.sana, {"clean_caption": True}, "a cat (that sits)"),
            (families_dit.sana, {"complex_human_instruction": None}, "a cat"),
            (families_dit.sana, {"complex_human_instruction": ["Draw", "so: "]}, "a cat"),
            (families_dit.lumina_2, {}, "a cat"),
            (families_dit.lumina_2, {"system_prompt": "Draw."}, "a cat"),
        ],
    )
    def test_they_are_counted_as_it_reads_them(
        self, saved: SavedModel, make: Any, options: dict[str, Any], prompt: str
    ) -> None:
        generation = config(saved(make), options=options).generation
        info = PipelineInfo(saved(make))
        plain = DiffusionPipeline.from_pretrained(saved(make), transformer=None, vae=None)
        encoded = PromptEncoder(plain, generation, info).encode(prompt)
        assert encoded.tokens == int(encoded.arguments["prompt_attention_mask"].sum())
        assert not encoded.truncated

    def test_links_and_brackets_do_not_fill_pixarts_encoder(self, saved: SavedModel) -> None:
        prompts = ["a cat " + "https://example.org/a " * 20]
        cleaned = config(saved(families.pixart))
        (lengths,) = prompt_lengths(saved(families.pixart), cleaned, prompts)
        assert lengths.cut == 0
        uncleaned = config(saved(families.pixart), options={"clean_caption": False})
        (lengths,) = prompt_lengths(saved(families.pixart), uncleaned, prompts)
        assert lengths.cut == 1


class TestGuidance:
    def test_z_image_guides_above_zero(self, saved: SavedModel) -> None:
        model = saved(families_dit.z_image)
        assert PipelineInfo(model).guided(GenerationConfig(guidance_scale=0.5))
        assert not PipelineInfo(model).guided(GenerationConfig(guidance_scale=0))
        assert "guidance_scale above 0" in refusal(model, negative_prompt="blue")
        require_usable(config(model, guidance_scale=0.5, negative_prompt="blue"))
        plain = DiffusionPipeline.from_pretrained(model)
        for scale in (0.0, 0.5):
            made = sample(model, "a cat", guidance_scale=scale)
            np.testing.assert_array_equal(made, call(plain, "a cat", guidance_scale=scale))

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (families_dit.latent_consistency, "LatentConsistencyModelPipeline takes none"),
            (families_dit.sana_sprint, "SanaSprintPipeline takes none"),
            (
                families_dit.xl_consistency,
                "has no effect on StableDiffusionXLPipeline without a second",
            ),
        ],
    )
    def test_where_it_is_an_input_a_negative_prompt_is_refused(
        self, saved: SavedModel, make: Any, message: str
    ) -> None:
        info = PipelineInfo(saved(make))
        assert not info.guided(GenerationConfig(guidance_scale=7.5)), "no second prediction"
        require_usable(config(saved(make), guidance_scale=7.5))
        assert message in refusal(saved(make), guidance_scale=7.5, negative_prompt="blue")

    def test_lumina_can_guide_the_first_steps_alone(self, saved: SavedModel) -> None:
        model, options = saved(families_dit.lumina_2), {"cfg_trunc_ratio": 0.5}
        settings = {"guidance_scale": 4.0, "num_inference_steps": 3}
        plain = DiffusionPipeline.from_pretrained(model)
        made = sample(model, "a cat", options=options, **settings)
        np.testing.assert_array_equal(made, call(plain, "a cat", **options, **settings))
        assert (made != sample(model, "a cat", **settings)).any()


class TestSettings:
    @pytest.mark.parametrize(
        ("make", "generation", "told"),
        [
            (families.flux_2_klein_base, {"guidance_scale": 4.0}, "table's rows: .* takes none"),
            (families.sd_turbo, {}, "table's rows has no effect on .* leave it out"),
            (families.flux_schnell, {"options": {"true_cfg_scale": 4.0}}, ""),
        ],
    )
    def test_negative_prompts_of_a_table_are_refused_where_they_would_not_act(
        self, saved: SavedModel, sdwn: Sdwn, make: Any, generation: dict[str, Any], told: str
    ) -> None:
        (sdwn.folder / "rows.csv").write_text("id,prompt,negative_prompt\na,a cat,blue\nb,a dog,\n")
        content = config(saved(make), **generation).model_dump(mode="json", exclude_defaults=True)
        content["catalog"] = {"table": "rows.csv"}
        (sdwn.folder / "c.yaml").write_text(json.dumps(content))
        done = sdwn("plan", "c.yaml", "run", code=2 if told else 0)
        assert re.search(told, " ".join(done.stderr.split()))

    @pytest.mark.parametrize("steps", [1, 4])
    def test_sana_sprint_takes_other_than_two_steps(self, saved: SavedModel, steps: int) -> None:
        model = saved(families_dit.sana_sprint)
        null = {"intermediate_timesteps": None}
        made = sample(model, "a cat", num_inference_steps=steps, options=null)
        plain = call(
            DiffusionPipeline.from_pretrained(model),
            "a cat",
            num_inference_steps=steps,
            guidance_scale=0.0,
            use_resolution_binning=False,
            **null,
        )
        np.testing.assert_array_equal(made, plain)

    @pytest.mark.parametrize(
        ("make", "size", "message"),
        [
            (families_dit.sana, 48, "multiples of 32 pixels, found 48; write 32 or 64"),
            (families_dit.lumina_2, 40, "multiples of 16 pixels, found 40; write 32 or 48"),
            (families_dit.z_image, 8, "multiples of 16 pixels, found 8; write 16"),
        ],
    )
    def test_a_size_that_is_not_sampled_as_asked_is_refused(
        self, saved: SavedModel, make: Any, size: int, message: str
    ) -> None:
        refused = refusal(saved(make), width=size)
        assert refused.startswith("generation.width: ")
        assert message in refused

    def test_schedulers_of_few_steps_fit_where_diffusers_documents_them(
        self, saved: SavedModel
    ) -> None:
        model = saved(families.sd_turbo)
        plain = DiffusionPipeline.from_pretrained(model)
        for kind in (LCMScheduler, TCDScheduler):
            made = sample(model, "a cat", scheduler=kind.__name__, guidance_scale=1.0)
            plain.scheduler = kind.from_config(plain.scheduler.config)
            np.testing.assert_array_equal(made, call(plain, "a cat", guidance_scale=1.0))
        for make in (families_dit.latent_consistency, families_dit.few_steps):
            message = refusal(saved(make), scheduler="PNDMScheduler")
            assert "PNDMScheduler does not fit" in message
            assert "valid: LCMScheduler; null is the model's own" in message


@pytest.mark.parametrize(
    "make", [families_dit.sana, families_dit.sana_sprint, families_dit.z_image]
)
def test_latents_stay_in_float32_where_diffusers_keeps_them_so(
    saved: SavedModel, make: Any
) -> None:
    plain = DiffusionPipeline.from_pretrained(saved(make), dtype=torch.bfloat16)
    binning = {"use_resolution_binning": False} if make is not families_dit.z_image else {}
    expected = call(plain, "a cat", guidance_scale=1.0, **binning)
    made = sample(saved(make), "a cat", guidance_scale=1.0, precision="bf16")
    np.testing.assert_array_equal(made, expected)


def test_sanas_encoder_and_vae_stay_in_bf16_as_its_card_says(
    saved: SavedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunConfig, "needs_gpu", False)
    model = saved(families_dit.sana)
    types = {"default": torch.float16, "vae": torch.bfloat16, "text_encoder": torch.bfloat16}
    plain = DiffusionPipeline.from_pretrained(model, dtype=types)
    settings = {"guidance_scale": 4.5}
    made = sample(model, "a cat", precision="fp16", **settings)
    expected = call(plain, "a cat", use_resolution_binning=False, **settings)
    np.testing.assert_array_equal(made, expected)


def test_flux_has_text_encoders_in_float32_on_cards_without_bf16(
    saved: SavedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunConfig, "needs_gpu", False)
    model = saved(families.flux_schnell)
    plain = DiffusionPipeline.from_pretrained(model)
    with torch.no_grad():
        embeddings, pooled, _ = plain.encode_prompt("a cat", None)
    plain.to(torch.float16)
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(5))
    expected = call(
        plain,
        None,
        prompt_embeds=embeddings.half(),
        pooled_prompt_embeds=pooled.half(),
        guidance_scale=0.0,
        # Drawn in float32, whatever the precision.
        latents=plain._pack_latents(noise, 1, 4, 8, 8).half(),
    )
    np.testing.assert_array_equal(sample(model, "a cat", precision="fp16"), expected)
    sizes = [weights_bytes(model, config(model, precision=kind)) for kind in ("fp16", "fp32")]
    assert [sizes[1][part] / size for part, size in sorted(sizes[0].items())] == [1, 1, 2, 2]


class TestOfNoFamily:
    """PRX: not in the table, and with binning on when left alone."""

    def test_a_size_is_sampled_as_asked(self, saved: SavedModel) -> None:
        model = saved(families_dit.prx)
        plain = DiffusionPipeline.from_pretrained(model)
        made = sample(model, "a cat", guidance_scale=4.0, batch_size=1)
        expected = call(plain, "a cat", guidance_scale=4.0, use_resolution_binning=False)
        np.testing.assert_array_equal(made, expected)
        assert (made != call(plain, "a cat", guidance_scale=4.0)).any(), "binned"
        options = {"use_resolution_binning": True}
        assert "sdwn sets this itself" in refusal(model, options=options)

    def test_it_is_guided_one_image_at_a_time(self, saved: SavedModel) -> None:
        model = saved(families_dit.prx)
        assert "generation.batch_size" in refusal(model, guidance_scale=4.0)
        plain = DiffusionPipeline.from_pretrained(model)
        with pytest.raises(RuntimeError, match="size of tensor"):
            plain(["a cat", "a dog"], height=64, width=64, use_resolution_binning=False)

    def test_a_negative_prompt_reaches_it(self, saved: SavedModel) -> None:
        model = saved(families_dit.prx)
        settings = {"guidance_scale": 4.0, "batch_size": 1}
        made = sample(model, "a cat", negative_prompt="blue", **settings)
        plain = DiffusionPipeline.from_pretrained(model)
        options = {"guidance_scale": 4.0, "use_resolution_binning": False}
        expected = call(plain, "a cat", negative_prompt="blue", **options)
        np.testing.assert_array_equal(made, expected)
        assert "without a second prediction" in refusal(model, negative_prompt="blue")

    @pytest.mark.parametrize(
        ("kind", "wrong"),
        [
            ("OmniGenPipeline", {"negative_prompt": "blue"}),
            ("HunyuanImagePipeline", {"guidance_scale": 7.5}),
            ("HiDreamImagePipeline", {"guidance_scale": 0.0, "negative_prompt": "blue"}),
            ("Kandinsky5T2IPipeline", {"options": {"clip_skip": 1}}),
            ("ErnieImagePipeline", {"options": {"clip_skip": 1}}),
        ],
    )
    def test_what_a_call_does_not_take_is_refused_before_anything_is_loaded(
        self, tmp_path: Path, kind: str, wrong: dict[str, Any]
    ) -> None:
        """Of classes that AutoPipelineForText2Image does not know, too: by their index alone."""
        index = {"_class_name": kind, "transformer": ["diffusers", "A"], "vae": ["diffusers", "B"]}
        index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        guided = {} if kind == "HunyuanImagePipeline" else {"guidance_scale": 5.0}
        check_settings(config(tmp_path, **guided), tmp_path)
        *_, setting = wrong
        with pytest.raises(UsageError, match=rf"generation\.{setting}"):
            check_settings(config(tmp_path, **(guided | wrong)), tmp_path)


# By shipped config: its model's class at toy size, and what the model's card says.
CARDS: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "sdxl-turbo": (
        families.sdxl_turbo,
        {"size": 512, "steps": 1, "scale": 0, "precision": "fp16"},
        False,
    ),
    "sd-3.5": (
        families.stable_diffusion_3,
        {"size": 1024, "steps": 28, "scale": 3.5, "precision": "bf16"},
        True,
    ),
    "flux-schnell": (
        families.flux_schnell,
        {"size": 1024, "steps": 4, "scale": 0, "precision": "bf16"},
        False,
    ),
    "sana": (
        families_dit.sana,
        {"size": 1024, "steps": 20, "scale": 4.5, "precision": "bf16"},
        True,
    ),
    "z-image": (
        families_dit.z_image,
        {"size": 1024, "steps": 9, "scale": 0, "precision": "bf16"},
        False,
    ),
}


@pytest.mark.parametrize("name", CARDS)
def test_a_shipped_config_is_planned_and_sampled_as_the_card_says(
    sdwn: Sdwn, saved: SavedModel, name: str
) -> None:
    make, card, guided = CARDS[name]
    model = saved(make)
    settings = (f"model.name={model}", "model.variant=null")
    options = [word for one in settings for word in ("--set", one)]
    assert sdwn.json("plan", name, "run", *options)["images"] == 10_000
    shipped = load_config(REPOSITORY / f"configs/{name}.yaml", settings)
    own = shipped.generation
    assert (own.height, own.width) == (card["size"], card["size"])
    assert (own.num_inference_steps, own.guidance_scale) == (card["steps"], card["scale"])
    assert own.precision == card["precision"]
    assert PipelineInfo(model).guided(own) == guided
    small = own.model_copy(update={"height": 64, "width": 64, "precision": "fp32"})
    sampler = Sampler(shipped.model_copy(update={"generation": small}))
    predictions = 0

    def count(_: Any, values: Any, named: dict[str, Any]) -> None:
        nonlocal predictions
        predictions += len(values[0] if values else named["hidden_states"])

    denoiser(sampler.pipeline).register_forward_pre_hook(count, with_kwargs=True)
    spec = ImageSpec(0, Concept("n02084071"), 0, "a photo of a dog", 5)
    assert sampler.sample([spec])[0].status == "ok"
    assert predictions == card["steps"] * (1 + guided)


def test_every_family_stands_on_the_page_of_models() -> None:
    """With its encoders' limits of tokens, and what guides it."""
    page = (REPOSITORY / "docs/models.md").read_text(encoding="utf-8")
    rows = {
        cells[1].strip("`"): cells
        for line in page.splitlines()
        if line.startswith("| `") and len(cells := [cell.strip() for cell in line.split("|")]) > 6
    }
    assert set(rows) == set(FAMILIES)
    fp16 = page.partition("Where fp16 is too narrow")[2].partition("\n## ")[0]
    for kind, (_, _, _, tokens, guides, negative, multiples, *_) in rows.items():
        family = FAMILIES[kind]
        limits = [77 if taken.limit is None else taken.limit for taken in family.encoders.values()]
        if kind != "QwenImage21Pipeline":
            assert sorted({int(n) for n in re.findall(r"\b\d+", tokens)}) == sorted(set(limits)), (
                kind
            )
        above = {
            None: "",
            "guidance_scale": "`guidance_scale`",
            "true_cfg_scale": "`true_cfg_scale`",
        }
        assert f"{above[family.scale]} > {family.off:g}" in guides or family.scale is None, kind
        assert (negative == "yes") == family.negative, kind
        for part, precision in family.instead_of_fp16.items():
            assert re.search(rf"^.*`{kind}`.*`{part}`.* {precision} \|$", fp16, re.M), kind
        assert int(multiples) % (8 * family.patch) == 0, kind
