from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import socket
import struct
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import skimage
from huggingface_hub import DatasetCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from sdwn.browser.collection import Collection
from sdwn.config import EvaluationConfig
from sdwn.errors import IntegrityError, UsageError
from sdwn.evaluation.verify import verify
from sdwn.exchange import import_images as importing
from sdwn.exchange.export import ExportOptions, export
from sdwn.exchange.import_images import (
    FORMATS,
    MOST_BYTES,
    Imported,
    ImportOptions,
    import_images,
    list_source,
)
from sdwn.paths import ReleasePaths
from sdwn.releases.merge import merge
from sdwn.releases.release import Release
from sdwn.reports.report import write_report
from sdwn.storage.images import decode

from conftest import FEW, PlanRun, Sdwn, interrupt_at
from drawn import evaluate

DOG, CAT, CORGI = "n02084071", "n02121620", "n02112826"


def encoded(kind: str, seed: int = 1, size: tuple[int, int] = (16, 8), **options: Any) -> bytes:
    pixels = hashlib.shake_256(str(seed).encode()).digest(3 * size[0] * size[1])
    buffer = io.BytesIO()
    Image.frombytes("RGB", size, pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def take(source: Path, format: str = "imagefolder", **options: Any) -> Imported:
    """Import into a new release, told once of each file, and whole."""
    told: list[int] = []
    target = ReleasePaths(source.parent / "imported")
    shutil.rmtree(target.root, ignore_errors=True)
    folder = list_source(source)
    imported = import_images(folder, target, ImportOptions(format, **options), told.append)
    assert told == [1] * len(folder)
    assert verify(target.root) == []
    assert list(imported.skipped) == sorted(imported.skipped)
    assert imported.release.manifest.skipped == len(imported.skipped)
    assert target.skipped.exists() == bool(imported.skipped)
    return imported


def numbers(imported: Imported) -> dict[str, int]:
    table = imported.release.metadata
    return dict(zip(table["file"].to_pylist(), table["number"].to_pylist(), strict=True))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "pictures"


def test_images_become_a_release_byte_for_byte(source: Path) -> None:
    files = {
        f"{DOG}/rex.jpg": encoded("jpeg", 1),
        f"train/{DOG}/a/b.png": encoded("png", 2),
        f"{CAT}_tom.JPEG": encoded("webp", 3, (5, 7)),
        f"val/{CORGI}/n02084071_x.webp": encoded("webp", 4, lossless=True),
    }
    for name, content in files.items():
        put(source / name, content)
    imported = take(source)
    rows = {row["file"]: row for row in imported.release.metadata.to_pylist()}
    assert {name: imported.release.payload(row) for name, row in rows.items()} == files
    assert [rows[name]["wnid"] for name in files] == [DOG, DOG, CAT, CORGI]
    assert [rows[name]["codec"] for name in files] == ["jpeg", "png", "webp", "webp"]
    assert (rows[f"{CAT}_tom.JPEG"]["width"], rows[f"{CAT}_tom.JPEG"]["height"]) == (5, 7)
    assert {row["status"] for row in rows.values()} == {"unknown"}
    assert imported.skipped == ()
    assert "prompt" not in imported.release.metadata.column_names


def test_a_release_says_that_it_was_imported(source: Path) -> None:
    put(source / DOG / "a.png", encoded("png"))
    put(source / CORGI / "a.png", encoded("png"))
    put(source / CORGI / "b.png", "nothing")
    release = take(source).release
    manifest = release.manifest
    assert (manifest.origin, manifest.catalog) == ("import", "imported from pictures")
    assert (manifest.settings, manifest.plan_digest, manifest.made_on) == (None, None, [])
    assert (manifest.images, manifest.concepts, manifest.imagenet_classes) == (2, 2, 0)
    dog = release.concepts[DOG]
    assert (dog.synset, dog.prompt) == ("dog.n.01", "")
    assert dog.lemmas == "dog, domestic_dog, Canis_familiaris"
    assert dog.definition.startswith("a member of the genus Canis")
    task_run = release.provenance(0)["task_run"]
    assert set(task_run) == {"imported_with", "host", "started"}
    assert "2 imported images of 2 WordNet synsets" in release.paths.card.read_text()


def test_a_black_image_is_known_as_black(source: Path) -> None:
    for name, colour in (("black", (0, 0, 0)), ("nearly", (0, 0, 1))):
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4), colour).save(buffer, "png")
        put(source / DOG / f"{name}.png", buffer.getvalue())
    rows = take(source).release.metadata.to_pylist()
    assert [row["status"] for row in rows] == ["black", "unknown"]


def test_a_wnid_that_wordnet_has_not_is_left_out(source: Path) -> None:
    put(source / DOG / "a.png", encoded("png"))
    put(source / "n99999999" / "a.png", encoded("png"))
    put(source / "n99999999" / "b.png", encoded("png"))
    put(source / "stray.png", encoded("png"))
    reason = "n99999999: no such synset in WordNet 3.0"
    assert take(source).skipped == (
        ("n99999999/a.png", reason),
        ("n99999999/b.png", reason),
        ("stray.png", "it lies in no folder, and its own name starts with no wnid"),
    )


