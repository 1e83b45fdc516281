from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sdwn.config import RunConfig, load_config
from sdwn.devices.tuning import GpuProfile, Probe, Tuning, Workload, write_profile
from sdwn.jobs.profile import ClusterProfile, group_into_tasks
from sdwn.paths import RunPaths
from sdwn.planning.plan import Plan, make_plan
from sdwn.preflight.estimate import (
    DeviceSpeed,
    Estimate,
    cost,
    estimate,
    estimate_rows,
    known_speeds,
    stored_bytes,
)
from sdwn.storage.images import encode
from sdwn.wordnet.corpus import Synset

from conftest import REPOSITORY, PlanRun, keep_record, noise_config

PAPER = REPOSITORY / "configs/paper.yaml"
IMAGES, SHARDS = 262_040, 132


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDWN_CACHE", str(tmp_path / "cache"))


def planned_of(config: RunConfig, synsets: int) -> Plan:
    rows = (Synset(f"n{n:08d}", f"thing.n.{n}", ("thing",), "a gloss") for n in range(synsets))
    return make_plan(config, tuple(rows))


@pytest.fixture(scope="module")
def paper_plan() -> Plan:
    plan = planned_of(load_config(PAPER), 26_204)
    assert (plan.images, len(plan.shards)) == (IMAGES, SHARDS)
    return plan


def of_paper(plan: Plan, run: Path, **fields: Any) -> Estimate:
    profile = ClusterProfile(**fields) if fields else None
    return estimate(RunPaths(run), plan, range(SHARDS), profile)


def altered(plan: Plan, **generation: Any) -> Plan:
    settings = plan.config.generation.model_copy(update=generation)
    config = plan.config.model_copy(update={"generation": settings})
    return dataclasses.replace(plan, config=config)


def write_answers(run: Path, device: str, images_per_second: float = 1.3) -> None:
    answers = RunPaths(run).pilot.answers
    answers.parent.mkdir(parents=True, exist_ok=True)
    found = {"device": device, "images_per_second": images_per_second}
    answers.write_text(json.dumps({**found, "loading_seconds": 25.0, "bytes_per_image": 300_000}))


def keep_tuned(
    device: str, images_per_second: float, measured: str = "2026-01-01", **changes: Any
) -> None:
    work = Workload(
        device, 40, "CompVis/stable-diffusion-v1-4", "", "fp16", 512, 512, True, False, False, "2"
    )
    found = Tuning(
        20, images_per_second, 20, 30, 3.6, 0.8, (Probe(10, 0.9 * images_per_second, 12),)
    )
    own = {name: changes.pop(name) for name in ("num_inference_steps",) if name in changes}
    work = dataclasses.replace(work, **changes)
    fields = {"num_inference_steps": 50, "scheduler": "PNDMScheduler", **own}
    profile = GpuProfile(work, False, found, measured, **fields)
    write_profile(profile, profile.path)


def test_the_papers_run_on_an_a100(paper_plan: Plan, tmp_path: Path) -> None:
    """By hand: 53.03 s for a batch of 64, 60 s of loading for each of 132 tasks."""
    found = of_paper(paper_plan, tmp_path, gres="gpu:a100:1", array_parallelism=64, time="60")
    (one,) = found.costs
    each = 53.03 / 64
    assert (found.images, found.shards, found.tasks, found.unknown) == (IMAGES, SHARDS, 132, None)
    assert one.device_hours == pytest.approx((IMAGES * each + 132 * 60) / 3600)
    assert one.device_hours == pytest.approx(60.3 + 2.2, abs=0.05)
    assert one.hours_per_task == pytest.approx((2000 * each + 60) / 3600)
    assert one.hours == pytest.approx(3 * one.hours_per_task), "64, 64, and 4 more"
    assert one.speed.speed_source == "published speed of an A100"
    assert (one.speed.loading_seconds, one.speed.loading_source) == (60, "assumed")
    assert one.warning is None
    assert found.bytes == pytest.approx(85.5e9, rel=0.01)


