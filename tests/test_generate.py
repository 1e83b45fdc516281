from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sdwn import io as files
from sdwn.devices.tuning import GpuProfile, Probe, Tuning, find_profile, store_profile
from sdwn.errors import DiskError, IntegrityError, OutOfMemoryError, SdwnError, UsageError
from sdwn.generation import task as generate
from sdwn.generation.batching import ImageSampler, NoiseSampler, choose_batch
from sdwn.generation.sampler import Sampler
from sdwn.io import seconds, write_text
from sdwn.jobs import task
from sdwn.jobs.task import RunDisk, read_record
from sdwn.models.builtin import builtin_folder
from sdwn.paths import LOWERED, WAITED, RunPaths
from sdwn.planning import plan as plan_module
from sdwn.planning.plan import ImageSpec, Plan, read_plan, write_plan
from sdwn.planning.tables import concept_rows, concept_table
from sdwn.preflight import trials
from sdwn.storage.columns import names, texts
from sdwn.storage.images import decode, encode
from sdwn.storage.shards import ImageFile
from sdwn.workflow.status import images_done, run_status
from sdwn.workflow.submitting import LATER_STAGES
from submitit.core.utils import UncompletedJobError

from conftest import FEW, PlanRun, Sdwn, noise_config, wait_until

IMAGE_COLUMNS = ("wnid", "synset", "number", "seed", "prompt", "status", "batch", "place")


@pytest.fixture
def planned(planned: PlanRun) -> PlanRun:
    return partial(planned, catalog=FEW)


@pytest.fixture
def generated(generated: PlanRun) -> PlanRun:
    return partial(generated, catalog=FEW)


def images(paths: RunPaths) -> list[tuple[Any, ...]]:
    """All that a user gets of each image, without which attempt made it."""
    found = []
    for index in sorted(paths.done_shards()):
        with ImageFile(paths.shard(index)) as file:
            rows = file.rows()
            for i in range(len(file)):
                found.append((*(rows[name][i] for name in IMAGE_COLUMNS), file.payload(i)))
    return found


def attempts(paths: RunPaths, index: int = 0) -> list[int]:
    with ImageFile(paths.shard(index)) as file:
        return list(file.rows()["attempt"].tolist())


def make(paths: RunPaths, plan: Plan, sampler: ImageSampler) -> None:
    todo = [shard for shard in plan.shards if not paths.shard(shard.index).exists()]
    generate.make_shards(paths, plan, todo, sampler)


class Failing(NoiseSampler):
    """Noise until some number of batches, then an error."""

    def __init__(self, plan: Plan, batches: int) -> None:
        super().__init__(plan.config)
        self.batches = batches

    def sample(self, specs: Sequence[ImageSpec]) -> Any:
        self.batches -= 1
        if self.batches < 0:
            raise RuntimeError("the GPU fell off the bus")
        return super().sample(specs)


@pytest.fixture
def flush_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDWN_FLUSH_SECONDS", "0")


def test_a_shard_holds_the_plans_images(generated: PlanRun) -> None:
    paths, plan = generated()
    assert paths.done_shards() == set(range(len(plan.shards)))
    assert not list(paths.pieces.iterdir()), "pieces go once their shard is finished"
    sampler = NoiseSampler(plan.config)
    for shard in plan.shards:
        with ImageFile(paths.shard(shard.index)) as file:
            rows = file.rows()
            specs = list(plan.specs(shard))
            for spec, sample in zip(specs, sampler.sample(specs), strict=True):
                image = decode(file.payload(spec.index), "webp", 16, 8)
                assert image.tobytes() == sample.pixels.tobytes(), "lossless"
                assert rows["wnid"][spec.index].decode() == spec.concept.wnid
                assert rows["prompt"][spec.index].decode() == spec.prompt
                assert rows["seed"][spec.index] == spec.seed
            assert names(rows["status"], "status") == ["ok"] * len(file)
            assert file.attributes["plan_digest"] == plan.digest
            assert file.task_runs[0]["host"]


@pytest.mark.parametrize("codec", ["webp", "png", "raw"])
def test_lossless_codecs_keep_every_pixel(generated: PlanRun, codec: str) -> None:
    paths, plan = generated(storage={"codec": codec})
    spec = next(plan.specs(plan.shards[0]))
    sample = NoiseSampler(plan.config).sample([spec])[0]
    with ImageFile(paths.shard(0)) as file:
        assert decode(file.payload(0), codec, 16, 8).tobytes() == sample.pixels.tobytes()