def test_a_folders_name_may_go_on_behind_its_wnid(source: Path) -> None:
    expected = {
        "n02085620-Chihuahua/0001.jpg": "n02085620",
        "n01440764_tench/0001.jpg": "n01440764",
        f"{CAT} cats/old/{DOG}_7.jpg": CAT,
        f"{CAT} cats/{DOG}-dogs/7.jpg": DOG,
    }
    for seed, name in enumerate(expected):
        put(source / name, encoded("jpeg", seed))
    put(source / f"{DOG}7/a.jpg", encoded("jpeg", 9))
    rows = {row["file"]: row for row in take(source).release.metadata.to_pylist()}
    other = rows.pop(f"{DOG}7/a.jpg")
    assert {file: row["wnid"] for file, row in rows.items()} == expected
    assert (other["id"], other["wnid"]) == (f"{DOG}7", None), "a wnid has eight digits"


def test_the_source_may_itself_be_of_one_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / DOG / "a.png", encoded("png"))
    (tmp_path / f"{CAT}-cats").symlink_to(DOG)
    assert take(tmp_path / DOG).release.row(0)["wnid"] == DOG
    assert take(tmp_path / f"{CAT}-cats").release.row(0)["wnid"] == CAT
    monkeypatch.chdir(tmp_path / DOG)
    for here in (".", f"../{DOG}"):
        target = ReleasePaths(tmp_path / f"release-{len(here)}")
        found = import_images(list_source(Path(here)), target, ImportOptions("imagefolder"))
        assert found.release.row(0)["wnid"] == DOG


# Numbers and names


NUMBERED = [
    {"dog_10.png": 10, "dog_9.png": 9, "7.png": 7},
    {"dog-1.png": 1, "dog 2.png": 2, "00003.png": 3},
    {"dog_4294967295.png": 4294967295},
    {"dog_4294967296.png": 0},
    {"a_1.png": 0, "b_01.png": 1},
    {"a_8.png": 0, "b.png": 1},
    {"x7.png": 0},
]


def test_numbers_come_from_the_names(source: Path) -> None:
    expected = {}
    for index, names in enumerate(NUMBERED):
        for seed, (name, number) in enumerate(names.items()):
            put(source / f"class {index}" / name, encoded("png", seed))
            expected[f"class {index}/{name}"] = number
    assert numbers(take(source)) == expected


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.text("ab0_-19 é", min_size=1, max_size=6).filter(str.strip), min_size=1, unique=True
    )
)
def test_numbers_are_distinct_and_every_file_is_told_of(tmp_path: Path, stems: list[str]) -> None:
    source = tmp_path / "pictures"
    shutil.rmtree(source, ignore_errors=True)
    for seed, stem in enumerate(stems):
        put(source / DOG / f"{stem}.png", encoded("png", seed))
    imported = take(source)
    found = numbers(imported)
    assert len(set(found.values())) == len(found)
    assert {*found, *dict(imported.skipped)} == {f"{DOG}/{stem}.png" for stem in stems}


def test_of_files_of_the_same_name_and_bytes_the_first_is_kept(source: Path) -> None:
    for name in ("a/{}/Xyz.png", "b/{}/xyz.jpg", "c/{}/xyz.webp", "c/{}/other.webp"):
        put(source / name.format(DOG), encoded("png"))
    put(source / CAT / "xyz.png", encoded("png"))
    put(source / "a" / DOG / "Xyz.jpg", "no picture")
    imported = take(source)
    kept = f"a/{DOG}/Xyz.png"
    assert set(numbers(imported)) == {kept, f"c/{DOG}/other.webp", f"{CAT}/xyz.png"}
    reason = f"duplicate: {kept} has the same name and bytes"
    assert dict(imported.skipped)[f"b/{DOG}/xyz.jpg"] == reason
    assert dict(imported.skipped)[f"c/{DOG}/xyz.webp"] == reason


def test_other_images_of_the_same_name_are_no_duplicates(source: Path) -> None:
    for seed, split in enumerate(("train", "val")):
        for number in (1, 2):
            put(source / split / DOG / f"img_{number}.png", encoded("png", 10 * seed + number))
    put(source / "val" / DOG / "img_1.jpg", encoded("jpeg"))
    imported = take(source)
    assert imported.skipped == ()
    assert sorted(numbers(imported).values()) == [0, 1, 2, 3, 4]


def test_the_card_says_what_the_user_says_of_the_images(source: Path) -> None:
    put(source / DOG / "a.png", encoded("png"))
    said = {"source": "https://example.org/dogs | 2019", "licence": "cc-by-4.0"}
    target = ReleasePaths(source.parent / "release")
    options = ImportOptions("imagefolder", **said)
    text = import_images(list_source(source), target, options).release.paths.card.read_text()
    assert DatasetCard(text).data.license == "cc-by-4.0"
    assert DatasetCard(text).data.task_categories == ["image-classification"]
    assert "Their source: https://example.org/dogs \\| 2019." in text
    assert "The licence of the images is cc-by-4.0" in text
    assert "| `seed` |" not in text
    assert "| `file` | its name before it was imported |" in text


def test_names_of_any_bytes_are_taken(source: Path) -> None:
    put(source / DOG / "plain.png", encoded("png"))
    for raw in (b"caf\xe9.png", b"line\nbreak.png", "größe.png".encode(), b"bad\xff.gif"):
        path = os.path.join(os.fsencode(source / DOG), raw)  # noqa: PTH118
        Path(os.fsdecode(path)).write_bytes(encoded("gif" if b"gif" in raw else "png"))
    imported = take(source)
    assert f"{DOG}/caf\\xe9.png" in numbers(imported)
    assert f"{DOG}/größe.png" in numbers(imported)
    assert [name for name, _ in imported.skipped] == [f"{DOG}/bad\\xff.gif"]