def test_compiled_images_are_faster(paper_plan: Plan, tmp_path: Path) -> None:
    found = of_paper(altered(paper_plan, compile=True), tmp_path, gres="gpu:a100:1")
    assert found.costs[0].speed.images_per_second == pytest.approx(1.45, abs=0.005)
    assert found.costs[0].device_hours == pytest.approx(50.2 + 2.2, abs=0.05)
    assert found.costs[0].speed.speed_source == "published speed of an A100, compiled"


def test_xl_has_its_own_figures_at_its_own_size(paper_plan: Plan, tmp_path: Path) -> None:
    model = paper_plan.config.model.model_copy(
        update={"name": "stabilityai/stable-diffusion-xl-base-1.0"}
    )
    config = paper_plan.config.model_copy(update={"model": model})
    plan = altered(dataclasses.replace(paper_plan, config=config), height=1024, width=1024)
    (one,) = of_paper(plan, tmp_path, gres="gpu:a100:1").costs
    assert one.speed.images_per_second == pytest.approx(1 / 5.932)
    assert one.speed.speed_source == "published speed of an A100, an image at a time"
    half = altered(plan, num_inference_steps=25, compile=True)
    (one,) = of_paper(half, tmp_path, gres="gpu:a100:1").costs
    assert one.speed.images_per_second == pytest.approx(2 / 5.136)
    assert one.speed.speed_source.endswith("compiled, an image at a time, scaled from 50 steps")
    for changed in (altered(plan, width=512), altered(plan, guidance_scale=0.0)):
        found = of_paper(changed, tmp_path, gres="gpu:a100:1")
        assert (found.costs, found.unknown is None) == ((), False)
    assert of_paper(plan, tmp_path, gres="gpu:t4:1").costs == (), "nothing is published of it"


def test_a_whole_node_is_held_until_its_slowest_gpu_ends(paper_plan: Plan, tmp_path: Path) -> None:
    found = of_paper(paper_plan, tmp_path, gpus_per_node="a100:4", shards_per_task=2)
    assert (found.tasks, found.devices_per_task) == (17, 4)
    task, loading = 4000 * 53.03 / 64 / 3600, 60 / 3600
    assert found.costs[0].hours_per_task == pytest.approx(task + loading)
    # The last task has four shards, one a GPU.
    assert found.costs[0].device_hours == pytest.approx(4 * (16.5 * task + 17 * loading))


def test_some_shards_take_their_share(paper_plan: Plan, tmp_path: Path) -> None:
    profile = ClusterProfile(gres="gpu:a100:1")
    whole = estimate(RunPaths(tmp_path), paper_plan, range(SHARDS), profile)
    parts = [
        estimate(RunPaths(tmp_path), paper_plan, range(first, SHARDS, 3), profile)
        for first in range(3)
    ]
    assert sum(part.images for part in parts) == whole.images
    assert sum(part.tasks for part in parts) == whole.tasks
    total = sum(part.costs[0].device_hours for part in parts)
    assert total == pytest.approx(whole.costs[0].device_hours)
    nothing = estimate(RunPaths(tmp_path), paper_plan, [], profile)
    assert (nothing.tasks, nothing.bytes, nothing.costs[0].hours) == (0, 0, 0)


