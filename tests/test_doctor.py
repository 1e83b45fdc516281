from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from sdwn.config import validated
from sdwn.errors import UsageError
from sdwn.generation.task import generate
from sdwn.jobs import scheduler
from sdwn.jobs.journal import read_journal
from sdwn.jobs.profile import ClusterProfile, LaterStage, load_profile
from sdwn.jobs.scheduler import Partition, max_array_size, read_partitions, user
from sdwn.models.builtin import builtin_folder
from sdwn.models.families import require_usable
from sdwn.models.lock import ensure_lock
from sdwn.paths import RunPaths
from sdwn.planning.plan import Plan, write_plan
from sdwn.preflight import doctor
from sdwn.preflight.doctor import (
    COMMANDS,
    Finding,
    check_node,
    check_run,
    problems,
)

from conftest import PlanRun, Sdwn, Testbed


def profile(**fields: Any) -> ClusterProfile:
    return validated(ClusterProfile, fields, source="test")


def find(run: tuple[RunPaths, Plan], **fields: Any) -> list[Finding]:
    """Check a run under a profile with these fields; its classifier takes its own time."""
    return check_run(*run, profile(**fields), ())


def verdicts(found: list[Finding]) -> dict[str, str]:
    return {finding.subject: finding.verdict for finding in found}


def texts(found: list[Finding]) -> dict[str, str]:
    return {finding.subject: finding.text for finding in found}


