"""Weights got once and locked, then no network: against a small hub of the tests' own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
from diffusers.pipelines.pipeline_loading_utils import variant_compatible_siblings
from safetensors.torch import save_file
from sdwn.errors import IntegrityError, SdwnError
from sdwn.generation.task import generate
from sdwn.jobs.journal import read_journal
from sdwn.models import lock
from sdwn.models.builtin import builtin_folder
from sdwn.models.lock import Lock, locked_weights
from sdwn.models.weights import fingerprint, needed
from sdwn.paths import ReleasePaths, RunPaths
from sdwn.planning.plan import read_plan
from sdwn.prediction.table import open_features
from sdwn.preflight.prefetch import prefetch
from sdwn.releases.merge import merge
from sdwn.releases.release import Release
from sdwn.storage.shards import ImageFile

from conftest import OwnProcess, PlanRun, Sdwn, noise_config
from hub import Hub, serving

# Each fetches, locks or loads whole pipelines: a minute together.
pytestmark = pytest.mark.model

TINY: dict[str, Any] = {
    "catalog": {"roots": ["corgi.n.01"]},
    "images_per_synset": 2,
    "generation": {
        "height": 32,
        "width": 32,
        "num_inference_steps": 1,
        "precision": "fp32",
        "safety_checker": False,
    },
    "storage": {"images_per_shard": 4},
}
CLASSIFIER = "test_vit"

# Python reads it at its start: whoever looks for a network is written down, and stopped.
GUARD = """
import os, socket, sys

