from __future__ import annotations

import hashlib
import json
import os
import resource
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sdwn.errors import IntegrityError
from sdwn.storage.columns import texts, to_columns
from sdwn.storage.shards import ImageFile, join, write_images

TASK_RUN = {"host": "node1", "job": "7_3", "device": "cpu"}


def rows(payloads: list[bytes], first: int = 0, task_run: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "id": f"n{first + i:08d}",
            "wnid": f"n{first + i:08d}",
            "synset": "café_crème.n.01",
            "number": first + i,
            "seed": 2**63 - 1 - i,
            "prompt": "façade " * (i % 5),
            "tokens": 77,
            "truncated": i % 2 == 0,
            "status": "nsfw" if i % 3 else "ok",
            "width": 16,
            "height": 8,
            "codec": "webp",
            "task_run": task_run,
            "sha256": hashlib.sha256(payload).digest(),
        }
        for i, payload in enumerate(payloads)
    ]


def write(path: Path, payloads: list[bytes], first: int = 0, task_run: Any = TASK_RUN) -> str:
    sizes = [len(payload) for payload in payloads]
    contents = to_columns(rows(payloads, first)), sizes, [task_run]
    return write_images(path, {"kind": "piece", "shard": 3}, contents, payloads)


PAYLOADS = st.lists(st.binary(max_size=200), min_size=1, max_size=20).filter(any)
# Without shrinking: the first find is as good as the smallest, and takes seconds, not minutes.
FLIPS = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
SLOW_DISK = settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))


@SLOW_DISK
@given(PAYLOADS)
def test_images_come_back_as_written(tmp_path: Path, payloads: list[bytes]) -> None:
    path = tmp_path / "a.h5"
    digest = write(path, payloads)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    with ImageFile(path) as file:
        assert [file.payload(i) for i in range(len(file))] == payloads
        assert list(file.payloads(0, len(file))) == payloads
        assert texts(file.rows()["prompt"]) == [row["prompt"] for row in rows(payloads)]
        assert file.task_runs == [TASK_RUN]


def test_the_schema_is_plain_hdf5(tmp_path: Path) -> None:
    payloads = [b"one", b"", b"three"]
    write(tmp_path / "a.h5", payloads)
    with h5py.File(tmp_path / "a.h5") as file:
        offsets, blob = file["offsets"][:], file["blob"]
        assert [bytes(blob[a:b]) for a, b in pairwise(offsets)] == payloads
        assert blob.chunks is None, "contiguous"
        assert file["rows/synset"].asstr()[0] == "café_crème.n.01"
        assert file["rows/seed"][0] == 2**63 - 1
        names = h5py.check_enum_dtype(file["rows/status"].dtype)
        assert {v: k for k, v in names.items()}[file["rows/status"][1]] == "nsfw"
        assert bytes(file["rows/sha256"][0]).hex() == hashlib.sha256(b"one").hexdigest()
        assert json.loads(file["task_runs"].asstr()[0]) == TASK_RUN
        assert "batch" not in file["rows"], "an absent column holds nothing for any image"
        assert (file.attrs["format"], file.attrs["shard"]) == (b"sdwn-images", 3)


