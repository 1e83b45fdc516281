"""A model's name and folder: what no task could load is refused before any task waits."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
from sdwn.config import RunConfig
from sdwn.errors import IntegrityError, SdwnError, UsageError
from sdwn.jobs.profile import ClusterProfile
from sdwn.models.builtin import builtin_folder
from sdwn.models.families import INTERCHANGEABLE, require_usable
from sdwn.models.lock import ensure_lock
from sdwn.models.weights import obtain_weights, require_whole, weights_folder
from sdwn.preflight.doctor import check_run

from conftest import PlanRun, Sdwn, noise_config

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return shutil.copytree(builtin_folder("tiny"), tmp_path / "model")


def config(model: Path, safety_checker: bool = True, variant: str | None = None) -> RunConfig:
    return noise_config(
        model={"name": str(model), "variant": variant},
        generation={"safety_checker": safety_checker},
    )


def renamed(before: str, after: str) -> Callable[[Path], None]:
    """Rename the weights of all parts."""

    def change(model: Path) -> None:
        for file in model.rglob("*.safetensors"):
            file.rename(file.with_name(file.name.replace(before, after)))

    return change


def pointers(model: Path) -> None:
    for file in model.rglob("*.safetensors"):
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9876\n")


def vocabulary_pointer(model: Path) -> None:
    (model / "tokenizer/vocab.json").write_text("version https://git-lfs.github.com/spec/v1\n")


def without(name: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        path = model / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def cut_short(model: Path) -> None:
    (model / UNET).write_bytes((model / UNET).read_bytes()[:-1000])


def sharded(model: Path, absent: str = "") -> None:
    (model / UNET).rename(model / "unet/diffusion_pytorch_model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    if absent:
        index["weight_map"]["b"] = absent
    (model / f"{UNET}.index.json").write_text(json.dumps(index))


def half_sharded(model: Path) -> None:
    sharded(model, "diffusion_pytorch_model-00002-of-00002.safetensors")


BROKEN = [
    (pointers, "is a pointer of git-lfs.*git lfs pull"),
    (vocabulary_pointer, r"tokenizer/vocab\.json is a pointer of git-lfs"),
    (renamed(".safetensors", ".fp16.safetensors"), "only in the variant fp16; set model.variant"),
    (renamed(".safetensors", ".bin"), r"only as .*\.bin, which could run code.*save_pretrained"),
    (renamed(".safetensors", ".fp16.bin"), r'variant="fp16"\)\.save_pretrained'),
    (without("safety_checker"), "names the part safety_checker, and there are no files of it"),
    (without("tokenizer"), "names the part tokenizer"),
    (without(UNET), "unet has no diffusion_pytorch_model.safetensors"),
    (without("vae/config.json"), r"vae/config\.json is missing"),
    (cut_short, f"{UNET} is damaged or cut short"),
    (half_sharded, r"index\.json lists .*-00002-of-00002\.safetensors, which is missing"),
]


@pytest.mark.parametrize(("change", "told"), BROKEN)
def test_a_folder_that_is_not_whole_is_told(
    model: Path, change: Callable[[Path], None], told: str
) -> None:
    change(model)
    with pytest.raises(IntegrityError, match=told):
        weights_folder(config(model))


def test_it_is_told_wherever_the_folder_is_used(model: Path, planned: PlanRun) -> None:
    pointers(model)
    told = "is a pointer of git-lfs.*git lfs pull"
    for refused in (require_usable, obtain_weights):
        with pytest.raises(IntegrityError, match=told):
            refused(config(model))
    # A run that was planned before the folder was like this, or by an older version.
    paths, plan = planned(model={"name": str(model)}, generation={"safety_checker": True})
    assert ensure_lock(paths, plan) is None, "nothing is locked to it"
    local = ClusterProfile(executor="local")
    found = [one for one in check_run(paths, plan, local) if one.subject == "weights"]
    assert [one.verdict for one in found] == ["problem"]
    assert re.search(told, found[0].text)


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        (lambda _: None, {}),
        (sharded, {}),
        (renamed(".safetensors", ".fp16.safetensors"), {"variant": "fp16"}),
        (without("safety_checker"), {"safety_checker": False}),
    ],
)
def test_a_folder_that_diffusers_takes_is_taken(
    model: Path, change: Callable[[Path], None], settings: dict[str, object]
) -> None:
    change(model)
    require_whole(model, config(model, **settings))  # type: ignore[arg-type]
    assert weights_folder(config(model, **settings)) == model  # type: ignore[arg-type]


def test_a_variant_that_no_part_has_is_told(model: Path) -> None:
    with pytest.raises(IntegrityError, match="no part has the variant fp16; leave"):
        weights_folder(config(model, variant="fp16"))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("https://huggingface.co/lab/sd", r"write model\.name: lab/sd$"),
        ("huggingface.co/lab/sd/", r"write model\.name: lab/sd$"),
        ("https://hf.co/lab/sd/blob/main/sd.ckpt?x=1", r"model\.name: lab/sd$"),
        ("https://civitai.com/models/1", "no such folder, and no hub name either"),
        ("v1-5-pruned.ckpt", "a single file.*save_file"),
        ("flux1-dev-Q4_0.gguf", "a quantized denoiser alone.*set generation.quantization"),
        ("SD.SafeTensors", "SD.SafeTensors: no such file"),
        ("lab/sd/", "no such folder, and no hub name either"),
        ("a/b/c", "no such folder, and no hub name either"),
    ],
)
def test_a_name_that_is_none_says_what_to_write(sdwn: Sdwn, name: str, told: str) -> None:
    (sdwn.folder / "c.yaml").write_text(
        json.dumps({**noise_config().model_dump(mode="json"), "model": {"name": name}})
    )
    refused = " ".join(sdwn("plan", "c.yaml", "run", code=2).stderr.split())
    with pytest.raises(UsageError, match=told):
        raise UsageError(refused)
    assert not (sdwn.folder / "run").exists()
    assert sdwn("tune", "c.yaml", "--profile", "local", code=2).stderr.split() == refused.split()


@pytest.mark.parametrize(
    ("scheduler", "told"),
    [
        ("EulerDiscreteSheduler", "diffusers has no .*; valid: .*EulerDiscreteScheduler"),
        ("DPM++ 2M Karras", "; valid: .*DPMSolverMultistepScheduler"),
    ],
)
@pytest.mark.parametrize("name", ["builtin:noise", "lab/not-here", "/not/here"])
def test_a_scheduler_that_diffusers_does_not_have_is_refused(
    name: str, scheduler: str, told: str
) -> None:
    wanted = noise_config(model={"name": name}, generation={"scheduler": scheduler})
    with pytest.raises(SdwnError, match=told):
        require_usable(wanted)


def test_what_is_not_here_yet_may_be_planned() -> None:
    elsewhere = ("/not/here", "~/not-here", "/not/here.safetensors")
    for name in ("lab/not-here", "builtin:noise", *elsewhere):
        for scheduler in (None, "PNDMScheduler", "DDIMScheduler"):
            require_usable(noise_config(model={"name": name}, generation={"scheduler": scheduler}))


def test_schedulers_of_one_family_stand_in_for_one_another() -> None:
    for name in INTERCHANGEABLE:
        own = getattr(diffusers, name)()
        assert {kind.__name__ for kind in own.compatibles} | {name} >= INTERCHANGEABLE


@pytest.mark.process
def test_planning_with_another_scheduler_of_the_family_needs_no_torch() -> None:
    code = (
        "import sys; from sdwn.config import load_config; from sdwn.paths import shipped_file\n"
        "from sdwn.models.families import require_usable\n"
        "changed = ('generation.scheduler=DDIMScheduler',)\n"
        "config = load_config(shipped_file('config', 'demo'), changed)\n"
        "require_usable(config)\n"
        "print(sorted({'torch', 'diffusers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