def look(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        refuse(event, arguments[0])
    elif event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        if arguments[0].family in (socket.AF_INET, socket.AF_INET6):
            refuse(event, arguments[1])

def refuse(event, where):
    with open(os.environ["SDWN_TEST_CONNECTIONS"], "a") as file:
        file.write(f"{event} {where} by {sys.argv}\\n")
    raise ConnectionRefusedError(f"the test has no network: {event} {where}")

sys.addaudithook(look)
"""


class Site:
    """A folder to work in, with the hub that its commands would ask and a cache of its own."""

    def __init__(self, folder: Path, hub: Hub) -> None:
        self.folder, self.hub, self.sdwn = folder, hub, OwnProcess(folder)
        self.snapshots = folder / "hf/hub/models--lab--tiny-sd/snapshots"

    def run(self, name: str = "run") -> RunPaths:
        return RunPaths(self.folder / name)

    def lock(self, name: str = "run") -> dict[str, Any]:
        content = json.loads(self.run(name).lock.read_text())
        assert isinstance(content, dict)
        return content

    def commands(self, *lines: str) -> list[dict[str, Any]]:
        """Run commands one after another in one process, which imports torch once."""
        code = (
            "import shlex, sys; from sdwn.cli.main import app\n"
            "for line in sys.argv[1:]: app([*shlex.split(line), '--json'], standalone_mode=False)"
        )
        command = [sys.executable, "-c", code, *lines]
        done = subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, small_clip: Path) -> Iterator[Site]:
    """A hub with the built-in pipeline, a classifier and a CLIP, beside what nobody needs."""
    folder = tmp_path_factory.mktemp("site")
    model = shutil.copytree(builtin_folder("tiny"), folder / "model")
    for name in ("README.md", "tiny.ckpt", "tiny.safetensors", "unet/diffusion_pytorch_model.bin"):
        (model / name).write_bytes(b"the same in another format")
    (folder / "classifier").mkdir()
    state = timm.create_model(CLASSIFIER).state_dict()
    save_file(state, folder / "classifier/model.safetensors")
    config = {**TINY, "model": {"name": "lab/tiny-sd"}, "evaluation": {"model": CLASSIFIER}}
    (folder / "small.yaml").write_text(json.dumps(config))
    with serving() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("HF_HOME", str(folder / "hf"))
        hub.commit("timm/test_vit.r160_in1k", folder / "classifier")
        hub.commit("lab/tiny-sd", model)
        hub.commit("lab/clip", small_clip)
        yield Site(folder, hub)


@pytest.fixture(scope="module")
def locked(site: Site) -> str:
    """A run that was planned, then prefetched; the commit that it is locked to."""
    planned = site.sdwn("plan", "small.yaml", "run")
    assert "(not downloaded yet)" in planned.stderr
    assert planned.stdout.endswith("next: sdwn prefetch run\n")
    assert site.hub.requests == [], "planning asks no hub"
    assert not site.run().lock.exists()
    found = site.sdwn.json("prefetch", "run", "--features", "clip:lab/clip")
    assert found["revision"] == site.hub.main["lab/tiny-sd"]
    assert found["lock"] == "run/lock.json"
    assert Path(found["folder"]) == site.snapshots / found["revision"]
    assert Path(found["classifier"]).is_file()
    assert Path(found["encoder"]).parent.name == site.hub.main["lab/clip"]
    assert (found["wordnet"], found["problems"]) == ("3.0", [])
    return str(found["revision"])


@contextmanager
def no_network(site: Site, folder: Path) -> Iterator[Path]:
    """No process started meanwhile may look for a network, the test's own hub included."""
    (folder / "sitecustomize.py").write_text(GUARD)
    connections, before = folder / "connections", len(site.hub.requests)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("SDWN_TEST_CONNECTIONS", str(connections))
        yield connections
    assert site.hub.requests[before:] == []


@pytest.fixture(scope="module")
def moved(site: Site, locked: str) -> str:
    """The hub's branch stands for other weights by now."""
    with (site.folder / "model/vae/diffusion_pytorch_model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\x3f")
    return site.hub.commit("lab/tiny-sd", site.folder / "model")


@pytest.fixture(scope="module")
def finished(
    site: Site, locked: str, moved: str, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """The run made, merged, classified, encoded, an image made again, without a network."""
    with no_network(site, tmp_path_factory.mktemp("guard")) as connections:
        site.sdwn("submit", "run", "--wait", "--retries", "0")
        found = site.commands(
            "merge run --release out",
            f"evaluate out --model {CLASSIFIER}",
            "regenerate out pembroke 1",
            f"features out --model {CLASSIFIER}",
            "features out --model clip:lab/clip",
        )
    assert not connections.exists(), connections.read_text()
    return found


@pytest.mark.process
def test_prefetch_takes_only_what_is_needed(site: Site, locked: str) -> None:
    model = [line for line in site.hub.requests if line.startswith("GET /lab/tiny-sd/resolve/")]
    files = {line.partition(f"/resolve/{locked}/")[2] for line in model}
    assert {file["file"] for file in site.lock()["files"]} == files
    assert "vae/diffusion_pytorch_model.safetensors" in files
    unwanted = (".md", ".ckpt", ".bin", "tiny.safetensors")
    assert not [name for name in files if name.endswith(unwanted)]
    assert not [name for name in files if name.startswith("safety_checker")], "switched off"


@pytest.mark.process
def test_a_connection_would_be_noticed(site: Site, tmp_path: Path) -> None:
    code = (
        "import sys, urllib.request\n"
        "try: urllib.request.urlopen(sys.argv[1], timeout=5)\n"
        "except OSError as error: print(error)"
    )
    command = [sys.executable, "-c", code, site.hub.url]
    with no_network(site, tmp_path) as connections:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "the test has no network" in done.stdout
    assert "127.0.0.1" in connections.read_text()


@pytest.mark.process
def test_no_stage_looks_for_a_network(
    site: Site, locked: str, moved: str, finished: list[dict[str, Any]]
) -> None:
    assert moved != locked
    merged, evaluated, again, timms, clips = finished
    images = [one["images"] for one in (merged, evaluated, timms, clips)]
    assert images == [4, 4, 4, 4]
    assert (again["verdict"], again["reasons"]) == ("equal", [])
    task_run = Release(site.folder / "out").provenance(0)["task_run"]
    assert task_run is not None
    assert (task_run["model"], task_run["revision"]) == ("lab/tiny-sd", locked)
    classified = Path(evaluated["path"]).read_text()
    assert site.hub.main["timm/test_vit.r160_in1k"] in classified
    for found, name in ((timms, "timm/test_vit.r160_in1k"), (clips, "lab/clip")):
        encoder = open_features(Release(site.folder / "out"), found["features"]).encoder
        assert site.hub.main[name] in encoder["weights"]


def test_a_late_lock_names_what_made_the_images(
    site: Site, locked: str, moved: str, finished: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(site.folder / "hf/hub"))
    shutil.copytree(site.run().root, site.run("late").root)
    site.run("late").lock.unlink()
    branch = site.snapshots.parent / "refs/main"
    branch.write_text(moved)
    made = lock.ensure_lock(site.run("late"), read_plan(site.run("late")))
    branch.write_text(locked)
    assert made is not None
    assert made.revision == locked


@pytest.mark.process
def test_a_cache_with_a_hole_is_refused_and_mended(
    site: Site, locked: str, finished: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = site.run("again")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(site.folder / "hf/hub"))
    planned = Sdwn(site.folder)("plan", "small.yaml", "again")
    assert f"model: lab/tiny-sd (revision {locked})" in planned.stderr
    before = site.lock("again")
    assert before["files"] == site.lock()["files"]
    hole = site.snapshots / locked / "unet/diffusion_pytorch_model.safetensors"
    hole.resolve().unlink()
    refused = site.sdwn("pilot", "again", code=1).stderr
    refused = " ".join(refused.split())
    assert f"{hole}: changed or missing since the run was locked to it (no such file)" in refused
    assert "where there is a network, with: sdwn prefetch again (model lab" in refused
    assert not again.pilot.root.exists(), "no job was submitted"
    mended, plain = site.commands(
        "prefetch again --no-classifier", "prefetch again --folder plain --no-classifier"
    )
    assert hole.is_file()
    assert (mended["revision"], mended["folder"]) == (locked, str(site.snapshots / locked))
    assert (plain["revision"], plain["folder"]) == (locked, str(site.folder / "plain"))
    assert site.lock("again") == {**before, "folder": str(site.folder / "plain")}
    assert not [path for path in (site.folder / "plain").rglob("*") if path.is_symlink()]
    shutil.rmtree(site.snapshots)
    generate(again.root, [0])
    with ImageFile(again.shard(0)) as here, ImageFile(site.run().shard(0)) as there:
        assert [task_run["revision"] for task_run in here.task_runs] == [locked]
        assert here.rows()["sha256"].tobytes() == there.rows()["sha256"].tobytes()


@pytest.mark.process
def test_what_the_hub_has_not_is_told(site: Site) -> None:
    refused = site.sdwn("prefetch", "small.yaml", "--set", "model.name=lab/none", code=1).stderr
    assert "lab/none: no folder of this name, and the hub did not give it: Repository" in refused


@pytest.mark.process
def test_a_model_that_the_hub_has_only_otherwise_is_told_before_the_download(
    site: Site, tmp_path: Path
) -> None:
    model = shutil.copytree(builtin_folder("tiny"), tmp_path / "half")
    unet = model / "unet/diffusion_pytorch_model.safetensors"
    unet.rename(unet.with_name("diffusion_pytorch_model.fp16.safetensors"))
    site.hub.commit("lab/half", model)
    refused = site.sdwn("prefetch", "small.yaml", "--set", "model.name=lab/half", code=1).stderr
    assert "unet has its weights only in the variant fp16; set model.variant: fp16" in refused
    (model / "model_index.json").unlink()
    site.hub.commit("lab/single", model)
    refused = site.sdwn("prefetch", "small.yaml", "--set", "model.name=lab/single", code=1).stderr
    assert "no pipeline in diffusers format on the hub" in " ".join(refused.split())
    asked = [line for line in site.hub.requests if "/lab/half/resolve" in line and "GET" in line]
    assert [line.rpartition("/")[2] for line in asked] == ["model_index.json"]


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_what_is_needed_is_what_diffusers_takes(variant: str | None) -> None:
    weights = [
        *(f"unet/diffusion_pytorch_model{v}.{k}" for v in ("", ".fp16") for k in ("safetensors",)),
        *("unet/diffusion_pytorch_model.non_ema.safetensors", "unet/diffusion_pytorch_model.bin"),
        *(f"text_encoder/model{v}-0000{i}-of-00002.safetensors" for i in (1, 2) for v in ("",)),
        *(f"text_encoder/model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)),
        "text_encoder/model.safetensors.index.json",
        "text_encoder/model.safetensors.index.fp16.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    taken, _ = variant_compatible_siblings(weights, variant, ignore_patterns=["*.bin"])
    kinds = {
        "unet": "UNet2DConditionModel",
        "text_encoder": "CLIPTextModel",
        "vae": "AutoencoderKL",
    }
    own = {"model_index.json", *(f"{part}/config.json" for part in kinds)}
    config = noise_config(model={"name": "lab/sd", "variant": variant})
    assert set(needed("here", [*own, *weights], kinds, config)) == own | set(taken)


def test_what_else_cannot_be_had_is_told() -> None:
    found = prefetch(noise_config(evaluation={"model": "no_such_classifier"}))
    assert (found["classifier"], found["wordnet"]) == (None, "3.0")
    assert ["no_such_classifier" in problem for problem in found["problems"]] == [True]
    found = prefetch(noise_config(evaluation={"model": "efficientnet-lite0"}))
    assert found["problems"] == []


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return shutil.copytree(builtin_folder("tiny"), tmp_path / "model")


@pytest.fixture
def local(planned: PlanRun, model: Path) -> RunPaths:
    """A run with a model in a folder, locked."""
    paths, plan = planned(**TINY, model={"name": str(model)})
    found = lock.ensure_lock(paths, plan)
    assert found is not None
    assert found.revision == fingerprint(model), "as sessions name it"
    return paths


@pytest.mark.parametrize(
    "name", ["vae/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"]
)
def test_a_changed_model_folder_is_refused(local: RunPaths, model: Path, name: str) -> None:
    content = (model / name).read_bytes()
    with (model / name).open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(bytes(reversed(content[-8:])))
    with pytest.raises(IntegrityError, match=f"{name}: changed or missing since the run was lock"):
        generate(local.root, [0])
    assert not local.pieces.exists()
    (model / name).write_bytes(content)
    weights = locked_weights(local, read_plan(local).config.model)
    assert weights is not None
    assert weights.folder == model, "of the same content, if of another time"


def test_a_lock_is_written_once_and_must_be_whole(local: RunPaths) -> None:
    plan, text = read_plan(local), local.lock.read_text()
    assert lock.ensure_lock(local, plan) == Lock.model_validate_json(text)
    assert local.lock.read_text() == text
    for damaged in (text[:-100], text.replace("revision", "revsion"), "[]", ""):
        local.lock.write_text(damaged)
        with pytest.raises(IntegrityError, match=r"lock\.json: .*rm .*sdwn prefetch"):
            generate(local.root, [0])
    local.lock.write_text(text.replace(str(plan.config.model.name), "lab/other"))
    with pytest.raises(IntegrityError, match="of the model lab/other"):
        lock.ensure_lock(local, plan)
    local.lock.write_text(text.replace('"format_version": 2', '"format_version": 3'))
    with pytest.raises(IntegrityError, match="expected sdwn-lock 2, found sdwn-lock 3"):
        lock.ensure_lock(local, plan)


def test_images_of_other_weights_make_no_release(local: RunPaths, tmp_path: Path) -> None:
    generate(local.root, [0])
    plan, right = read_plan(local), local.lock.read_text()
    revision = json.loads(right)["revision"]
    other = RunPaths(shutil.copytree(local.root, tmp_path / "other"))
    other.lock.write_text(right.replace(revision, "0" * 16))
    release = ReleasePaths(tmp_path / "release")
    with pytest.raises(IntegrityError, match=f"{other.shard(0)}: made with the weights {revision}"):
        merge([other], release)
    other.lock.unlink()
    assert len(merge([other], release)) == 4
    unet = Path(plan.config.model.name) / "unet/diffusion_pytorch_model.safetensors"
    unet.write_bytes(unet.read_bytes()[:-4] + b"else")
    with pytest.raises(SdwnError, match=f"images of this run were made with .* at {revision}"):
        lock.ensure_lock(other, plan)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A user's own weights of a classifier."""
    save_file(timm.create_model(CLASSIFIER).state_dict(), tmp_path / "own.safetensors")
    return tmp_path / "own.safetensors"


def test_a_run_is_locked_to_its_classifier(
    local: RunPaths, model: Path, checkpoint: Path, sdwn: Sdwn, planned: PlanRun
) -> None:
    without = local.lock.read_text()
    planned(
        **TINY,
        model={"name": str(model)},
        evaluation={"model": CLASSIFIER, "checkpoint": str(checkpoint)},
    )
    config = read_plan(local).config
    lock.require_classifier(local, config)  # of a lock without one nothing is asked
    prefetched = sdwn.json("prefetch", local.root)
    assert prefetched["classifier"] == str(checkpoint)
    locked = json.loads(local.lock.read_text())
    assert locked["classifier"]["model"] == CLASSIFIER
    assert locked["classifier"]["weights"]["file"] == str(checkpoint)
    assert {**locked, "classifier": None} == json.loads(without)
    save_file(timm.create_model(CLASSIFIER).state_dict(), checkpoint)
    with pytest.raises(
        IntegrityError, match=f"{checkpoint}: changed .* sdwn prefetch {local.root}"
    ):
        lock.require_classifier(local, config)
    refused = sdwn("submit", local.root, "--wait", "--then", "merge,evaluate", code=1).stderr
    assert "own.safetensors: changed or missing since" in " ".join(refused.split())
    assert read_journal(local) == []
    sdwn("prefetch", local.root)
    lock.require_classifier(local, config)
    assert json.loads(local.lock.read_text())["files"] == locked["files"]


def test_run_refuses_a_classifier_before_any_image_is_made(
    sdwn: Sdwn, checkpoint: Path, tmp_path: Path
) -> None:
    config = noise_config().model_dump(mode="json")
    for evaluation, told in (
        ({"model": "test_vti"}, "did you mean test_vit"),
        ({"model": "resnet10t", "checkpoint": str(checkpoint)}, "a checkpoint of resnet10t"),
    ):
        (sdwn.folder / "c.yaml").write_text(json.dumps({**config, "evaluation": evaluation}))
        code = 2 if "checkpoint" not in evaluation else 1
        refused = " ".join(sdwn("run", "c.yaml", "run", code=code).stderr.split())
        assert told in refused
        assert not RunPaths(sdwn.folder / "run").submissions.exists()