def test_the_columns_lie_before_the_blob(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", [b"one", b"three"])
    with h5py.File(tmp_path / "a.h5") as file:
        chunks = [column.id.get_chunk_info(0) for column in file["rows"].values()]
        ends = [chunk.byte_offset + chunk.size for chunk in chunks]
        assert max(ends) <= file["blob"].id.get_offset()


@SLOW_DISK
@given(st.lists(PAYLOADS, min_size=1, max_size=4))
def test_joining_copies_every_image_and_task_run(tmp_path: Path, groups: list[list[bytes]]) -> None:
    paths = [tmp_path / f"{number}.h5" for number in range(len(groups))]
    for number, (path, group) in enumerate(zip(paths, groups, strict=True)):
        write(path, group, first=number * 100, task_run={"job": f"job{number % 2}"})
    files = [ImageFile(path) for path in paths]
    digest = join(tmp_path / "all.h5", {}, [(file, 0, len(file)) for file in files])
    assert digest == hashlib.sha256((tmp_path / "all.h5").read_bytes()).hexdigest()
    with ImageFile(tmp_path / "all.h5") as joined:
        assert list(joined.payloads(0, len(joined))) == [p for group in groups for p in group]
        jobs = [joined.task_runs[i]["job"] for i in joined.rows()["task_run"]]
        assert jobs == [f"job{n % 2}" for n, group in enumerate(groups) for _ in group]
        assert len(joined.task_runs) == min(2, len(groups)), "a task run is kept once"


def test_part_of_a_file_can_be_joined(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", [b"0", b"11", b"222"])
    with ImageFile(tmp_path / "a.h5") as file:
        join(tmp_path / "b.h5", {}, [(file, 1, 3)])
    with ImageFile(tmp_path / "b.h5") as file:
        assert [file.payload(i) for i in range(len(file))] == [b"11", b"222"]
        assert file.rows()["number"].tolist() == [1, 2]


@SLOW_DISK
@given(st.data())
def test_a_file_cut_short_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.h5"
    write(path, [bytes([i]) * 500 for i in range(8)])
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(IntegrityError, match=r"damaged|cut short"):
        ImageFile(path)


@SLOW_DISK
@given(st.integers(0, 7), st.integers(0, 499), st.integers(0, 7))
def test_one_flipped_bit_in_an_image_is_found(
    tmp_path: Path, image: int, byte: int, bit: int
) -> None:
    path = tmp_path / "a.h5"
    write(path, [bytes([i]) * 500 for i in range(8)])
    with h5py.File(path, "r+") as file:
        file["blob"][image * 500 + byte] ^= 1 << bit
    with (
        ImageFile(path) as damaged,
        pytest.raises(IntegrityError, match=f"image {image} is damaged"),
    ):
        damaged.check()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Any]:
    """A file's bytes, and what they say."""
    path = tmp_path_factory.mktemp("whole") / "a.h5"
    write(path, [bytes([i]) * 300 for i in range(6)])
    with ImageFile(path) as file:
        return path.read_bytes(), content(file)


@FLIPS
@given(st.data())
def test_a_flipped_bit_anywhere_is_an_error_or_no_matter(
    tmp_path: Path, whole: tuple[bytes, Any], data: st.DataObject
) -> None:
    altered, expected = bytearray(whole[0]), whole[1]
    altered[data.draw(st.integers(0, len(altered) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / "altered.h5").write_bytes(altered)
    try:
        with ImageFile(tmp_path / "altered.h5") as file:
            assert content(file) == expected, "a byte that HDF5 does not use"
    except IntegrityError:
        pass


def content(file: ImageFile) -> Any:
    rows = {name: values.tolist() for name, values in file.rows().items()}
    shown = {name: str(value) for name, value in file.attributes.items()}
    return rows, shown, file.task_runs, list(file.payloads(0, len(file)))


def test_foreign_and_later_files_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["data"] = [1, 2, 3]
    with pytest.raises(IntegrityError, match="expected sdwn-images version 2, found another file"):
        ImageFile(tmp_path / "other.h5")
    write(tmp_path / "later.h5", [b"x"])
    with h5py.File(tmp_path / "later.h5", "r+") as file:
        file.attrs["format_version"] = 3
    with pytest.raises(IntegrityError, match="expected sdwn-images version 2, found sdwn-images 3"):
        ImageFile(tmp_path / "later.h5")
    with pytest.raises(IntegrityError, match="missing"):
        ImageFile(tmp_path / "nowhere.h5")


@pytest.mark.parametrize("name", ["rows", "blob", "offsets", "task_runs"])
def test_a_file_without_a_part_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a.h5", [b"x"])
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        del file[name]
    with pytest.raises(IntegrityError, match=f"damaged: .*{name}"):
        ImageFile(tmp_path / "a.h5")


def claiming(file: h5py.File, name: str, rows: int, **how: Any) -> None:
    dtype = file[name].dtype
    del file[name]
    file.create_dataset(name, (rows,), dtype, **how)


@pytest.mark.parametrize("name", ["rows/seed", "rows/prompt", "offsets", "task_runs"])
@pytest.mark.parametrize(
    ("rows", "how"), [(10**8, {}), (10**12, {"chunks": (1000,), "compression": "gzip"})]
)
def test_a_table_that_claims_more_than_the_file_holds_takes_no_memory(
    tmp_path: Path, name: str, rows: int, how: dict[str, Any]
) -> None:
    write(tmp_path / "a.h5", [b"xxx", b"y"])
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        claiming(file, name, rows, **how)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(IntegrityError, match=f"{name} claims more than the file holds"):
        ImageFile(tmp_path / "a.h5")
    with pytest.raises(IntegrityError, match=f"expected 2 images, {name} claims {rows:,}"):
        ImageFile(tmp_path / "a.h5", most=2)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kilobytes"


def test_what_lies_in_another_file_is_not_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"0123456789abcdef")
    for place in ("external", "link"):
        write(tmp_path / "a.h5", [b"xxx", b"y"])
        with h5py.File(tmp_path / "a.h5", "r+") as file:
            del file["rows/seed"]
            if place == "link":
                file["rows/seed"] = h5py.ExternalLink(str(secret), "/x")
            else:
                file.create_dataset("rows/seed", (2,), "u8", external=[(str(secret), 0, 16)])
        with pytest.raises(IntegrityError, match=r"seed is a link|seed claims more"):
            ImageFile(tmp_path / "a.h5")


def test_what_is_no_plain_file_is_named_and_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "folder.h5").mkdir()
    os.mkfifo(tmp_path / "pipe.h5")
    for name in ("folder.h5", "pipe.h5"):
        with pytest.raises(IntegrityError, match=f"{name}: no plain file"):
            ImageFile(tmp_path / name)
    (tmp_path / "empty.h5").touch()
    with pytest.raises(IntegrityError, match=r"damaged|cut short"):
        ImageFile(tmp_path / "empty.h5")


def test_offsets_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", [b"xxx", b"y"])
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["offsets"][1] = 99
    with pytest.raises(IntegrityError, match="do not fit one another"):
        ImageFile(tmp_path / "a.h5")