def test_a_source_of_any_name_is_taken(tmp_path: Path) -> None:
    source = tmp_path / os.fsdecode(b"caf\xe9|`x`")
    put(source / DOG / "a.png", encoded("png"))
    assert take(source).release.manifest.catalog == "imported from caf\\xe9|`x`"


# What is left out


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be large."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + data + chunk(b"IEND", b"")


NO_PICTURE = "expected a JPEG, PNG or WebP image, found none"


BAD = [
    (b"", "empty"),
    (b"I am a text", NO_PICTURE),
    (encoded("bmp"), NO_PICTURE),
    (encoded("gif"), NO_PICTURE),
    (encoded("tiff"), NO_PICTURE),
    (encoded("jpeg")[:10], ""),
    (encoded("jpeg")[:-80], "expected a jpeg image, 16x8: image file is truncated"),
    (encoded("png")[:-80], "expected a png image, 16x8: "),
    (encoded("webp")[:-40], ""),
    (bomb(50_000, 50_000), "Image size (2500000000 pixels) exceeds limit"),
    (bomb(8_001, 8_000), "expected at most 64 million pixels, found 8001x8000"),
    (bomb(0, 9), ""),
]


def test_what_is_no_readable_image_is_left_out(source: Path) -> None:
    put(source / DOG / "good.png", encoded("png"))
    for index, (content, _) in enumerate(BAD):
        put(source / DOG / f"bad-{index:02d}.jpg", content)
    imported = take(source)
    assert numbers(imported) == {f"{DOG}/good.png": 0}
    for index, ((name, found), (_, reason)) in enumerate(zip(imported.skipped, BAD, strict=True)):
        assert name == f"{DOG}/bad-{index:02d}.jpg"
        assert found.startswith(reason)
        assert "\n" not in found
    rows = (source.parent / "imported/skipped.csv").read_text().splitlines()
    assert rows[0] == "file,reason"
    assert len(rows) == 1 + len(BAD)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_damaged_bytes_never_stop_an_import(tmp_path: Path, data: st.DataObject) -> None:
    source = tmp_path / "pictures"
    put(source / DOG / "good.png", encoded("png"))
    for number, kind in enumerate(("jpeg", "png", "webp")):
        content = bytearray(encoded(kind, number))
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        put(source / DOG / f"{kind}.bin", bytes(content))
    imported = take(source)
    assert len(imported.release) + len(imported.skipped) == 4


def test_a_huge_file_is_not_read(source: Path) -> None:
    put(source / DOG / "good.png", encoded("png"))
    huge = put(source / DOG / "huge.png", encoded("png"))
    os.truncate(huge, MOST_BYTES + 1)
    assert take(source).skipped == (
        (f"{DOG}/huge.png", "expected at most 268.4 MB, found 268.4 MB"),
    )


def test_links_are_followed_only_to_files_within(source: Path, tmp_path: Path) -> None:
    good = put(source / DOG / "good.png", encoded("png"))
    outside = put(tmp_path / "elsewhere/secret.png", encoded("png", 2))
    (source / DOG / "again.png").symlink_to(good)
    (source / DOG / "secret.png").symlink_to(outside)
    (source / DOG / "broken.png").symlink_to("nothing.png")
    (source / DOG / "round.png").symlink_to("round.png")
    (source / DOG / "folder").symlink_to(outside.parent)
    (source / DOG / "up").symlink_to("..")
    imported = take(source)
    assert set(numbers(imported)) == {f"{DOG}/good.png", f"{DOG}/again.png"}
    assert imported.skipped == (
        (f"{DOG}/broken.png", "missing"),
        (f"{DOG}/folder", "a link to a folder; --follow-links takes it"),
        (f"{DOG}/round.png", "Too many levels of symbolic links"),
        (f"{DOG}/secret.png", "a link that leaves the folder; --follow-links takes it"),
        (f"{DOG}/up", "a link to a folder; --follow-links takes it"),
    )


def test_links_are_followed_where_asked_and_each_folder_is_read_once(
    source: Path, tmp_path: Path
) -> None:
    put(source / DOG / "good.png", encoded("png"))
    outside = put(tmp_path / "store/dogs/far.png", encoded("png", 2)).parent
    put(outside / "deep/back.png", encoded("png", 3))
    (outside / "deep/round").symlink_to(outside)
    (source / f"{CORGI}-corgis").symlink_to(outside)
    (source / "a").symlink_to(DOG)
    (source / DOG / "up").symlink_to("..")
    (source / DOG / "file.png").symlink_to(put(tmp_path / "one.png", encoded("png", 4)))
    (source / DOG / "broken.png").symlink_to("nothing.png")
    folder = list_source(source, follow_links=True)
    assert len(folder) == 8
    target = ReleasePaths(tmp_path / "release")
    imported = import_images(folder, target, ImportOptions("imagefolder"))
    assert {row["file"]: row["wnid"] for row in imported.release.metadata.to_pylist()} == {
        f"{DOG}/good.png": DOG,
        f"{DOG}/file.png": DOG,
        f"{CORGI}-corgis/far.png": CORGI,
        f"{CORGI}-corgis/deep/back.png": CORGI,
    }
    another = "a link to a folder that has another name here"
    assert dict(imported.skipped) == {
        "a": another,
        f"{DOG}/up": another,
        f"{CORGI}-corgis/deep/round": another,
        f"{DOG}/broken.png": "missing",
    }