@pytest.mark.process
def test_without_slurm_nothing_is_known_and_that_is_said(
    planned: PlanRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert read_partitions() == {}
    assert max_array_size() == 1001
    found = find(planned())
    assert [finding.subject for finding in problems(found)] == ["slurm"]
    assert "found no sbatch, srun, squeue, scancel on this machine" in texts(found)["slurm"]
    assert not problems(find(planned(), executor="local"))


# Partitions as sites have them.
SITE = {
    "main": Partition("main", 24 * 60, default=True),
    "high": Partition("high", None, default=False),
    "short": Partition("short", 120, default=False),
}


@pytest.mark.process
@pytest.mark.parametrize(
    ("refusal", "fields", "subject", "verdict", "told"),
    [
        ("", {"time": "13:00:00"}, "time", "ok", "24 h is the MaxTime of main"),
        ("", {"time": "25:00:00"}, "time", "problem", "main; it would wait for ever: lower time"),
        ("", {"time": "25:00:00", "partition": "main,high"}, "time", "warning", "MaxTime of main;"),
        # A QOS may go beyond the partition's.
        ("", {"time": "25:00:00", "qos": "long"}, "time", "warning", "MaxTime of main;"),
        ("", {"time": "25:00:00", "partition": "high"}, "time", "ok", "no limit is known"),
        ("", {}, "sbatch", "ok", "sbatch takes a task"),
        (
            "Requested node configuration is not available",
            {"gres": "gpu:a100:3"},
            "sbatch",
            "problem",
            "not available; the profile asks for gres gpu:a100:3; see the site's nodes with: sinfo",
        ),
        (
            "Invalid account or account/partition combination specified",
            {"account": "lab"},
            "sbatch",
            "problem",
            "your accounts with: sacctmgr show associations",
        ),
        # A full queue says nothing of the profile.
        ("violates accounting/QOS policy (job submit limit, ...)", {}, "sbatch", "ok", ""),
    ],
    ids=str,
)
def test_a_profile_is_compared_with_a_site_and_shown_to_sbatch(
    refusal: str,
    fields: dict[str, Any],
    subject: str,
    verdict: str,
    told: str,
    planned: PlanRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = f"allocation failure: {refusal}" if refusal else ""
    for name in COMMANDS:
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{said}' >&2\ntest -z '{said}'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "read_partitions", lambda: SITE)
    found = find(planned(), **fields)
    assert verdicts(found)[subject] == verdict
    assert told in texts(found)[subject]


@pytest.mark.process
def test_a_time_limit_under_which_nothing_would_ever_be_finished_is_a_problem(
    planned: PlanRun,
) -> None:
    sd1 = {"name": "CompVis/stable-diffusion-v1-4"}
    run = planned(model=sd1, generation={"precision": "fp16"})
    short = find(run, gres="gpu:a100:1", time=2)
    assert verdicts(short)["progress"] == "problem"
    assert "before a first batch is finished; ask for more --time" in texts(short)["progress"]
    assert "progress" not in verdicts(find(run, gres="gpu:a100:1", time=60))


@pytest.mark.process
def test_a_tool_that_hangs_is_given_up(tmp_path: Path) -> None:
    assert scheduler.output_lines(["sleep", "60"], 0.05) is None
    assert scheduler.output_lines([str(tmp_path / "nothing")]) is None
    assert scheduler.output_lines(["false"]) is None


def test_a_local_run_is_held_against_this_machine(
    planned: PlanRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    paths, plan = planned(model={"name": "CompVis/no-such-model"}, generation={"precision": "fp16"})
    found = find((paths, plan), executor="local")
    assert verdicts(found)["fit"] == "problem"
    assert verdicts(found)["weights"] == "warning"
    assert "sdwn prefetch" in texts(found)["weights"]
    assert "node" not in verdicts(found)
    offline = profile(executor="local", environment={"HF_HUB_OFFLINE": "1"})
    assert verdicts(check_run(paths, plan, offline, ()))["weights"] == "problem"
    elsewhere = {**offline.environment, "HF_HOME": "/shared/hf"}
    found = find((paths, plan), executor="local", environment=elsewhere)
    assert verdicts(found)["weights"] == "unverified", "they may be there"
    assert texts(found)["environment"].startswith("tasks have another HF_HOME than this shell")
    nowhere = planned("nowhere", model={"name": "/nowhere/model"})
    assert verdicts(find(nowhere, executor="local"))["weights"] == "problem"


@pytest.mark.parametrize(
    ("generation", "told"),
    [
        ({"scheduler": "PNDMScheduler"}, ""),
        ({"scheduler": None}, ""),
        ({"scheduler": "EulerDiscreteScheduler"}, ""),
        ({"scheduler": "EulerDiscreetScheduler"}, "does not fit StableDiffusionPipeline; valid: "),
        ({"scheduler": "FlowMatchEulerDiscreteScheduler"}, "does not fit StableDiffusionPipeline"),
        ({"scheduler": "DPMSolverSDEScheduler"}, "does not fit StableDiffusionPipeline; valid: "),
    ],
)
def test_what_would_end_every_task_at_its_start_is_found_before(
    planned: PlanRun, generation: dict[str, Any], told: str
) -> None:
    builtin_folder("tiny")
    paths, plan = planned(model={"name": "builtin:tiny"}, generation=generation)
    found = find((paths, plan), executor="local")
    assert verdicts(found)["settings"] == ("problem" if told else "ok")
    assert told in texts(found)["settings"]


def test_only_a_begun_run_goes_on_with_a_setting_that_has_no_effect(
    planned: PlanRun, caplog: pytest.LogCaptureFixture
) -> None:
    """An earlier version took it, and the images left are to be as those that are there."""
    builtin_folder("tiny")
    generation = {"num_inference_steps": 1, "guidance_scale": 0.0, "negative_prompt": "blue"}
    paths, plan = planned(model={"name": "builtin:tiny"}, generation=generation)
    local = profile(executor="local")
    assert verdicts(check_run(paths, plan, local, ()))["settings"] == "problem"
    with pytest.raises(UsageError, match="no effect"):
        generate(paths.root, [0])
    ensure_lock(paths, plan)
    generate(paths.root, [0])
    assert "negative_prompt has no effect" in caplog.text
    found = check_run(paths, plan, local, ())
    assert verdicts(found)["settings"] == "warning"
    assert "negative_prompt has no effect" in texts(found)["settings"]
    require_usable(plan.config, begun=paths.begun)
    with pytest.raises(UsageError, match="no effect"):
        require_usable(plan.config)


@pytest.mark.parametrize("index", ["{", "[]"])
def test_an_index_that_cannot_be_read_is_told(planned: PlanRun, tmp_path: Path, index: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model_index.json").write_text(index)
    run = planned(model={"name": str(tmp_path / "model")})
    assert verdicts(find(run, executor="local"))["weights"] == "problem"


def sparse_flux(folder: Path) -> Path:
    """A pipeline of FLUX.1's sizes: 60 GB in float32 files that take no room on the disk."""
    parts = {
        "transformer": (12e9, "diffusion_pytorch_model", ["diffusers", "FluxTransformer2DModel"]),
        "text_encoder_2": (2.9e9, "model", ["transformers", "T5EncoderModel"]),
        "vae": (0.1e9, "diffusion_pytorch_model", ["diffusers", "AutoencoderKL"]),
    }
    index: dict[str, Any] = {"_class_name": "FluxPipeline"}
    for part, (count, name, kind) in parts.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text("{}")
        size = 4 * int(count)
        tensor = {"dtype": "F32", "shape": [int(count)], "data_offsets": [0, size]}
        head = json.dumps({"weight": tensor}).encode()
        with (folder / part / f"{name}.safetensors").open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            file.truncate(8 + len(head) + size)
        index[part] = kind
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_which_cards_a_model_fits_is_read_from_the_heads_of_its_files(
    planned: PlanRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Which of a model in a folder is read whole, once: a minute for so much of it.
    monkeypatch.setattr("sdwn.models.weights.own_sha256", lambda _: "00")
    model, own = sparse_flux(tmp_path / "flux"), {"precision": "bf16", "safety_checker": False}
    generation = {**own, "scheduler": None, "guidance_scale": 3.5, "height": 16, "width": 16}
    run = planned(model={"name": str(model)}, generation=generation)
    text = texts(find(run, executor="local"))["memory"]
    assert "transformer 24.0 GB, text_encoder_2 5.8 GB, vae 200.0 MB in bf16" in text
    assert "16 GB offload, layer by layer; 24 GB offload, layer by layer; 40 GB gpu" in text
    for kind, verdict in (("a100_40gb", "ok"), ("v100_32gb", "ok"), ("rtx4090_24gb", "problem")):
        found = find(run, gres=f"gpu:{kind}:1", placement="gpu")
        assert verdicts(found)["memory"] == verdict


def found_of_classifier(planned: PlanRun, then: Sequence[LaterStage] | None, **changes: Any) -> str:
    run = planned(evaluation=changes)
    found = check_run(*run, profile(executor="local"), then)
    return f"{verdicts(found).get('classifier')}: {texts(found).get('classifier')}"


def test_a_classifier_that_is_not_here_stops_what_would_evaluate(
    planned: PlanRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for model in ("paper", "test_vit", "tf_efficientnet_b0"):
        told = found_of_classifier(planned, None, model=model)
        assert told.startswith(f"warning: the weights of {model}")
        assert f"sdwn prefetch {tmp_path / 'run'}" in told
        assert found_of_classifier(planned, ("merge", "evaluate"), model=model).startswith(
            "problem"
        )
        assert found_of_classifier(planned, ("merge",), model=model) == "None: None"
    paper = tmp_path / "torch/hub/checkpoints/vit_h_14_swag-80465313.pth"
    paper.parent.mkdir(parents=True)
    paper.touch()
    assert found_of_classifier(planned, ("evaluate",), model="paper") == f"ok: paper in {paper}"


def test_a_classifier_that_cannot_be_loaded_is_a_problem(planned: PlanRun, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), weights)
    for changes, told in (
        ({"model": "test_vti"}, "problem: model 'test_vti': .*did you mean test_vit"),
        (
            {"model": "resnet10t", "checkpoint": str(weights)},
            "problem: .*a checkpoint of resnet10t",
        ),
        ({"model": "efficientnet-lite0", "groups": "moon"}, "problem: no groups 'moon'"),
        ({"model": "efficientnet-lite0", "embedding": "/no/words"}, "problem: /no/words: no such"),
        ({"model": "test_vit", "checkpoint": "/no/file"}, "problem: /no/file: no such checkpoint"),
        ({"model": "test_vit", "checkpoint": str(weights)}, f"ok: test_vit in {weights}"),
        ({"model": "efficientnet-lite0"}, "ok: efficientnet-lite0 in "),
    ):
        for then in (None, ("evaluate",)):
            assert re.match(told, found_of_classifier(planned, then, **changes))


def test_a_finished_run_is_not_queued_for_a_classifier_that_cannot_be_loaded(
    sdwn: Sdwn, generated: PlanRun
) -> None:
    paths, plan = generated(evaluation={"model": "test_vti"})
    write_plan(plan, paths)
    then = ("--wait", "--then", "merge,evaluate")
    refused = sdwn("submit", paths.root, *then, code=1).stderr
    assert "classifier: model 'test_vti'" in " ".join(refused.split())
    assert not Path(paths.release).exists()


def test_the_doctor_of_a_finished_run_names_what_follows(sdwn: Sdwn, generated: PlanRun) -> None:
    paths, plan = generated(evaluation={"model": "efficientnet-lite0"})
    write_plan(plan, paths)
    assert f"next: sdwn merge {paths.root} --release" in sdwn("doctor", paths.root).stdout


@pytest.mark.process
def test_the_doctor_starts_without_torch_and_nltk() -> None:
    code = "import sys, sdwn.preflight.doctor; print(*({'nltk', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.process
def test_a_cache_that_cannot_be_written_is_told_and_stops_no_node_check(
    sdwn: Sdwn, planned: PlanRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    paths, plan = planned()
    (tmp_path / "file").touch()
    monkeypatch.setenv("SDWN_CACHE", str(tmp_path / "file/cache"))
    for executor in ("local", "slurm"):
        found = find((paths, plan), executor=executor)
        assert verdicts(found)["cache"] == "warning"
        assert "cannot be written to (Not a directory); set SDWN_CACHE" in texts(found)["cache"]
    probed = sdwn.json("doctor", paths.root, "--profile", "local", "--probe")
    (cache,) = (row for row in probed["findings"] if row["subject"] == "cache")
    assert "cannot be written to" in cache["text"]
    refused = sdwn("tune", "demo", code=1)
    assert refused.stderr.count("cannot be written to") == 1


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")


def test_a_file_in_the_place_of_a_folder_is_told(sdwn: Sdwn, planned: PlanRun) -> None:
    paths, _ = planned()
    paths.shards.write_text("")
    for command in ("doctor", "status", "submit"):
        told = sdwn(command, paths.root, code=1).stderr
        assert told.strip() == f"error: {paths.shards}: expected a folder, found a file"


@pytest.mark.process
@needs_root
def test_too_little_room_is_found(planned: PlanRun, tmp_path: Path) -> None:
    """195 images of 512x512 want some 60 MB."""
    local = profile(executor="local")
    large: dict[str, Any] = {"generation": {"height": 512, "width": 512}}
    with mounted(tmp_path / "small", "size=1m"):
        found = check_run(*planned("small/run", **large), local, ())
    assert [finding.subject for finding in problems(found)] == ["space"]
    assert "free some, or plan into a folder on a larger disk" in texts(found)["space"]


def test_a_node_is_compared_with_this_machine_and_with_what_the_run_needs(
    planned: PlanRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("SDWN_CACHE", str(tmp_path / "cache"))
    evaluated = {"evaluation": {"model": "efficientnet-lite0"}}
    paths, _ = planned(model={"name": "some/model"}, generation={"precision": "fp16"}, **evaluated)
    small, _ = planned("small", model={"name": "builtin:tiny"}, **evaluated)
    for run in (paths, small):
        run.node_check.root.mkdir()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/node-check-7").touch()

    def of(run: RunPaths = small, **changes: Any) -> list[Finding]:
        return check_node(run, "n1", {"token": "node-check-7", "gpu": True, **changes})

    right = verdicts(of(gpu=False))
    assert list(right) == [
        "node", "device", "run folder", "weights", "classifier", "locks", "cache"
    ]  # fmt: skip
    assert set(right.values()) == {"ok"}
    assert verdicts(of())["device"] == "warning"
    assert texts(of())["device"].startswith("n1: a GPU is asked for and torch sees none")
    assert verdicts(of(paths, gpu=False))["device"] == "problem", "fp16 needs one"
    assert verdicts(of(token="node-check-8"))["cache"] == "warning"
    assert verdicts(of(paths))["weights"] == "warning"
    with monkeypatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        assert verdicts(of(paths))["weights"] == "problem"
    with (small.node_check.root / "locks.h5").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as a file system whose locks fail answers
        (locks,) = (finding for finding in of() if finding.subject == "locks")
    assert locks.verdict == "problem"
    assert 'HDF5_USE_FILE_LOCKING: "FALSE"' in locks.text


@pytest.mark.slurm
def test_a_right_profile_has_no_problem(planned: PlanRun, testbed: Testbed) -> None:
    paths, plan = planned(storage={"images_per_shard": 5})
    right = load_profile("testbed")
    found = check_run(paths, plan, right)
    assert not problems(found)
    assert verdicts(found)["sbatch"] == "ok"
    assert "compute nodes probably do not see it" in texts(found)["run folder"]
    assert verdicts(found)["node"] == "unverified"
    told = read_partitions()
    assert [name for name, one in told.items() if one.default] == ["main"]
    assert told["main"].time_min == 24 * 60
    assert user() == "root"


@pytest.mark.slurm
def test_what_a_site_does_not_have_is_a_problem_with_advice(
    planned: PlanRun, testbed: Testbed
) -> None:
    run = planned()
    for fields, subject, verdict, advice in (
        ({"partition": "moon"}, "sbatch", "problem", "moon"),
        ({"time": "2-00:00:00"}, "time", "problem", "24 h is the MaxTime of main"),
        ({"gres": "gpu:A100:1"}, "sbatch", "problem", "gres gpu:A100:1"),
        ({"gres": "gpu:a100:3"}, "sbatch", "problem", "gres gpu:a100:3"),
        ({"gpus_per_node": "3"}, "sbatch", "problem", "gpus_per_node 3"),
        ({"gpus_per_node": "v100:2"}, "sbatch", "ok", "takes a task"),
        ({"mem": "9G"}, "sbatch", "problem", "mem 9G"),
        ({"mem_per_gpu": "5G", "gres": "gpu:2"}, "sbatch", "problem", "mem_per_gpu 5G"),
        ({"cpus_per_task": "3"}, "sbatch", "problem", "cpus_per_task 3"),
    ):
        found = check_run(*run, load_profile("testbed", fields))
        assert verdicts(found)[subject] == verdict, found
        assert advice in texts(found)[subject]
    testbed.run("scontrol", "update", "nodename=n1,n2", "state=drain", "reason=test")
    try:
        drained = check_run(*run, load_profile("testbed", {"gres": "gpu:a100:1"}))
    finally:
        testbed.run("scontrol", "update", "nodename=n1,n2", "state=resume")
    assert verdicts(drained)["sbatch"] == "warning"


AMOUNTS = st.builds(
    "".join,
    st.tuples(
        *map(
            st.sampled_from,
            (
                ["", "-", "0"],
                ["1", "16", "1.5", ""],
                ["", "k", "M", "Gb", "TB", "P", "GiB", "B", "MG", " G"],
            ),
        )
    ),
)
RESOURCES = st.lists(st.sampled_from(["a100", "1", "0", "-1", "", "1(S:0)"]), max_size=3).map(
    lambda words: ":".join(["gpu", *words])
)


@pytest.mark.slurm
@given(memory=AMOUNTS, gres=RESOURCES)
@settings(max_examples=60, deadline=None)
def test_a_profile_takes_the_amounts_that_sbatch_takes(
    testbed: Testbed, memory: str, gres: str
) -> None:
    for field, text in (("mem", memory), ("gres", gres)):
        command = ["sbatch", "--test-only", f"--{field}={text}", "--wrap", "true"]
        told = subprocess.run(command, capture_output=True, text=True, check=False).stderr
        try:
            profile(**{field: text})
        except UsageError:
            # A profile refuses more: GPUs of a kind "1", or none of them.
            assert field == "gres" or "Invalid --mem" in told
        else:
            assert not re.search("Invalid (--mem|generic|Trackable)", told), f"{text}: {told}"


@pytest.mark.slurm
def test_a_compute_node_is_asked(sdwn: Sdwn, planned: PlanRun, testbed: Testbed) -> None:
    paths, _ = planned()
    found = sdwn.json("doctor", paths.root, "--profile", "testbed", "--probe")
    assert found["ok"]
    rows = {row["subject"]: row for row in found["findings"]}
    for subject in ("node", "run folder", "weights", "locks", "cache"):
        assert rows[subject]["verdict"] == "ok", rows[subject]
        assert re.search(r"\bn[1-4]\b", rows[subject]["text"])
    assert not list(Path(os.environ["SDWN_CACHE"]).glob("node-check-*")), "it leaves nothing there"
    assert not read_journal(paths), "it is none of the run's own jobs"
    refused = sdwn(
        "doctor", paths.root, "--profile", "testbed", "--gres", "gpu:3", "--probe", code=1
    )
    assert "problem     sbatch" in refused.stdout
    assert "not checked, because no job could start" in refused.stdout


@needs_root
@pytest.mark.slurm
def test_a_folder_that_nodes_do_not_see_is_found(
    planned: PlanRun, testbed: Testbed, tmp_path: Path
) -> None:
    """A mount in a name space of the login's own hides the run from the nodes."""
    planned("kept")
    (tmp_path / "hidden").mkdir()
    script = (
        "mount -t tmpfs none hidden && cp -r kept hidden/run && "
        f"{sys.executable} -m sdwn doctor hidden/run --profile testbed --probe --json"
    )
    command = ["unshare", "--mount", "sh", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    (row,) = (r for r in json.loads(done.stdout)["findings"] if r["verdict"] == "problem")
    assert row["subject"] == "node"
    assert "compute nodes most likely do not see it" in row["text"]