@pytest.mark.parametrize(
    ("fields", "cards"),
    [
        ({"gres": "gpu:a100:1"}, ["A100"]),
        ({"gres": "nvme:1,gpu:t4:2"}, ["T4"]),
        ({"gpus_per_node": "v100:4"}, ["V100"]),
        ({"gpus_per_node": "rtx3090"}, ["RTX 3090"]),
        ({"gres": "gpu:4090:2"}, ["RTX 4090"]),
        ({"gres": "gpu:1", "constraint": "v100|a100"}, ["A100", "V100", "T4"]),
        ({"gres": "gpu:t4:1", "constraint": "a100"}, ["T4"]),
        ({"gres": "gpu:1", "partition": "gpu"}, ["A100", "V100", "T4"]),
        ({"gres": "gpu:h100:1"}, ["H100"]),
        ({"gres": "gpu:h200:1"}, ["H200"]),
        ({"gres": "gpu:b200:1"}, []),
        ({"gres": "gpu:a100_3g.20gb:1"}, []),
        ({"partition": "a100"}, []),
        ({"executor": "local"}, []),
    ],
    ids=str,
)
def test_the_card_is_the_one_that_the_profile_asks_for(
    paper_plan: Plan, tmp_path: Path, fields: dict[str, Any], cards: list[str]
) -> None:
    found = of_paper(paper_plan, tmp_path, **fields)
    assert [one.speed.device for one in found.costs] == cards
    assert (found.unknown is None) == bool(cards)


def test_without_a_profile_several_cards_are_shown(paper_plan: Plan, tmp_path: Path) -> None:
    found = of_paper(paper_plan, tmp_path)
    hours = {one.speed.device: one.device_hours for one in found.costs}
    assert list(hours) == ["A100", "V100", "T4"]
    assert hours["A100"] < hours["V100"] < hours["T4"]
    assert found.tasks == SHARDS
    assert not any(one.warning for one in found.costs), "no time limit is known"


def test_the_runs_own_finished_tasks_go_before_its_pilot(paper_plan: Plan, tmp_path: Path) -> None:
    write_answers(tmp_path, "NVIDIA A100-SXM4-40GB", 1.3)
    keep_record(tmp_path, "1", "NVIDIA A100-SXM4-40GB", ended=False)
    keep_record(tmp_path, "2", "NVIDIA A100-SXM4-40GB", done=200)
    keep_record(tmp_path, "3", "Tesla V100-SXM2-16GB")
    RunPaths(tmp_path).task("4", 0).write_text("{")
    (one,) = of_paper(paper_plan, tmp_path, gres="gpu:a100:1").costs
    assert one.speed.speed_source == "the run's pilot", "no task on such a card has finished"
    keep_record(tmp_path, "5", "NVIDIA A100-SXM4-40GB", loading_seconds=10.0)
    keep_record(tmp_path, "6", "NVIDIA A100-SXM4-40GB", images=800)
    found = of_paper(paper_plan, tmp_path, gres="gpu:a100:1")
    (one,) = found.costs
    assert one.speed.images_per_second == pytest.approx(1200 / 500)
    assert (one.speed.loading_seconds, one.speed.batch_size) == (20, 10)
    told = " ".join(estimate_rows(found).values())
    assert "(the run's own finished tasks), loading 20 s (as in these tasks)" in told
    both = of_paper(paper_plan, tmp_path).costs
    assert [cost.speed.device[:4] for cost in both] == ["Tesl", "NVID"], "any card, each its speed"


@pytest.mark.parametrize("change", [{"busy": "0.8"}, {"images": 0}])
def test_a_damaged_record_of_a_task_counts_as_none(
    change: dict[str, Any], paper_plan: Plan, tmp_path: Path
) -> None:
    write_answers(tmp_path, "NVIDIA A100-SXM4-40GB", 1.3)
    keep_record(tmp_path, "1", **{"device": "NVIDIA A100-SXM4-40GB", **change})
    (one,) = of_paper(paper_plan, tmp_path).costs
    assert one.speed.speed_source == "the run's pilot"