def test_pipes_and_sockets_do_not_block(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(source / DOG / "good.png", encoded("png"))
    os.mkfifo(source / DOG / "pipe.png")
    os.mkfifo(source / DOG / "pipe.txt")
    (source / DOG / "link.png").symlink_to("pipe.png")
    monkeypatch.chdir(source / DOG)  # a socket's path has at most 108 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        assert take(source).skipped == (
            (f"{DOG}/link.png", "no plain file"),
            (f"{DOG}/pipe.png", "no plain file"),
            (f"{DOG}/socket.png", "No such device or address"),
        )
        with pytest.raises(UsageError, match=r"pipe\.txt: no plain file"):
            take(source, "folders")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_left_out(source: Path) -> None:
    put(source / DOG / "good.png", encoded("png"))
    put(source / DOG / "mine.png", encoded("png")).chmod(0)
    locked = put(source / CAT / "a.png", encoded("png")).parent
    locked.chmod(0)
    try:
        skipped = take(source).skipped
    finally:
        locked.chmod(0o700)
    assert skipped == ((f"{DOG}/mine.png", "Permission denied"), (CAT, "Permission denied"))


def test_what_belongs_to_systems_is_passed_over(source: Path) -> None:
    put(source / DOG / "good.png", encoded("png"))
    names = [".git/a.png", f"{DOG}/._good.png", ".DS_Store", f"{DOG}/Thumbs.db", "README.md"]
    for name in (*names, "synsets.csv", "meta.json", f"{DOG}/notes.txt"):
        put(source / name, encoded("png"))
    assert len(list_source(source)) == 1
    assert take(source).skipped == ()


def test_folders_of_thumbnails_and_deleted_files_are_ignored_and_said(
    source: Path, sdwn: Sdwn
) -> None:
    put(source / DOG / "good.png", encoded("png"))
    names = [f"{DOG}/@eaDir/good.png/SYNOPHOTO_THUMB_S.jpg", f"{CAT}/@eaDir/a.jpg"]
    names += [f"#recycle/{DOG}/a.jpg", f"$Recycle.Bin/{DOG}_a.jpg", f"__MACOSX/{DOG}/a.jpg"]
    names += [f"lost+found/{DOG}_1.jpg", f".thumbnails/{DOG}.jpg"]
    for seed, name in enumerate(names):
        put(source / name, encoded("jpeg", seed))
    imported = take(source)
    assert (len(imported.release), imported.skipped) == (1, ())
    folders = ("#recycle", "$Recycle.Bin", "__MACOSX", "lost+found", ".thumbnails")
    assert list_source(source).ignored == {"@eaDir": 2, **dict.fromkeys(folders, 1)}
    said = sdwn("import", source, "real", "--format", "imagefolder")
    assert (said.stderr, said.stdout.count("2 @eaDir")) == ("", 1)


def test_the_first_frame_of_an_animation_is_taken(source: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("png", "webp"):
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], lossless=True)
        put(source / DOG / f"{kind}.{kind}", buffer.getvalue())
    release = take(source).release
    assert [release.image(index).getpixel((0, 0)) for index in (0, 1)] == [(255, 0, 0)] * 2


def test_a_cameras_jpeg_of_several_images_is_a_jpeg(source: Path) -> None:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, "mpo", save_all=True, append_images=frames[1:])
    put(source / DOG / "camera.jpg", buffer.getvalue())
    release = take(source).release
    assert Image.open(io.BytesIO(buffer.getvalue())).format == "MPO"
    assert release.row(0)["codec"] == "jpeg"
    assert release.payload(release.row(0)) == buffer.getvalue()


def test_images_of_every_mode_are_taken_or_left_out(source: Path) -> None:
    modes = ("1", "L", "P", "RGBA", "LA", "CMYK", "I;16")
    for mode in modes:
        path = source / DOG / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, (8, 8), 1 if mode in "1LPI;16" else None).save(path)
    assert len(take(source).release) == len(modes)


# The layout of the paper


def labelled(folder: Path, name: str, text: str | bytes, images: Iterable[str]) -> None:
    put(folder / name, text)
    for seed, image in enumerate(images):
        put(folder / image, encoded("png", seed))


DOG_TEXT = f"prompt: a member of the genus Canis\nsynset: dog.n.01\nwnid: {DOG}\n"
CAT_TEXT = f"prompt: feline mammal: a\tcat\nsynset: cat.n.01\nwnid: {CAT}\n"


def test_texts_say_synset_and_prompt(source: Path) -> None:
    labelled(source / "1", "dog.n.01.txt", DOG_TEXT, ["dog.n.01_0.png", "dog.n.01_3.png"])
    labelled(source / "cat", "about.TXT", CAT_TEXT, ["x_8.png", "dog.n.01_9.png"])
    imported = take(source, "folders")
    rows = imported.release.metadata.select(["file", "synset", "number", "prompt"]).to_pylist()
    dog, cat = "a member of the genus Canis", "feline mammal: a\tcat"
    assert sorted(tuple(row.values()) for row in rows) == [
        ("1/dog.n.01_0.png", "dog.n.01", 0, dog),
        ("1/dog.n.01_3.png", "dog.n.01", 3, dog),
        ("cat/dog.n.01_9.png", "cat.n.01", 9, cat),
        ("cat/x_8.png", "cat.n.01", 8, cat),
    ]
    assert imported.release.concepts[CAT].prompt == cat
    assert imported.skipped == ()