def test_an_error_keeps_what_was_finished(planned: PlanRun, flush_at_once: None) -> None:
    paths, plan = planned(storage={"images_per_shard": 40})
    with pytest.raises(RuntimeError, match="fell off the bus"):
        make(paths, plan, Failing(plan, batches=3))
    assert [stop - start for start, stop in paths.piece_ranges(0)] == [5, 5, 5]
    counting = Failing(plan, batches=100)
    make(paths, plan, counting)
    total = sum(-(-shard.images // 5) for shard in plan.shards)
    assert 100 - counting.batches == total - 3, "only the rest is sampled"
    assert attempts(paths)[:20] == [1] * 15 + [2] * 5


def test_a_killed_run_ends_with_the_same_images(
    generated: PlanRun, planned: PlanRun, flush_at_once: None
) -> None:
    undisturbed, _ = generated("undisturbed", storage={"images_per_shard": 25})
    paths, plan = planned("killed", storage={"images_per_shard": 25})
    chance = random.Random(3)
    for _ in range(6):
        with pytest.raises(RuntimeError):
            make(paths, plan, Failing(plan, batches=chance.randrange(1, 3)))
    make(paths, plan, NoiseSampler(plan.config))
    assert images(paths) == images(undisturbed)


def written(folder: Path, rows: dict[str, Any], **settings: Any) -> tuple[RunPaths, Plan]:
    """Plan the rows of a table of prompts."""
    plan = Plan("table", noise_config(**settings), concept_rows(concept_table(rows)))
    write_plan(plan, RunPaths(folder))
    return RunPaths(folder), plan


# Of uneven counts, some with several prompts, a seed, or a negative prompt of their own.
TABLE: dict[str, Any] = {
    "id": [f"row {number}" for number in range(12)],
    "label": ["a label"] * 12,
    "prompts": [[f"{number}", "or else", f"{number}"][: 1 + number % 3] for number in range(12)],
    "images": [1 + number * number % 5 for number in range(12)],
    "seed": [number if number % 2 else None for number in range(12)],
    "negative_prompt": [None if number % 4 else f"no {number}" for number in range(12)],
}


def test_uneven_counts_are_made_in_batches_and_a_killed_run_ends_with_the_same_images(
    tmp_path: Path, flush_at_once: None
) -> None:
    cut = {"generation": {"batch_size": 5}, "storage": {"images_per_shard": 12}}
    undisturbed, plan = written(tmp_path / "undisturbed", TABLE, **cut)
    make(undisturbed, plan, NoiseSampler(plan.config))
    paths, _ = written(tmp_path / "killed", TABLE, **cut)
    plan = read_plan(paths)
    assert len({shard.images for shard in plan.shards}) > 1
    for batches in (1, 2, 1):
        with pytest.raises(RuntimeError):
            make(paths, plan, Failing(plan, batches))
    make(paths, plan, NoiseSampler(plan.config))
    assert images(paths) == images(undisturbed)
    for shard in plan.shards:
        with ImageFile(paths.shard(shard.index)) as file:
            rows = file.rows()
        starts = [batch - batch % 5 for batch in range(shard.images)]
        assert rows["batch"].tolist() == starts, "cut every five images, whatever they are of"
        for name in ("number", "seed", "prompt_number"):
            expected = [getattr(spec, name) for spec in plan.specs(shard)]
            assert rows[name].tolist() == expected
        columns = zip(
            *(texts(rows[name]) for name in ("id", "wnid", "negative_prompt")), strict=True
        )
        expected = [(spec.concept.id, "", spec.negative_prompt or "") for spec in plan.specs(shard)]
        assert list(columns) == expected


@pytest.mark.model
def test_rows_with_seeds_and_negative_prompts_are_what_diffusers_makes(tmp_path: Path) -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    model = {"name": "builtin:tiny"}
    size = {"height": 32, "width": 32, "num_inference_steps": 2, "precision": "fp32"}
    settings: dict[str, Any] = {"model": model}
    settings["storage"] = {"codec": "raw", "images_per_shard": 20}
    settings["generation"] = {**size, "batch_size": 1, "negative_prompt": "grey"}
    paths, plan = written(
        tmp_path / "run", {key: rows[:5] for key, rows in TABLE.items()}, **settings
    )
    generate.generate(paths.root, range(len(plan.shards)))
    plain = StableDiffusionPipeline.from_pretrained(builtin_folder("tiny"))
    with ImageFile(paths.shard(0)) as file:
        rows = file.rows()
        assert len(file) == plan.images > 10
        for i in range(len(file)):
            seed = torch.Generator().manual_seed(int(rows["seed"][i]))
            image = plain(
                rows["prompt"][i].decode(),
                negative_prompt=rows["negative_prompt"][i].decode(),
                latents=torch.randn((1, 4, 8, 8), generator=seed),
                height=32,
                width=32,
                num_inference_steps=2,
            ).images[0]
            assert file.payload(i) == np.asarray(image).tobytes()
        assert rows["seed"][texts(rows["id"]).index("row 1")] != 1, "one of two: derived of its own"
        assert {"no 0", "no 4", "grey"} == set(texts(rows["negative_prompt"]))


@pytest.mark.parametrize("images", [[3] * 25, [1] * 9, [1, 2, 3, 4] * 6])
def test_a_pilots_images_of_rows_with_seeds_are_those_of_the_run(images: list[int]) -> None:
    ids = [f"{number}" for number in range(len(images))]
    rows = {
        "id": ids,
        "prompts": [["a", "b"]] * len(ids),
        "images": images,
        "seed": range(len(ids)),
    }
    plan = Plan("table", noise_config(), concept_rows(concept_table(rows)))
    every = [spec for shard in plan.shards for spec in plan.specs(shard)]
    seeds = {(spec.concept.id, spec.number): (spec.seed, spec.prompt) for spec in every}
    small = trials.pilot_plan(plan)
    for spec in small.specs(small.shards[0]):
        assert seeds[spec.concept.id, spec.number] == (spec.seed, spec.prompt)


def test_a_finished_shard_is_never_made_again(generated: PlanRun) -> None:
    paths, plan = generated()
    before = {path: path.stat().st_mtime_ns for path in paths.shards.iterdir()}
    generate.generate(paths.root, range(len(plan.shards)))
    assert before == {path: path.stat().st_mtime_ns for path in paths.shards.iterdir()}


def start(paths: RunPaths) -> subprocess.Popen[bytes]:
    code = (
        "import sys, pathlib; from sdwn.generation import task as generate\n"
        "generate.FLUSH_SECONDS = 0.05; "
        "generate.generate(pathlib.Path(sys.argv[1]), range(int(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, str(paths.root), str(len(read_plan(paths).shards))]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


# Two seconds of noise in a process of its own.
SLOW = {"storage": {"images_per_shard": 20}, "generation": {"num_inference_steps": 3}}


@pytest.mark.process
def test_sigkill_at_any_moment_loses_no_image(generated: PlanRun, planned: PlanRun) -> None:
    undisturbed, _ = generated("undisturbed", **SLOW)
    paths, _ = planned("killed", **SLOW)
    chance = random.Random(5)
    for _ in range(6):
        process = start(paths)
        wait_for_images(paths, process)
        time.sleep(chance.random() * 0.4)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = start(paths)
    _, log = process.communicate(timeout=120)
    assert process.returncode == 0, log.decode()
    assert images(paths) == images(undisturbed)


def wait_for_images(paths: RunPaths, process: subprocess.Popen[bytes]) -> None:
    before = sum(1 for _ in paths.root.rglob("*.h5"))
    while process.poll() is None and sum(1 for _ in paths.root.rglob("*.h5")) <= before:
        time.sleep(0.01)


@pytest.mark.process
def test_two_tasks_may_hold_the_same_shards(generated: PlanRun, planned: PlanRun) -> None:
    undisturbed, _ = generated("undisturbed", **SLOW)
    paths, _ = planned("twice", **SLOW)
    both = [start(paths), start(paths)]
    for process in both:
        _, log = process.communicate(timeout=120)
        assert process.returncode == 0, log.decode()
    assert images(paths) == images(undisturbed)
    assert not list(paths.pieces.iterdir())


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_piece_is_made_again(
    generated: PlanRun, planned: PlanRun, flush_at_once: None, damage: str
) -> None:
    undisturbed, _ = generated("undisturbed", storage={"images_per_shard": 25})
    paths, plan = planned("damaged", storage={"images_per_shard": 25})
    with pytest.raises(RuntimeError):
        make(paths, plan, Failing(plan, batches=3))
    piece = paths.piece(0, 5, 10)
    content = bytearray(piece.read_bytes())
    content[-3] ^= 4
    kept = {"flip": len(content), "cut": len(content) // 2}[damage]
    piece.write_bytes(content[:kept])
    make(paths, plan, NoiseSampler(plan.config))
    assert images(paths) == images(undisturbed)


def test_a_piece_of_another_plan_is_not_taken(
    planned: PlanRun, generated: PlanRun, flush_at_once: None
) -> None:
    undisturbed, _ = generated("undisturbed")
    other, other_plan = planned("other", seed=9)
    with pytest.raises(RuntimeError):
        make(other, other_plan, Failing(other_plan, batches=1))
    paths, plan = planned("mixed")
    shutil.copytree(other.shard_pieces(0), paths.shard_pieces(0))
    make(paths, plan, NoiseSampler(plan.config))
    assert images(paths) == images(undisturbed)


def test_another_batch_size_after_a_restart_keeps_what_there_is(
    planned: PlanRun, flush_at_once: None
) -> None:
    paths, plan = planned(storage={"images_per_shard": 40})
    with pytest.raises(RuntimeError):
        make(paths, plan, Failing(plan, batches=3))
    generation = plan.config.generation.model_copy(update={"batch_size": 10})
    larger = Plan(
        plan.catalog, plan.config.model_copy(update={"generation": generation}), plan.concepts
    )
    object.__setattr__(larger, "digest", plan.digest)
    make(paths, larger, NoiseSampler(larger.config))
    with ImageFile(paths.shard(0)) as file:
        rows = file.rows()
        assert rows["batch_size"].tolist()[:20] == [5] * 15 + [10] * 5
        assert rows["number"].tolist() == [0, 1, 2, 3, 4] * (len(file) // 5)


class Disturbed(NoiseSampler):
    """Noise; something else happens before one of its batches, counted from 1."""

    def __init__(self, plan: Plan, batch: int, happens: Callable[[], None]) -> None:
        super().__init__(plan.config)
        self.batches, self._batch, self._happens = 0, batch, happens

    def sample(self, specs: Sequence[ImageSpec]) -> Any:
        self.batches += 1
        if self.batches == self._batch:
            self._happens()
        return super().sample(specs)


def flipped(paths: RunPaths) -> None:
    content = bytearray(paths.piece(0, 5, 10).read_bytes())
    content[-3] ^= 4
    paths.piece(0, 5, 10).write_bytes(content)


def all_removed(paths: RunPaths) -> None:
    # The task may write or remove a file at the same moment.
    shutil.rmtree(paths.pieces, ignore_errors=True)


@pytest.mark.parametrize("damage", [flipped, all_removed])
def test_pieces_lost_while_a_task_runs_are_made_again_in_it(
    generated: PlanRun,
    planned: PlanRun,
    flush_at_once: None,
    damage: Callable[[RunPaths], None],
) -> None:
    undisturbed, _ = generated("undisturbed", storage={"images_per_shard": 25})
    paths, plan = planned("disturbed", storage={"images_per_shard": 25})

    def happens() -> None:
        wait_until(lambda: paths.piece(0, 5, 10).exists())
        damage(paths)

    sampler = Disturbed(plan, 5, happens)
    make(paths, plan, sampler)
    assert images(paths) == images(undisturbed)
    whole = plan.images // 5
    assert whole < sampler.batches <= whole + (4 if damage is all_removed else 1)
    assert not list(paths.pieces.iterdir())
    record = read_record(paths.task("none", 0))
    assert record.done == record.total == plan.images


def test_pieces_lost_again_and_again_end_the_task_with_its_other_shards_whole(
    planned: PlanRun, flush_at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, plan = planned(storage={"images_per_shard": 25})
    join = generate.ShardWriter.join

    def lose_one(writer: generate.ShardWriter) -> None:
        if writer.shard.index == 1:
            paths.piece(1, 0, 5).unlink()
        join(writer)

    monkeypatch.setattr(generate.ShardWriter, "join", lose_one)
    with pytest.raises(IntegrityError, match=r"lost or damaged 3 times .*\(of shards 1\)"):
        make(paths, plan, NoiseSampler(plan.config))
    assert paths.done_shards() == {shard.index for shard in plan.shards} - {1}


def test_partial_shards_that_a_kill_left_beside_their_shard_go_with_the_next_task(
    generated: PlanRun,
) -> None:
    paths, _ = generated(storage={"images_per_shard": 25})
    shutil.copytree(paths.shards, paths.shard_pieces(0))
    paths.shard(1).unlink()
    generate.generate(paths.root, [1])
    assert not list(paths.pieces.iterdir())


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for a disk for ever, and look often if it works again."""
    monkeypatch.setattr(task, "WAIT_SECONDS", 1e9)
    monkeypatch.setattr(task, "RETRY_SECONDS", 0.05)


@pytest.mark.parametrize("reason", [errno.ESTALE, errno.EDQUOT])
def test_a_disk_that_fails_for_a_moment_is_waited_for(
    generated: PlanRun,
    planned: PlanRun,
    flush_at_once: None,
    patient: None,
    monkeypatch: pytest.MonkeyPatch,
    reason: int,
) -> None:
    undisturbed, _ = generated("undisturbed")
    paths, plan = planned()
    sync, failures = files.sync, []

    def failing(path: Path) -> None:
        # Of pieces, a shard and a record, twice in a row.
        failures.append(path)
        if len(failures) < 20 and len(failures) % 5 in (1, 2):
            raise OSError(reason, os.strerror(reason))
        sync(path)

    monkeypatch.setattr(files, "sync", failing)
    make(paths, plan, NoiseSampler(plan.config))
    monkeypatch.undo()
    assert images(paths) == images(undisturbed)
    (told,) = run_status(paths, plan).waited
    assert "for the disk" in told


@pytest.mark.process
def test_a_read_only_disk_is_waited_for_and_then_gone_on_with(
    generated: PlanRun, planned: PlanRun, small_disk: Path, flush_at_once: None, patient: None
) -> None:
    undisturbed, _ = generated("undisturbed")
    source, plan = planned("run")
    paths = moved_to(small_disk, source)
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)

    def read_only() -> None:
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        threading.Timer(0.5, again).start()

    def again() -> None:
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)

    make(paths, plan, Disturbed(plan, 3, read_only))
    assert images(paths) == images(undisturbed)
    (told,) = run_status(paths, plan).waited
    assert re.search(r"waited \d+ s for the disk, then continued", told)


def test_a_run_folder_that_is_away_for_a_moment_is_not_made_anew(
    generated: PlanRun, planned: PlanRun, flush_at_once: None, patient: None
) -> None:
    undisturbed, _ = generated("undisturbed")
    paths, plan = planned()
    away = paths.root.with_name("away")
    seen: list[bool] = []

    def back() -> None:
        seen.append(paths.root.exists())
        away.rename(paths.root)

    def leaves() -> None:
        paths.root.rename(away)
        threading.Timer(0.5, back).start()

    make(paths, plan, Disturbed(plan, 3, leaves))
    assert seen == [False], "nothing is written where the run no longer is"
    assert images(paths) == images(undisturbed)


def test_a_run_folder_that_leaves_in_the_middle_of_writing_is_not_made_anew(
    generated: PlanRun, planned: PlanRun, flush_at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, _ = generated("undisturbed")
    paths, plan = planned()
    away, seen, retry = paths.root.with_name("away"), list[bool](), RunDisk.retry

    def leaves_after_the_look(disk: RunDisk, action: Callable[[], Any]) -> Any:
        def disturbed() -> Any:
            if seen:
                return action()
            paths.root.rename(away)
            try:
                return action()
            finally:
                seen.append(paths.root.exists())
                away.rename(paths.root)

        return retry(disk, disturbed)

    monkeypatch.setattr(RunDisk, "retry", leaves_after_the_look)
    make(paths, plan, NoiseSampler(plan.config))
    assert seen == [False], "nothing is written where the run no longer is"
    assert images(paths) == images(undisturbed)


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_ends_the_wait_for_a_disk(
    planned: PlanRun, small_disk: Path, number: signal.Signals
) -> None:
    source, _ = planned("run", generation={"height": 64, "width": 64})
    paths = moved_to(small_disk, source)
    code = (
        "import sys, pathlib; from sdwn.generation import task as generate\n"
        "generate.FLUSH_SECONDS = 0.0; "
        "generate.generate(pathlib.Path(sys.argv[1]), range(4))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(paths.root)], stderr=subprocess.PIPE
    )
    wait_until(lambda: paths.note("none", 0, WAITED).exists())
    finished = sum(1 for _ in paths.root.rglob("[0-9]*.h5"))
    process.send_signal(number)
    # Far below the minutes that it would wait.
    _, log = process.communicate(timeout=60)
    assert process.returncode == 128 + number, log.decode()
    assert sum(1 for _ in paths.root.rglob("[0-9]*.h5")) == finished
    assert not list(small_disk.rglob("*.tmp"))


@pytest.mark.process
def test_a_disk_that_fails_while_hdf5_writes_does_not_end_the_process(
    planned: PlanRun, small_disk: Path
) -> None:
    """The disk says that it has room, as one with a quota does, and has not."""
    source, _ = planned("run", generation={"height": 64, "width": 64})
    paths = moved_to(small_disk, source)
    (small_disk / "full").write_bytes(bytes(190_000))
    code = (
        "import sys, pathlib; from sdwn.generation import task as generate\n"
        "from sdwn.jobs import task\n"
        "import shutil, types; room = types.SimpleNamespace(free=1 << 60)\n"
        "shutil.disk_usage = lambda _: room\n"
        "task.WAIT_SECONDS = 0.0; task.RETRY_SECONDS = 0.0\n"
        "generate.generate(pathlib.Path(sys.argv[1]), [0])"
    )
    command = [sys.executable, "-c", code, str(paths.root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, "an error of Python's, no crash"
    assert "no space or quota left" in done.stderr.splitlines()[-1]


def moved_to(disk: Path, run: RunPaths) -> RunPaths:
    """Copy a run to a disk, without the table of its taxonomy, which tasks need no room for."""
    kept = shutil.ignore_patterns(run.taxonomy.name)
    return RunPaths(shutil.copytree(run.root, disk / "run", ignore=kept))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.process
def test_a_full_disk_is_waited_for_in_vain_and_loses_nothing_finished(
    planned: PlanRun,
    generated: PlanRun,
    small_disk: Path,
    flush_at_once: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(task, "WAIT_SECONDS", 0.2)
    monkeypatch.setattr(task, "RETRY_SECONDS", 0.1)
    changes: dict[str, Any] = {"generation": {"height": 64, "width": 64}}
    undisturbed, _ = generated("undisturbed", **changes)
    source, plan = planned("run", **changes)
    paths = moved_to(small_disk, source)
    with pytest.raises(DiskError) as error:
        generate.generate(paths.root, range(len(plan.shards)))
    needed, free = re.findall(r"([0-9.]+) kB (needed|free)", str(error.value))
    assert (needed[1], free[1]) == ("needed", "free")
    assert float(needed[0]) > float(free[0])
    assert "everything finished is kept" in str(error.value)
    assert not list(small_disk.rglob("*.tmp")), "no half-written file is left"
    (told,) = run_status(paths, plan).waited
    assert "waiting for the disk since" in told
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    generate.generate(paths.root, range(len(plan.shards)))
    assert images(paths) == images(undisturbed)


def test_a_piece_that_its_disk_does_not_give_for_now_is_kept(
    planned: PlanRun, flush_at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, plan = planned()
    with pytest.raises(RuntimeError):
        make(paths, plan, Failing(plan, batches=3))
    finished = sorted(paths.pieces.rglob("*.h5"))
    monkeypatch.setattr(task, "WAIT_SECONDS", 0.0)
    monkeypatch.setattr(task, "RETRY_SECONDS", 0.0)

    def failing(*_: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(DiskError, match="its disk fails"):
        make(paths, plan, NoiseSampler(plan.config))
    assert sorted(paths.pieces.rglob("*.h5")) == finished != []


def test_only_names_that_a_run_writes_count(planned: PlanRun) -> None:
    paths, plan = planned()
    for name in ("0.h5", "abc.h5", "²².h5", "000001.h5", ".00001.h5.x.tmp"):
        write_text(paths.shards / name, "")
    for name in ("abc.h5", "7-x.h5", "1-2-3.h5", "0-5.h5"):
        write_text(paths.shard_pieces(1) / name, "")
    (paths.pieces / "²").mkdir()
    assert paths.done_shards() == set()
    assert images_done(paths, plan) == 0
    write_text(paths.shards / "00099.h5", "")
    write_text(paths.piece(999, 0, 99_999), "")
    assert images_done(paths, plan) == 0
    write_text(paths.piece(1, 0, 99_999), "")
    assert images_done(paths, plan) == plan.shards[1].images
    status = run_status(paths, plan)
    assert (status.shards_done, status.shards_missing) == (0, len(plan.shards))


def test_an_array_task_asks_for_itself_again() -> None:
    array_task = task.ArrayTask(generate.GENERATE, "/somewhere", (3, 4), "a plan", "a code")
    again = array_task.checkpoint().function
    assert dataclasses.replace(again, idle=0) == array_task
    merging = task.ArrayTask(LATER_STAGES["merge"], "/somewhere", ())
    for _ in range(9):
        merging = merging.checkpoint().function


@given(st.lists(st.sampled_from(["nothing", "piece", "shard"]), max_size=12))
@settings(max_examples=20, deadline=None)
def test_a_task_that_finishes_nothing_new_is_not_started_again_for_ever(ends: list[str]) -> None:
    """Count no progress for what was finished at submission, or for a piece now in a shard."""
    with tempfile.TemporaryDirectory() as folder:
        paths, idle = RunPaths(Path(folder)), 0
        array_task = task.ArrayTask(generate.GENERATE, folder, (3, 4))
        for number, end in enumerate(ends):
            if end == "piece":
                write_text(paths.piece(4, number, number + 1), "")
            elif end == "shard" and not paths.shard(3).exists():
                write_text(paths.shard(3), "")
            else:
                idle += 1
                if idle == 3:
                    with pytest.raises(
                        SdwnError, match=r"3 starts in a row .* ask for more --time"
                    ):
                        array_task.checkpoint()
                    return
                array_task = array_task.checkpoint().function
                continue
            idle, array_task = 0, array_task.checkpoint().function


def test_a_task_that_starts_while_its_folder_is_away_waits_for_it(
    planned: PlanRun, patient: None
) -> None:
    paths, plan = planned()
    away = paths.root.with_name("away")
    paths.root.rename(away)
    threading.Timer(0.5, lambda: away.rename(paths.root)).start()
    task.ArrayTask(generate.GENERATE, str(paths.root), (0,), plan.digest)()
    assert paths.done_shards() == {0}


def test_a_shard_that_cannot_be_joined_is_an_error(planned: PlanRun) -> None:
    paths, plan = planned()
    with pytest.raises((IntegrityError, ValueError)):
        generate.ShardWriter(RunDisk(paths), plan, plan.shards[0], {}).join()
    assert not paths.done_shards()


def test_read_plan_after_a_move(generated: PlanRun, tmp_path: Path) -> None:
    paths, plan = generated()
    moved = RunPaths(paths.root.rename(tmp_path / "moved"))
    assert read_plan(moved).digest == plan.digest
    assert moved.done_shards() == set(range(len(plan.shards)))


class Small(NoiseSampler):
    """Noise from a card that holds only so many images, fewer unless it decodes one by one."""

    def __init__(self, plan: Plan, whole: int, sliced: int) -> None:
        super().__init__(plan.config)
        self.whole, self.sliced = whole, sliced
        self.sampled: list[int] = []

    def sample(self, specs: Sequence[ImageSpec]) -> Any:
        if len(specs) > (self.sliced if self.vae_slicing else self.whole):
            raise OutOfMemoryError("out of memory: tried to allocate 20 GiB")
        self.sampled.append(len(specs))
        return super().sample(specs)

    def slice_vae(self) -> bool:
        changed, self.vae_slicing = not self.vae_slicing, True
        return changed


class TestBackOff:
    def test_smaller_batches_make_the_same_images(
        self, generated: PlanRun, planned: PlanRun, flush_at_once: None
    ) -> None:
        undisturbed, _ = generated("undisturbed", storage={"images_per_shard": 40})
        paths, plan = planned(generation={"batch_size": 20}, storage={"images_per_shard": 40})
        small = Small(plan, whole=4, sliced=12)
        make(paths, plan, small)
        assert sum(small.sampled) == plan.images, "no image is sampled twice"
        assert set(small.sampled) == {10, 5}, "slicing, then 10; 5 is what is left of a shard"
        same = [(*image[:6], image[-1]) for image in images(paths)]
        assert same == [(*image[:6], image[-1]) for image in images(undisturbed)]
        (note,) = run_status(paths, plan).lowered
        assert (
            note == "job none.0: cpu: 20 to 10 images a batch (from the config, decoded one by one)"
        )
        record = read_record(paths.task("none", 0))
        assert (record.batch_size, record.lowered_from, record.ended) == (10, 20, True)

    def test_a_single_image_that_does_not_fit_is_an_error(self, planned: PlanRun) -> None:
        paths, plan = planned()
        with pytest.raises(SdwnError, match="no room for a single image: out of memory"):
            make(paths, plan, Small(plan, whole=0, sliced=0))

    def test_submitits_own_exceptions_pass(self, planned: PlanRun) -> None:
        paths, plan = planned()

        class Requeued(NoiseSampler):
            def sample(self, specs: Sequence[ImageSpec]) -> Any:
                raise UncompletedJobError("Job not requeued because: timed-out too many times.")

        with pytest.raises(UncompletedJobError):
            make(paths, plan, Requeued(plan.config))
        assert run_status(paths, plan).lowered == []

    @pytest.mark.process
    def test_memory_that_really_runs_out(self, planned: PlanRun) -> None:
        """A limited address space, the built-in pipeline, and batches that need more."""
        changes: dict[str, Any] = {
            "model": {"name": "builtin:tiny"},
            "generation": {"height": 96, "width": 96, "batch_size": 100},
            "storage": {"images_per_shard": 100},
            "images_per_synset": 10,
        }
        paths, plan = planned(**changes)
        code = (
            "import pathlib, resource, sys\n"
            "from sdwn.generation import batching, task as generate\n"
            "from sdwn.paths import RunPaths; from sdwn.planning.plan import read_plan\n"
            "paths = RunPaths(pathlib.Path(sys.argv[1])); plan = read_plan(paths)\n"
            "sampler = batching.load_sampler(plan.config)\n"
            "pages = int(pathlib.Path('/proc/self/statm').read_text().split()[0])\n"
            "most = pages * resource.getpagesize() + 400_000_000\n"
            "resource.setrlimit(resource.RLIMIT_AS, (most, most))\n"
            "generate.make_shards(paths, plan, plan.shards[:1], sampler)\n"
        )
        environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code, str(paths.root)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (note,) = run_status(paths, plan).lowered
        assert "cpu: 100 to" in note
        with ImageFile(paths.shard(0)) as file:
            rows = file.rows()
            assert rows["batch_size"].max() < 100
            assert rows["vae_slicing"].all()
            undisturbed = Sampler(plan.config).sample(list(plan.specs(plan.shards[0]))[:5])
            for index, sample in enumerate(undisturbed):
                image = np.asarray(decode(file.payload(index), "webp", 96, 96)).astype(int)
                if names(rows["status"], "status")[index] == "ok":
                    assert np.abs(image - sample.pixels).max() <= 1


class Overflowing(NoiseSampler):
    """Noise of which every seventh image is NaN in half precision."""

    def __init__(self, plan: Plan, batches: int) -> None:
        super().__init__(plan.config)
        self.batches, self.retried = batches, list[int]()

    def sample(self, specs: Sequence[ImageSpec]) -> Any:
        self.batches -= 1
        if self.batches < 0:
            raise RuntimeError("killed")
        made = super().sample(specs)
        return [
            dataclasses.replace(one, status="nan") if spec.index % 7 == 0 else one
            for spec, one in zip(specs, made, strict=True)
        ]

    def in_float32(self, specs: Sequence[ImageSpec]) -> Any:
        self.retried += [spec.index for spec in specs]
        return [dataclasses.replace(one, retried_fp32=True) for one in super().sample(specs)]


def test_nan_is_sampled_again_at_the_end_and_a_kill_before_loses_nothing(
    planned: PlanRun, flush_at_once: None
) -> None:
    half: dict[str, Any] = {
        "generation": {"precision": "fp16"},
        "storage": {"images_per_shard": 60},
    }
    undisturbed, plan = planned("undisturbed", **half)
    whole = Overflowing(plan, 99)
    make(undisturbed, plan, whole)
    paths, _ = planned(**half)
    with pytest.raises(RuntimeError, match="killed"):
        make(paths, plan, Overflowing(plan, 6))
    kept = {image for there in paths.piece_ranges(0) for image in range(*there)}
    assert kept == set(range(30)) - {*range(10), *range(10, 15), *range(20, 25), *range(25, 30)}
    make(paths, plan, Overflowing(plan, 99))
    assert images(paths) == images(undisturbed)
    with ImageFile(paths.shard(0)) as file:
        rows = file.rows()
        again = np.flatnonzero(rows["retried_fp32"]).tolist()
        assert again == list(range(0, len(file), 7)) == sorted(set(whole.retried[: len(again)]))
        assert set(names(rows["status"], "status")) == {"ok"}
        assert set(rows["batch_size"][again]) == {1}


class Fitting(NoiseSampler):
    """Noise from a card that says how much it holds."""

    def __init__(self, plan: Plan, whole: int, sliced: int) -> None:
        super().__init__(plan.config)
        self._fits = {False: whole, True: sliced}

    def fits(self, sliced: bool) -> int | None:
        return self._fits[sliced]


class TestBatchSize:
    def chosen(self, plan: Plan, whole: int, sliced: int) -> tuple[int, bool]:
        batch = choose_batch(plan.config, plan.grid, Fitting(plan, whole, sliced))
        return batch.images, batch.vae_slicing

    def test_without_a_card_it_is_a_synset(self, planned: PlanRun) -> None:
        _, plan = planned()
        batch = choose_batch(plan.config, plan.grid, NoiseSampler(plan.config))
        assert str(batch) == "5 images a batch (one synset)"

    def test_a_card_takes_what_fits_but_no_more_than_pays(self, planned: PlanRun) -> None:
        _, plan = planned()
        assert self.chosen(plan, whole=83, sliced=300) == (15, False)
        assert self.chosen(plan, whole=7, sliced=20) == (5, False)
        assert self.chosen(plan, whole=3, sliced=12) == (10, True)
        assert self.chosen(plan, whole=3, sliced=3) == (1, False)
        assert self.chosen(plan, whole=0, sliced=0) == (1, False)

    def test_what_was_measured_goes_before_what_is_estimated(
        self, planned: PlanRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("SDWN_CACHE", str(tmp_path / "own"))
        _, plan = planned()
        sampler = Fitting(plan, 83, 300)
        probes = (Probe(10, 9.0, 10**9), Probe(33, 9.9, 2 * 10**9))
        tuning = Tuning(33, 9.9, 2 * 10**9, 3 * 10**9, 5e8, 5e7, probes)
        stored = store_profile(GpuProfile(sampler.workload, True, tuning, "2026-01-01"))
        assert find_profile(sampler.workload) == stored
        batch = choose_batch(plan.config, plan.grid, sampler)
        assert (batch.images, batch.vae_slicing) == (30, True), "on this plan's grid"
        assert batch.source.startswith("tuned 20")
        other = dataclasses.replace(sampler.workload, torch="0.1")
        assert find_profile(other) is None, "other versions, other speeds"
        stored.path.write_text("{}")
        assert find_profile(sampler.workload) is None
        assert self.chosen(plan, 83, 300) == (15, False)

    def test_the_config_pins_it_and_the_command_line_asks_for_it(self, planned: PlanRun) -> None:
        _, plan = planned(generation={"batch_size": 10})
        assert self.chosen(plan, 83, 300) == (10, False)
        batch = choose_batch(plan.config, plan.grid, NoiseSampler(plan.config), 20)
        assert str(batch) == "20 images a batch (from the command line or the profile)"


class TestOverlap:
    def test_while_a_batch_is_written_the_next_is_sampled(
        self, planned: PlanRun, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        paths, plan = planned(storage={"images_per_shard": 40})
        second = threading.Event()

        class Watching(NoiseSampler):
            batches = 0

            def sample(self, specs: Sequence[ImageSpec]) -> Any:
                self.batches += 1
                if self.batches == 2:
                    second.set()
                return super().sample(specs)

        def encode_late(*arguments: Any, **options: Any) -> bytes:
            assert second.wait(timeout=30), "the second batch waits for the first to be encoded"
            return encode(*arguments, **options)

        monkeypatch.setattr(generate, "encode", encode_late)
        make(paths, plan, Watching(plan.config))
        assert paths.done_shards() == set(range(len(plan.shards)))

    def test_what_waits_to_be_written_is_bounded(
        self, planned: PlanRun, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        paths, plan = planned(storage={"images_per_shard": 80})
        begun, encoded = [0], [0]

        class Fast(NoiseSampler):
            def sample(self, specs: Sequence[ImageSpec]) -> Any:
                begun[0] += 1
                # One is sampled, one encoded, and no more than MOST_QUEUED are between them.
                assert begun[0] - encoded[0] // 5 <= generate.MOST_QUEUED + 2
                return super().sample(specs)

        def encode_slowly(*arguments: Any, **options: Any) -> bytes:
            time.sleep(0.005)
            encoded[0] += 1
            return encode(*arguments, **options)

        monkeypatch.setattr(generate, "encode", encode_slowly)
        make(paths, plan, Fast(plan.config))

    def test_an_error_while_encoding_ends_the_task_and_keeps_the_rest(
        self, generated: PlanRun, planned: PlanRun, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        undisturbed, _ = generated("undisturbed", storage={"images_per_shard": 40})
        paths, plan = planned(storage={"images_per_shard": 40})
        calls = [0]

        def encode_or_fail(*arguments: Any, **options: Any) -> bytes:
            calls[0] += 1
            if calls[0] > 10:
                raise OSError("the codec broke")
            return encode(*arguments, **options)

        monkeypatch.setattr(generate, "encode", encode_or_fail)
        monkeypatch.setenv("SDWN_FLUSH_SECONDS", "0")
        with pytest.raises(OSError, match="the codec broke"):
            make(paths, plan, NoiseSampler(plan.config))
        assert paths.piece_ranges(0) == [(0, 5), (5, 10)]
        monkeypatch.undo()
        make(paths, plan, NoiseSampler(plan.config))
        assert images(paths) == images(undisturbed)

    def test_what_is_collected_is_written_when_sampling_fails(self, planned: PlanRun) -> None:
        paths, plan = planned(storage={"images_per_shard": 40})
        with pytest.raises(RuntimeError, match="fell off the bus"):
            make(paths, plan, Failing(plan, batches=3))
        assert paths.piece_ranges(0) == [(0, 15)], "one piece: nothing was flushed before"

    @pytest.mark.process
    @pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
    def test_a_signal_writes_what_is_finished(
        self, planned: PlanRun, number: signal.Signals
    ) -> None:
        paths, _ = planned(storage={"images_per_shard": 60}, generation={"num_inference_steps": 2})
        code = (
            "import sys, pathlib; from sdwn.generation import task as generate; "
            "generate.FLUSH_SECONDS = 1e9; generate.generate(pathlib.Path(sys.argv[1]), [0, 1])"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(paths.root)], stderr=subprocess.PIPE
        )
        while not paths.task("none", 0).exists():
            time.sleep(0.01)
        time.sleep(0.5)
        assert not paths.piece_ranges(0)
        process.send_signal(number)
        _, log = process.communicate(timeout=30)
        assert process.returncode == 128 + number, log.decode()
        ((start, stop),) = paths.piece_ranges(0)
        assert start == 0
        assert stop >= 5


def test_a_record_says_how_fast_a_task_is(planned: PlanRun, paced: None) -> None:
    paths, plan = planned(storage={"images_per_shard": 40})
    make(paths, plan, NoiseSampler(plan.config))
    record = read_record(paths.task("none", 0))
    assert record.first_images == 5
    assert record.images == plan.images - 5
    assert 0 < record.busy <= 1
    assert record.peak_bytes > 10_000_000
    speed = record.images_per_second
    assert speed is not None
    assert speed <= 100, "a step of noise takes 10 ms"


def test_a_pilot_times_batches_that_fit(
    planned: PlanRun, paced: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It makes 20 images in batches of 20, and would time batches of 40."""
    paths, plan = planned(generation={"batch_size": 40})
    small = trials.pilot_plan(plan)
    assert (small.images, len(small.shards)) == (20, 1)
    assert len({row.wnid for row in small.concepts}) == 10, "of 13: two images of each"
    every = [spec for shard in plan.shards for spec in plan.specs(shard)]
    seeds = {(spec.concept.id, spec.number): spec.seed for spec in every}
    specs = small.specs(small.shards[0])
    assert all(seeds[spec.concept.id, spec.number] == spec.seed for spec in specs)
    pinned, whole = planned("pinned", generation={"batch_size": 5})
    write_plan(trials.pilot_plan(whole), pinned.pilot)
    assert read_plan(pinned.pilot).images == 20, "5 would tear pairs of images apart"
    many = dataclasses.replace(plan, concepts=tuple(plan.concepts) * 3)
    assert (len(trials.pilot_plan(many).concepts), trials.pilot_plan(many).images) == (20, 20)
    write_plan(small, paths.pilot)
    # Batches are those that the run's tasks would take.
    monkeypatch.setattr(trials, "load_sampler", lambda *_: Small(plan, 20, 20))
    trials.make_pilot(paths.pilot.root, [0])
    assert (paths.pilot.root / "step-0.txt").read_text() == "timing batch 20, 3 of 3\n"
    speed = json.loads(paths.pilot.speed.read_text())
    assert speed["batch_size"] == 20
    assert speed["images_per_second"] <= 100


@pytest.mark.process
def test_status_watches_until_nothing_is_live(
    planned: PlanRun, sdwn: Sdwn, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, _ = planned()
    monkeypatch.setenv("SDWN_BATCH_SIZE", "many")
    sdwn("submit", paths.root, "--wait", "--retries", "0", code=1)
    assert "failed" in sdwn("status", paths.root, "--watch").stdout


@pytest.mark.parametrize("text", ["0", "-5", "abc", "7.5"])
def test_a_batch_size_that_is_none_is_refused(
    planned: PlanRun, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    paths, _ = planned()
    monkeypatch.setenv("SDWN_BATCH_SIZE", text)
    with pytest.raises(UsageError, match="SDWN_BATCH_SIZE: expected a number of images"):
        task.ArrayTask(generate.GENERATE, str(paths.root), (0,))()


@pytest.mark.parametrize("value", ["abc", ""])
def test_seconds_that_are_none_are_told_by_their_variable(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("SDWN_FLUSH_SECONDS", value)
    with pytest.raises(UsageError, match=f"SDWN_FLUSH_SECONDS: expected seconds.*{value!r}"):
        seconds("SDWN_FLUSH_SECONDS", 5.0)


@pytest.mark.parametrize("size", [0, -3, 7.5, "10", None])
def test_a_gpu_profile_that_is_wrong_or_of_another_card_is_none(
    planned: PlanRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: Any
) -> None:
    monkeypatch.setenv("SDWN_CACHE", str(tmp_path / "own"))
    _, plan = planned()
    work = NoiseSampler(plan.config).workload
    tuning = Tuning(10, 9.9, 2, 3, 0.5, 0.5, (Probe(10, 9.9, 2),))
    path = store_profile(GpuProfile(work, False, tuning, "2026-01-01")).path
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, "tuning": {**whole["tuning"], "batch_size": size}}))
    assert find_profile(work) is None
    other = {**whole["workload"], "device": "another"}
    path.write_text(json.dumps({**whole, "workload": other}))
    assert find_profile(work) is None


def test_a_strange_note_does_not_stop_status(planned: PlanRun) -> None:
    paths, plan = planned()
    paths.tasks.mkdir()
    paths.note("1", 0, LOWERED).write_bytes(b"\xff\xfe" * 500_000)
    (line,) = run_status(paths, plan).lowered
    assert len(line) < 300


@pytest.mark.process
def test_a_signal_while_the_last_batches_are_written_loses_none(planned: PlanRun) -> None:
    paths, plan = planned(storage={"images_per_shard": 30})
    code = (
        "import os, pathlib, signal, sys, time\n"
        "from sdwn.generation import task as generate\n"
        "from sdwn.storage.images import encode\n"
        "def slowly(*a, **k): time.sleep(0.1); return encode(*a, **k)\n"
        "generate.encode = slowly; generate.FLUSH_SECONDS = 1e9\n"
        "finish = generate.BackgroundWriter.finish\n"
        "def ended(self, writer):\n"
        "    finish(self, writer); signal.setitimer(signal.ITIMER_REAL, 0.05)\n"
        "generate.BackgroundWriter.finish = ended\n"
        "signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGUSR2))\n"
        "generate.generate(pathlib.Path(sys.argv[1]), [0])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(paths.root)], check=False)
    assert done.returncode == 128 + signal.SIGUSR2
    assert images_done(paths, plan) == plan.shards[0].images


def test_a_plan_keeps_its_digest_when_sdwn_learns_new_settings(generated: PlanRun) -> None:
    """As if its plan.json had been written before ``compile`` was a setting."""
    paths, plan = generated()
    content = json.loads(paths.plan.read_text())
    del content["settings"]["generation"]["compile"]
    content["digest"] = plan_module._digest(content)
    paths.plan.write_text(json.dumps(content))
    assert read_plan(paths).digest == content["digest"] != plan.digest