def test_the_pilot_goes_before_gpu_profiles_and_these_before_what_is_published(
    paper_plan: Plan, tmp_path: Path
) -> None:
    def asked() -> list[tuple[str, float]]:
        found = of_paper(paper_plan, tmp_path, gres="gpu:a100:1").costs
        return [(one.speed.speed_source, one.speed.images_per_second) for one in found]

    assert asked() == [("published speed of an A100", pytest.approx(64 / 53.03))]
    keep_tuned("NVIDIA A100-SXM4-40GB", 1.25)
    assert asked() == [("sdwn tune, 2026-01-01", 1.25)]
    write_answers(tmp_path, "NVIDIA A100-SXM4-40GB", 1.3)
    assert asked() == [("the run's pilot", 1.3)]
    (one,) = of_paper(paper_plan, tmp_path, gres="gpu:a100:1").costs
    assert one.device_hours == pytest.approx((IMAGES / 1.3 + 132 * 25) / 3600), "its loading too"


def test_a_pilot_on_another_kind_of_card_says_nothing(paper_plan: Plan, tmp_path: Path) -> None:
    for device in ("Tesla V100-SXM2-16GB", "cpu"):
        write_answers(tmp_path, device)
        (one,) = of_paper(paper_plan, tmp_path, gres="gpu:a100:1").costs
        assert one.speed.speed_source == "published speed of an A100"
    write_answers(tmp_path, "Some Card 9000")
    assert of_paper(paper_plan, tmp_path, gres="gpu:9000:1").costs[0].speed.images_per_second == 1.3
    RunPaths(tmp_path).pilot.answers.write_text("{}")
    assert len(of_paper(paper_plan, tmp_path).costs) == 3, "one that broke off counts as none"


def test_gpu_profiles_are_taken_where_they_are_of_the_same_work(
    paper_plan: Plan, tmp_path: Path
) -> None:
    keep_tuned("NVIDIA A100-SXM4-40GB", 1.2, torch="2.4", measured="2025-01-01")
    keep_tuned("NVIDIA A100-SXM4-40GB", 1.3, torch="2.9")
    keep_tuned("NVIDIA A40", 0.9)
    for other in ({"precision": "fp32"}, {"height": 256}, {"guidance": False}, {"compile": True}):
        keep_tuned("NVIDIA A30", 9.0, **other)
    keep_tuned("NVIDIA A30", 9.0, model="some/other")
    keep_tuned("cpu", 0.01)
    (tmp_path / "cache/gpus/broken.json").write_text("{")
    kept = json.loads(next((tmp_path / "cache/gpus").glob("*a40*")).read_text())
    damaged = [{**kept, "measured": 5}, {**kept, "num_inference_steps": -1}, {**kept, "later": 1}]
    damaged += [{**kept, "workload": {**kept["workload"], "memory_gb": "40"}}]
    damaged += [{**kept, "tuning": {**kept["tuning"], "images_per_second": n}} for n in (None, 0)]
    for number, content in enumerate(damaged):
        (tmp_path / f"cache/gpus/{number}.json").write_text(json.dumps(content))

    def told(plan: Plan, **fields: Any) -> dict[str, float]:
        found = of_paper(plan, tmp_path, **fields).costs
        return {one.speed.device: one.speed.images_per_second for one in found}

    both = {"NVIDIA A100-SXM4-40GB, 40 GB": 1.3, "NVIDIA A40, 40 GB": 0.9}
    assert told(paper_plan) == told(paper_plan, gres="gpu:1") == both, "the latest of each"
    assert told(paper_plan, gres="gpu:a40:1") == {"NVIDIA A40, 40 GB": 0.9}
    assert list(told(paper_plan, gres="gpu:a10:1")) == []
    assert list(told(paper_plan, gres="gpu:v100:1")) == ["V100"], "published: never tuned"
    assert told(paper_plan, gres="gpu:a40:1", batch_size=10) == {
        "NVIDIA A40, 40 GB": pytest.approx(0.81)
    }
    assert told(altered(paper_plan, num_inference_steps=25), gres="gpu:a40:1") == {}
    assert list(told(altered(paper_plan, scheduler="HeunDiscreteScheduler"), gres="gpu:a100")) == [
        "A100"
    ]