def test_texts_in_one_folder_belong_to_images_by_name(source: Path) -> None:
    labelled(source, "dog.n.01.txt", DOG_TEXT, ["dog.n.01_0.png", "dog.n.012.png"])
    labelled(
        source, "cat.n.01.txt", CAT_TEXT, ["cat.n.01-1.png", "cat.n.01 12.png", "cat.n.02_1.png"]
    )
    corgi = f"prompt: p\nsynset: corgi.n.01\nwnid: {CORGI}\n"
    labelled(source, "dog.n.01_1.txt", corgi, ["dog.n.01_1_5.png", "dog.n.01_16.png"])
    imported = take(source, "folders")
    found = {
        row["file"]: (row["synset"], row["number"]) for row in imported.release.metadata.to_pylist()
    }
    assert found == {
        "dog.n.01_0.png": ("dog.n.01", 0),
        "dog.n.012.png": ("dog.n.01", 2),
        "cat.n.01-1.png": ("cat.n.01", 1),
        "cat.n.01 12.png": ("cat.n.01", 12),
        "dog.n.01_1_5.png": ("corgi.n.01", 5),
        "dog.n.01_16.png": ("corgi.n.01", 6),
    }
    assert imported.skipped == (("cat.n.02_1.png", "no text beside it belongs to it"),)


LENIENT = [
    (f"a big dog\ndog.n.01\n{DOG}", "a big dog"),
    (f"{DOG}\tdog.n.01\ta big\tdog", "a big dog"),
    ("a big dog\r\ndog.n.01\r\n".encode("utf-16"), "a big dog"),
    (f"{DOG}_dog\nprompt: a big dog\nsynset: dog.n.01", "a big dog"),
    (f"Prompt: a big dog\r\nSynset: dog.n.01\r\nWNID: {DOG}\r\n", "a big dog"),
    (f"\ufeffwnid = {DOG}\nprompt = a big  dog\nof 12345678 pounds", "a big  dog"),
    ("Synset('dog.n.01')\na big dog", "a big dog"),
    ("02084071\na big dog", "a big dog"),
    ("prompt: a big dog\ndog.n.01", "a big dog"),
    ("synset: dog.n.01\nprompt: like cat.n.01", "like cat.n.01"),
    ("domestic_dog.n.01", ""),
]


def test_texts_are_read_leniently(source: Path) -> None:
    for index, (text, _) in enumerate(LENIENT):
        labelled(source / f"{index:02d}", "any.txt", text, ["a.png"])
        put(source / f"{index:02d}" / "a.png", encoded("png", index))
    rows = {row["file"]: row for row in take(source, "folders").release.metadata.to_pylist()}
    for index, (_, prompt) in enumerate(LENIENT):
        row = rows[f"{index:02d}/a.png"]
        assert (row["wnid"], row["synset"], row["prompt"]) == (DOG, "dog.n.01", prompt)


UNCLEAR: list[tuple[Any, str]] = [
    (f"p\ncat.n.01\n{DOG}", "expected one synset, found several"),
    (f"p\ndog.n.01\n{DOG}\n{CAT}", "expected one synset, found several"),
    ("prompt: p\nsynset: cat.n.01\nsynset: dog.n.01", "expected one synset, found several"),
    ("p\ndog.n.01\n02121620", "expected one synset, found several"),
    ("p\ndogg.n.01\nn02084071", "dogg.n.01: no such synset in WordNet 3.0"),
    ("p\nn00000009", "n00000009: no such synset in WordNet 3.0"),
    ("a dog", "expected a synset such as dog.n.01 or a wnid such as n02084071"),
    ("prompt: dog.n.01\nwnid: \n", "expected a synset such as"),
    ("dog.n.00", "expected a synset such as"),
    (b"\xff\xfed\x00o\x00g", "expected UTF-8 text without zero bytes"),
    ("dog.n.01\0", "expected UTF-8 text without zero bytes"),
    (".n." + "a" * 65_000, "expected a synset such as"),  # at once, not in minutes
    ("dog.n.01 " * 10_000, "expected at most 65.5 kB, found 90.0 kB"),
    (b"", "empty"),
]


def test_texts_that_do_not_say_it_are_named(source: Path) -> None:
    labelled(source / "cat", "cat.txt", CAT_TEXT, ["cat_1.png"])
    for index, (text, _) in enumerate(UNCLEAR):
        labelled(source / f"dog.n.01-{index:02d}", "any.txt", text, ["1.png", "2.png"])
    skipped = dict(take(source, "folders").skipped)
    assert len(skipped) == 2 * len(UNCLEAR)
    for index, (_, reason) in enumerate(UNCLEAR):
        folder = f"dog.n.01-{index:02d}"
        for name in ("1.png", "2.png"):
            assert skipped[f"{folder}/{name}"].startswith(f"{folder}/any.txt: {reason}")


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.one_of(st.binary(), st.text("dog.n01 '/-:=\n\r\0\u2028é")))
def test_texts_of_any_content_never_stop_an_import(tmp_path: Path, text: Any) -> None:
    source = tmp_path / "pictures"
    labelled(source / "cat", "cat.txt", CAT_TEXT, ["cat_1.png"])
    labelled(source / "any", "any.txt", text, ["1.png"])
    imported = take(source, "folders")
    assert len(imported.release) + len(imported.skipped) == 2


