from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from sdwn import task
from sdwn.errors import IntegrityError, SdwnError
from sdwn.files import RunPaths, write_text
from sdwn.images import decode
from sdwn.noise import NoiseSampler
from sdwn.plan import ImageSpec, Plan, read_plan
from sdwn.shards import ImageFile, names
from sdwn.status import images_done, run_status

from conftest import PlanRun

IMAGE_COLUMNS = ("wnid", "synset", "number", "seed", "prompt", "status", "batch", "place")


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


def make(paths: RunPaths, plan: Plan, sampler: task.ImageSampler) -> None:
    session = task.task_session(sampler)
    for shard in plan.shards:
        task.make_shard(paths, plan, shard, sampler, session)


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
    monkeypatch.setattr(task, "FLUSH_SECONDS", 0.0)


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
                assert rows["wnid"][spec.index].decode() == spec.wnid
                assert rows["prompt"][spec.index].decode() == spec.prompt
                assert rows["seed"][spec.index] == spec.seed
            assert names(rows["status"], "status") == ["ok"] * len(file)
            assert file.attributes["plan_digest"] == plan.digest
            assert file.sessions[0]["host"]


@pytest.mark.parametrize("codec", ["webp", "png", "raw"])
def test_lossless_codecs_keep_every_pixel(generated: PlanRun, codec: str) -> None:
    paths, plan = generated(storage={"codec": codec})
    spec = next(plan.specs(plan.shards[0]))
    sample = NoiseSampler(plan.config).sample([spec])[0]
    with ImageFile(paths.shard(0)) as file:
        assert decode(file.payload(0), codec, 16, 8).tobytes() == sample.pixels.tobytes()


def test_jpeg_is_smaller_and_near(generated: PlanRun) -> None:
    paths, _ = generated(storage={"codec": "jpeg", "quality": 50})
    with ImageFile(paths.shard(0)) as file:
        assert decode(file.payload(0), "jpeg", 16, 8).size == (16, 8)


def test_an_error_keeps_what_was_finished(planned: PlanRun, flush_at_once: None) -> None:
    paths, plan = planned(storage={"images_per_shard": 40})
    with pytest.raises(RuntimeError, match="fell off the bus"):
        make(paths, plan, Failing(plan, batches=3))
    assert [stop - start for start, stop in paths.piece_ranges(0)] == [5, 5, 5]
    counting = Failing(plan, batches=100)
    make(paths, plan, counting)
    total = sum(-(-plan.shard_images(shard) // 5) for shard in plan.shards)
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


def test_a_finished_shard_is_never_made_again(generated: PlanRun) -> None:
    paths, plan = generated()
    before = {path: path.stat().st_mtime_ns for path in paths.shards.iterdir()}
    task.generate(paths.root, range(len(plan.shards)))
    assert before == {path: path.stat().st_mtime_ns for path in paths.shards.iterdir()}


def start(paths: RunPaths) -> subprocess.Popen[bytes]:
    code = (
        "import sys, pathlib; from sdwn import task; task.FLUSH_SECONDS = 0.05; "
        "task.generate(pathlib.Path(sys.argv[1]), range(int(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, str(paths.root), str(len(read_plan(paths).shards))]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


SLOW = {"storage": {"images_per_shard": 60}, "generation": {"num_inference_steps": 2}}


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


def test_two_tasks_may_hold_the_same_shards(generated: PlanRun, planned: PlanRun) -> None:
    undisturbed, _ = generated("undisturbed", **SLOW)
    paths, _ = planned("twice", **SLOW)
    both = [start(paths), start(paths)]
    for process in both:
        _, log = process.communicate(timeout=120)
        assert process.returncode == 0, log.decode()
    assert images(paths) == images(undisturbed)
    assert not list(paths.pieces.iterdir())


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
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
    kept = {"flip": len(content), "cut": len(content) // 2, "empty": 0}[damage]
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
        plan.catalog, plan.config.model_copy(update={"generation": generation}), plan.synsets
    )
    object.__setattr__(larger, "digest", plan.digest)
    make(paths, larger, NoiseSampler(plan.config))
    with ImageFile(paths.shard(0)) as file:
        rows = file.rows()
        assert rows["batch_size"].tolist()[:20] == [5] * 15 + [10] * 5
        assert rows["number"].tolist() == [0, 1, 2, 3, 4] * (len(file) // 5)


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


def test_a_full_disk_loses_nothing_finished(
    planned: PlanRun, generated: PlanRun, small_disk: Path, flush_at_once: None
) -> None:
    changes: dict[str, Any] = {"generation": {"height": 64, "width": 64}}
    undisturbed, _ = generated("undisturbed", **changes)
    source, plan = planned("run", **changes)
    paths = RunPaths(small_disk / "run")
    shutil.copytree(source.root, paths.root)
    with pytest.raises(SdwnError, match="no space or quota left; everything finished is kept"):
        task.generate(paths.root, range(len(plan.shards)))
    assert not list(small_disk.rglob("*.tmp")), "no half-written file is left"
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    task.generate(paths.root, range(len(plan.shards)))
    assert images(paths) == images(undisturbed)


def test_only_names_that_a_run_writes_count(planned: PlanRun) -> None:
    paths, plan = planned()
    for name in ("0.h5", "abc.h5", "²².h5", "000001.h5", ".00001.h5.x.tmp"):
        write_text(paths.shards / name, "")
    (paths.shards / "00002.h5").mkdir()
    for name in ("abc.h5", "7-x.h5", "1-2-3.h5", "0-5.h5"):
        write_text(paths.shard_pieces(1) / name, "")
    (paths.pieces / "²").mkdir()
    (paths.shard_pieces(1) / "000000-000005.h5").mkdir()
    assert paths.done_shards() == set()
    assert images_done(paths, plan) == 0
    write_text(paths.shards / "00099.h5", "")
    write_text(paths.piece(999, 0, 99_999), "")
    assert images_done(paths, plan) == 0
    write_text(paths.piece(1, 0, 99_999), "")
    assert images_done(paths, plan) == plan.shard_images(plan.shards[1])
    status = run_status(paths, plan)
    assert (status.shards_done, status.shards_missing) == (0, len(plan.shards))


def test_an_array_task_asks_for_itself_again() -> None:
    array_task = task.ArrayTask("generate", "/somewhere", (3, 4))
    assert array_task.checkpoint().function == array_task


def test_a_shard_that_cannot_be_joined_is_an_error(planned: PlanRun) -> None:
    paths, plan = planned()
    with pytest.raises((IntegrityError, ValueError)):
        task.finish_shard(paths, plan, plan.shards[0])
    assert not paths.done_shards()


def test_read_plan_after_a_move(generated: PlanRun, tmp_path: Path) -> None:
    paths, plan = generated()
    moved = RunPaths(paths.root.rename(tmp_path / "moved"))
    assert read_plan(moved).digest == plan.digest
    assert moved.done_shards() == set(range(len(plan.shards)))