def test_published_speeds_are_scaled_by_work(paper_plan: Plan, tmp_path: Path) -> None:
    plan = altered(paper_plan, num_inference_steps=25, guidance_scale=1.0)
    (one,) = of_paper(plan, tmp_path, gres="gpu:a100:1").costs
    assert one.speed.images_per_second == pytest.approx(64 / 53.03 * 1.0323 / (26 / 102 + 0.0323))
    assert one.speed.speed_source.endswith("scaled by work from 512x512 and 50 steps")
    pinned = of_paper(paper_plan, tmp_path, gres="gpu:a100:1", batch_size=5).costs[0]
    assert pinned.speed.images_per_second == pytest.approx(4 / 3.89), "the batch of 4"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model": {"name": "stabilityai/sdxl-turbo"}}, "for stabilityai/sdxl-turbo in fp16"),
        ({"model": {"name": "builtin:tiny"}}, "for builtin:tiny in fp16"),
        ({"generation": {"precision": "fp32"}}, "for CompVis/stable-diffusion-v1-4 in fp32"),
    ],
)
def test_what_is_not_known_is_said(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    paper = load_config(PAPER).model_dump(mode="json")
    for section, fields in change.items():
        paper[section] = {**paper[section], **fields}
    plan = planned_of(RunConfig.model_validate(paper), 3)
    for profile in (None, ClusterProfile(gres="gpu:a100:1")):
        found = estimate(RunPaths(tmp_path), plan, [0], profile)
        assert found.costs == ()
        assert found.unknown is not None
        assert f"run sdwn pilot {tmp_path} --profile PROFILE" in found.unknown
        assert expected in found.unknown
    on_cpu = estimate(RunPaths(tmp_path), plan, [0], ClusterProfile(executor="local"))
    assert " on a CPU)" in str(on_cpu.unknown)


def test_the_architecture_decides_in_a_folder_of_any_name(paper_plan: Plan, tmp_path: Path) -> None:
    for width, known in ((768, True), (1024, False)):
        unet = {"cross_attention_dim": width, "block_out_channels": [320, 640, 1280, 1280]}
        (tmp_path / "unet").mkdir(exist_ok=True)
        (tmp_path / "unet/config.json").write_text(json.dumps(unet))
        model = paper_plan.config.model.model_copy(update={"name": str(tmp_path)})
        config = paper_plan.config.model_copy(update={"model": model})
        assert bool(known_speeds(config, None, RunPaths(tmp_path / "run"))) == known


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"time": "60"}, None),
        (
            {"time": "30"},
            "28 min 37 s and the time limit ends it after 28 min 30 s: a task will ",
        ),
        ({"time": "12"}, "a task will be requeued 2 times; ask for more --time, or plan smaller"),
        ({"time": "2"}, "after 30 s, before a first batch is finished; ask for more --time"),
        ({"time": "4", "batch_size": 200}, "before a first batch is finished"),
    ],
)
def test_a_short_time_limit_is_warned_of(
    paper_plan: Plan, tmp_path: Path, fields: dict[str, Any], expected: str | None
) -> None:
    """27.6 minutes of sampling and one of loading, told to stop 90 s before the limit."""
    (one,) = of_paper(paper_plan, tmp_path, gres="gpu:a100:1", **fields).costs
    if expected is None:
        assert one.warning is None
    else:
        assert one.warning is not None
        assert re.search(expected, one.warning), one.warning
    assert one.stuck == ("before" in (expected or ""))