@pytest.mark.parametrize("text", ["NFC", "NFD"])
def test_a_name_is_the_same_however_its_accents_are_written(source: Path, text: Any) -> None:
    other = "NFD" if text == "NFC" else "NFC"
    name, images = (unicodedata.normalize(form, "café") for form in (text, other))
    labelled(source, f"{name}.txt", DOG_TEXT, [f"{images}_4.png", f"{name}_7.png"])
    labelled(source, "cat.txt", CAT_TEXT, ["cat_1.png"])
    imported = take(source, "folders")
    assert imported.skipped == ()
    found = {f"{images}_4.png": 4, f"{name}_7.png": 7, "cat_1.png": 1}
    assert numbers(imported) == found


def test_a_folders_name_says_nothing(source: Path) -> None:
    labelled(source / "cat", "cat.txt", CAT_TEXT, ["cat_1.png"])
    put(source / "dog.n.01" / "dog.n.01_0.png", encoded("png"))
    put(source / DOG / "1.png", encoded("png"))
    reason = "no text beside it belongs to it"
    assert take(source, "folders").skipped == (
        ("dog.n.01/dog.n.01_0.png", reason),
        (f"{DOG}/1.png", reason),
    )


def test_texts_of_one_synset_each_keep_their_images_and_prompt(source: Path) -> None:
    labelled(source / "a", "dog.txt", DOG_TEXT.replace("prompt: a", "prompt: first, a"), ["1.png"])
    labelled(source / "b", "dog.txt", DOG_TEXT, ["2.png", "3.png"])
    put(source / "0" / "dog.txt", DOG_TEXT)  # of no image
    imported = take(source, "folders")
    prompts = {row["file"]: row["prompt"] for row in imported.release.metadata.to_pylist()}
    told = "a member of the genus Canis"
    assert prompts == {"a/1.png": f"first, {told}", "b/2.png": told, "b/3.png": told}
    assert imported.release.concepts[DOG].prompt == f"first, {told}"
    assert imported.skipped == ()


def test_a_text_that_leaves_the_source_is_not_read(source: Path, tmp_path: Path) -> None:
    labelled(source / "cat", "cat.txt", CAT_TEXT, ["cat_1.png"])
    put(source / "dog/1.png", encoded("png"))
    (source / "dog/dog.txt").symlink_to(put(tmp_path / "secret.txt", DOG_TEXT))
    assert take(source, "folders").skipped == (
        ("dog/1.png", "dog/dog.txt: a link that leaves the folder; --follow-links takes it"),
    )


@pytest.mark.parametrize("format", FORMATS)
def test_what_was_exported_comes_back(generated: PlanRun, format: str) -> None:
    paths, plan = generated(catalog=FEW, storage={"codec": "png"})
    release = merge([paths], ReleasePaths(paths.root / "release"))
    export(release, paths.root / "export", ExportOptions(format))
    imported = take(paths.root / "export", format)
    assert imported.skipped == ()
    columns = ["wnid", "synset", "number", "sha256", "imagenet_class"]
    columns += ["prompt"] if format == "folders" else []
    order = [("wnid", "ascending"), ("number", "ascending")]
    found = imported.release.metadata.select(columns).sort_by(order)
    assert found.equals(release.metadata.select(columns).sort_by(order))
    assert len(imported.release) == plan.images


# Refusals, kills, and what is done with it


def refused(source: Path, target: Path, format: str = "imagefolder") -> str:
    with pytest.raises(UsageError) as error:
        import_images(list_source(source), ReleasePaths(target), ImportOptions(format))
    assert not list(target.parent.glob(f".{target.name}*"))
    return str(error.value)


def test_impossible_imports_are_refused(source: Path, tmp_path: Path) -> None:
    put(source / DOG / "a.png", encoded("png"))
    target = tmp_path / "release"
    assert "expected a folder of images" in refused(tmp_path / "nothing", target)
    assert "expected a folder of images" in refused(source / DOG / "a.png", target)
    assert "choose another folder" in refused(source, source / "release")
    assert "choose another folder" in refused(source, source)
    (tmp_path / "link").symlink_to(source)
    assert "choose another folder" in refused(source, tmp_path / "link/release")
    with pytest.raises(UsageError, match="expected a folder of images"):
        list_source(tmp_path / "nothing")
    take(source)
    assert "found other files" in refused(source, tmp_path / "imported")


def test_a_source_without_a_readable_image_is_refused(source: Path, tmp_path: Path) -> None:
    for number in range(7):
        put(source / DOG / f"{number}.png", "nothing")
    message = refused(source, tmp_path / "release")
    assert "expected images with labels, found none that is readable" in message
    assert f"{DOG}/4.png: {NO_PICTURE}\nand 2 more" in message
    (tmp_path / "void").mkdir()
    assert "found none that is readable" in refused(tmp_path / "void", tmp_path / "release")


def test_an_interrupted_import_leaves_nothing(source: Path, tmp_path: Path) -> None:
    for number in range(9):
        put(source / DOG / f"{number}.png", encoded("png", number))
    target = ReleasePaths(tmp_path / "release")
    with pytest.raises(KeyboardInterrupt):
        import_images(list_source(source), target, ImportOptions("imagefolder"), interrupt_at(4))
    assert {path.name for path in tmp_path.iterdir()} == {"pictures"}
    imported = import_images(list_source(source), target, ImportOptions("imagefolder"))
    assert len(imported.release) == 9


SYNSETS = ("n02084071", "n02112497", "n02121620", "n02123045", "n02127482")


def classes(source: Path) -> list[Path]:
    return [
        put(source / wnid / f"{number}.png", encoded("png", int(wnid[1:]) + number))
        for wnid in SYNSETS
        for number in range(3)
    ]


def test_parts_are_whole_synsets(source: Path) -> None:
    files = classes(source)
    one = sum(path.stat().st_size for path in files[:3])
    release = take(source, part_bytes=one + 1).release
    parts: dict[str, Counter[str]] = {}
    for row in release.metadata.to_pylist():
        parts.setdefault(row["part"], Counter())[row["wnid"]] += 1
    assert [set(count.values()) for count in parts.values()] == [{3}, {3}]
    assert [wnid for count in parts.values() for wnid in count] == list(SYNSETS)
    assert len(take(source, part_bytes=1).release.metadata["part"].unique()) == len(SYNSETS)


@pytest.mark.parametrize("vanishes", [False, True])
def test_an_import_goes_on_after_a_file_changed(
    source: Path, tmp_path: Path, vanishes: bool
) -> None:
    files = classes(source)
    target, whole, told = ReleasePaths(tmp_path / "release"), files[10].read_bytes(), list[int]()

    def disturb(count: int) -> None:
        told.append(count)
        if len(told) == len(files):
            files[10].unlink() if vanishes else files[10].write_bytes(whole + b"more")

    with pytest.raises(IntegrityError, match=r"1\.png: changed while it was imported; run it"):
        import_images(list_source(source), target, ImportOptions("imagefolder", 1), disturb)
    unfinished = tmp_path / ".release.unfinished"
    kept = {path.name: path.stat().st_ino for path in unfinished.glob("images-*.h5")}
    assert len(kept) == 3
    files[10].write_bytes(whole)
    imported = import_images(list_source(source), target, ImportOptions("imagefolder", 1))
    found = {path.name: path.stat().st_ino for path in target.root.glob("images-0000[012].h5")}
    assert found == kept, "finished parts are not written again"
    assert verify(target.root) == []
    assert (len(imported.release), imported.skipped) == (15, ())


def test_a_part_is_made_again_if_its_text_changed(source: Path, tmp_path: Path) -> None:
    labelled(source / "a", "cat.txt", CAT_TEXT, ["1.png", "2.png"])
    labelled(source / "b", "dog.txt", DOG_TEXT, ["3.png"])
    target, told = ReleasePaths(tmp_path / "release"), list[int]()

    def disturb(count: int) -> None:
        told.append(count)
        if len(told) == 3:
            put(source / "a/2.png", encoded("png", 99))

    with pytest.raises(IntegrityError):
        import_images(list_source(source), target, ImportOptions("folders", 1), disturb)
    put(source / "b/dog.txt", DOG_TEXT.replace("Canis", "dogs"))
    release = import_images(list_source(source), target, ImportOptions("folders", 1)).release
    assert release.rows("dog")[0]["prompt"] == "a member of the genus dogs"
    assert verify(target.root) == []


def test_a_file_that_vanishes_before_it_is_read_is_left_out(source: Path, tmp_path: Path) -> None:
    put(source / DOG / "good.png", encoded("png"))
    bad = put(source / DOG / "zzz.png", encoded("png"))
    put(source / "stray.png", encoded("png"))

    def vanish(_: int) -> None:
        bad.unlink(missing_ok=True)  # told of the stray one first, before any is read

    target = ReleasePaths(tmp_path / "release")
    imported = import_images(list_source(source), target, ImportOptions("imagefolder"), vanish)
    assert dict(imported.skipped)[f"{DOG}/zzz.png"] == "missing"


def test_an_import_is_judged_and_reported(source: Path) -> None:
    photographs = {"coffee.png": "n07920052", "rocket.jpg": "n03773504", "camera.png": "n04485082"}
    for name, wnid in photographs.items():
        put(source / wnid / name, (Path(skimage.__file__).parent / "data" / name).read_bytes())
    put(source / DOG / "of-no-class.png", encoded("png"))
    put(source / "n07920052" / "black.png", bytes_of_black())
    release = take(source).release
    assert release.manifest.imagenet_classes == 3
    figures = evaluate(release, EvaluationConfig(model="efficientnet-lite0"))
    assert (figures["images"], figures["classes"], figures["black_images"]) == (4, 3, 1)
    assert figures["top1_percent"] == 75
    page = write_report(release).read_text()
    assert "imported from pictures" in page
    assert verify(release.paths.root) == []
    table = pq.read_table(release.paths.evaluation("efficientnet-lite0").predictions)
    assert Counter(table["status"].to_pylist()) == {"unknown": 3, "black": 1}
    assert isinstance(Release(release.paths.root).provenance(0)["task_run"], dict)
    assert json.loads(release.paths.manifest.read_text())["origin"] == "import"


def bytes_of_black() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "png")
    return buffer.getvalue()