@given(
    synsets=st.integers(1, 60),
    each=st.integers(1, 9),
    deal=st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(1, 4)),
    local=st.booleans(),
)
def test_gpu_hours_do_not_depend_on_how_shards_are_dealt(
    synsets: int, each: int, deal: tuple[int, int, int], local: bool
) -> None:
    shards_per_task, parallel, gpus_of_task = deal
    plan = planned_of(noise_config(storage={"images_per_shard": 5 * each}), synsets)
    profile = ClusterProfile(
        executor="local" if local else "slurm",
        shards_per_task=shards_per_task,
        array_parallelism=parallel,
        gpus_per_node=str(gpus_of_task),
    )
    parts = group_into_tasks(range(len(plan.shards)), profile)
    found = cost(plan, parts, profile, DeviceSpeed("card", 2.0, "made up", 30.0))
    loading = 30 * len(parts) * profile.processes
    sampling = 3600 * found.device_hours - loading
    work = plan.images / 2.0
    if profile.processes == 1:
        assert sampling == pytest.approx(work)
    # GPUs of a task that end early are held until the last one ends.
    assert work - 1e-6 <= sampling <= work * profile.processes + 1e-6
    assert found.hours_per_task <= found.hours * (1 + 1e-9)
    assert found.hours <= found.device_hours * (1 + 1e-9)
    assert found.hours * parallel * profile.processes >= found.device_hours * (1 - 1e-9)


@pytest.mark.usefixtures("paced")
def test_noise_has_a_set_pace(planned: PlanRun) -> None:
    paths, plan = planned(generation={"num_inference_steps": 20})
    (one,) = estimate(paths, plan, range(len(plan.shards)), None).costs
    assert one.device_hours == pytest.approx(plan.images * 0.2 / 3600)


def test_bytes_come_from_shards_then_the_pilot_then_photographs(generated: PlanRun) -> None:
    paths, plan = generated("done", generation={"height": 64, "width": 64})
    files = [paths.shard(shard.index) for shard in plan.shards]
    size, source = stored_bytes(paths, plan, plan.images)
    assert size == sum(path.stat().st_size for path in files)
    assert "finished shards" in source
    write_answers(paths.root, "cpu")
    assert stored_bytes(paths, plan, 10)[0] < 3_000_000
    for path in files:
        path.unlink()
    assert stored_bytes(paths, plan, 10) == (3_000_000, "as the run's pilot")
    paths.pilot.answers.unlink()
    assert stored_bytes(paths, plan, 10)[0] == 10 * 3 * 64 * 64


@pytest.mark.parametrize(
    "storage",
    [{"codec": "webp"}, {"codec": "png"}, {"codec": "raw"}]
    + [{"codec": "jpeg", "quality": quality} for quality in (75, 85, 95, 100)],
    ids=str,
)
def test_photographs_take_about_what_is_estimated(tmp_path: Path, storage: dict[str, Any]) -> None:
    import skimage.data

    paper = load_config(PAPER).model_dump(mode="json")
    paper["storage"] = {**storage, "images_per_shard": 10}
    plan = planned_of(RunConfig.model_validate(paper), 1)
    each, source = stored_bytes(RunPaths(tmp_path), plan, 1)
    chosen = plan.config.storage
    made = len(encode(skimage.data.astronaut(), chosen.codec, chosen.quality))
    assert each == pytest.approx(made, rel=0.35)
    assert storage["codec"] in source


def test_an_estimate_is_said_with_what_it_rests_on(paper_plan: Plan, tmp_path: Path) -> None:
    assert estimate_rows(of_paper(paper_plan, tmp_path, gpus_per_node="a100:4", time="10")) == {
        "to make": "262,040 images, 33 tasks for 132 shards, 4 GPUs each",
        "to store": "85.5 GB (as photographs: webp at 41.5 % of raw)",
        "on A100": "28 min 37 s a task, 63 GPU-hours, 28 min 37 s in all; 1.21 images/s "
        "(published speed of an A100), loading 1 min (assumed)",
        "warning, A100": "a task takes 28 min 37 s and the time limit ends it after 8 min 30 s: "
        "a task will be requeued 3 times; ask for more --time, or plan smaller shards",
    }
    rows = estimate_rows(of_paper(paper_plan, tmp_path, executor="local"))
    assert rows["time"].startswith(f"not known yet: run sdwn pilot {tmp_path}")