def test_grey_of_16_bits_keeps_its_shades(source: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    (source / DOG).mkdir(parents=True)
    Image.fromarray(ramp).save(source / DOG / "ramp.png")
    grey = take(source).release.array(0)[..., 0]
    assert np.array_equal(grey, ramp >> 8)


# As they are stored, and as a person sees them


def turned(kind: str, orientation: int) -> bytes:
    """An image with a red upper edge when it is turned as its EXIF orientation says."""
    upright = Image.new("RGB", (48, 32), "white")
    upright.paste("red", (0, 0, 48, 8))
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(back[orientation]) if orientation in back else upright
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x112] = orientation
    stored.save(buffer, kind, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_images_are_upright_wherever_they_are_decoded(
    source: Path, tmp_path: Path, kind: str
) -> None:
    for orientation in range(10):
        put(source / DOG / f"{orientation}.{kind}", turned(kind, orientation))
    release = take(source).release
    export(release, tmp_path / "anew", ExportOptions("imagefolder", "jpeg", 90))
    small = Collection(release)
    for index, row in enumerate(release.metadata.to_pylist()):
        assert release.payload(row) == turned(kind, row["number"])
        assert (row["width"], row["height"]) == (48, 32)
        with Image.open(tmp_path / "anew" / DOG / f"{DOG}_{row['number']}.jpg") as exported:
            assert exported.getexif() == {}
            drawn = Image.open(io.BytesIO(small.thumbnail(index, 192)))
            for shown in (release.image(index), exported, drawn):
                assert shown.size == (48, 32)
                red, green, _ = shown.convert("RGB").getpixel((24, 3))
                assert (red > 200, green < 60) == (True, True), row["number"]


def test_a_release_that_recorded_the_size_as_stored_is_whole_and_upright(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(source / DOG / "6.jpg", turned("jpeg", 6))
    with monkeypatch.context() as earlier:
        earlier.setattr(importing, "decode", lambda _payload, _codec, *size: Image.new("RGB", size))
        release = take(source).release
    assert (release.row(0)["width"], release.row(0)["height"]) == (32, 48)
    assert release.image(0).size == (48, 32)
    export(release, tmp_path / "anew", ExportOptions("parquet", "png"))
    [row] = pq.read_table(next((tmp_path / "anew").glob("**/*.parquet"))).to_pylist()
    assert (row["width"], row["height"]) == (48, 32)
    assert Image.open(io.BytesIO(row["image"]["bytes"])).size == (48, 32)


def test_imports_that_recorded_the_size_as_stored_are_still_read(source: Path) -> None:
    put(source / DOG / "6.jpg", turned("jpeg", 6))
    release = take(source).release
    payload = release.payload(release.row(0))
    for size in ((32, 48), (48, 32)):
        assert decode(payload, "jpeg", *size).size == (48, 32)
    for size in ((48, 48), (8, 6)):
        with pytest.raises(IntegrityError, match="it is "):
            decode(payload, "jpeg", *size)
    with pytest.raises(IntegrityError, match="it is 48x32"):
        decode(turned("jpeg", 3), "jpeg", 32, 48)


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=60))
def test_damaged_exif_turns_nothing(exif: bytes) -> None:
    pixels = Image.new("RGB", (6, 4), "red")
    for kind in ("jpeg", "png", "webp"):
        buffer = io.BytesIO()
        pixels.save(buffer, kind, exif=b"Exif\0\0MM\0*" + exif)
        assert decode(buffer.getvalue(), kind, 6, 4).size in ((6, 4), (4, 6))


def test_large_texts_in_an_image_do_no_harm(source: Path) -> None:
    plain, packed = encoded("png"), zlib.compress(bytes(3 * 2**20))
    heads = {b"zTXt": b"k\0\0", b"iTXt": b"k\0\1\0\0\0", b"iCCP": b"k\0\0", b"tEXt": b"k\0"}
    for kind, head in heads.items():
        data = kind + head + packed * (1 if kind != b"tEXt" else 30_000)
        chunk = struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
        for name, place in (("before", 33), ("behind", len(plain) - 12)):
            put(source / DOG / f"{kind!r}{name}.png", plain[:place] + chunk + plain[place:])
    imported = take(source)
    assert imported.skipped == ()
    expected = np.asarray(Image.open(io.BytesIO(plain)))
    for index in range(8):
        assert np.array_equal(imported.release.array(index), expected)


def test_tars_of_several_kinds_of_images_are_told_and_others_load_in_datasets(
    sdwn: Sdwn, tmp_path: Path
) -> None:
    """Datasets refuses a tar whose first samples do not have the same files."""
    import datasets

    for number, kind in enumerate(("png", "jpeg", "webp")):
        put(sdwn.folder / f"mixed/{DOG}/{number}.{kind}", encoded(kind, number))
    sdwn("import", "mixed", "real", "--format", "imagefolder")
    told = sdwn("export", "real", "as-they-are", "--format", "webdataset").stderr
    assert "of several kinds (jpeg, png, webp)" in told
    told = sdwn("export", "real", "alike", "--format", "webdataset", "--codec", "png").stderr
    assert "several kinds" not in told

    def loaded(name: str) -> int:
        path = str(sdwn.folder / name)
        return len(datasets.load_dataset(path, cache_dir=str(tmp_path / "cache"), split="train"))

    assert loaded("alike") == 3
    with pytest.raises(ValueError, match="don't share"):
        loaded("as-they-are")
