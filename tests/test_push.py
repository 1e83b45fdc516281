"""A release onto the hub: against a small hub of the tests' own, which is at times unwell."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pyarrow.parquet as pq
import pytest
from sdwn.exchange import push
from sdwn.exchange.export import ExportOptions, export
from sdwn.releases.release import Release
from sdwn.wordnet.corpus import WordNet

import drawn
from conftest import OwnProcess, Sdwn, wait_until
from hub import TOKEN, Hub, serving

ZEBRA, CRANE = "n02391049", "n02012849"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, wordnet: WordNet) -> Release:
    """Two classes of ten images, judged."""
    found = drawn.noise_release(tmp_path_factory.mktemp("run"), wordnet, (ZEBRA, CRANE))
    drawn.evaluation(found, drawn.predictions(found))
    return found


@pytest.fixture
def release(made: Release, sdwn: Sdwn) -> Path:
    return Path(shutil.copytree(made.paths.root, sdwn.folder / "release"))


@pytest.fixture(scope="module")
def tars(made: Release, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of it in two files, with its card and table."""
    folder = tmp_path_factory.mktemp("export") / "tars"
    export(made, folder, ExportOptions("webdataset", part_bytes=1))
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this user is logged in to."""
    with serving() as one:
        environment = {"HF_ENDPOINT": one.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        for name, value in {**environment, "HF_HOME": str(tmp_path / "hf")}.items():
            monkeypatch.setenv(name, value)
        # The library has read its environment already.
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", one.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(push, "WAITS", (0, 0, 0))
        yield one


def there(hub: Hub, name: str = "lab/zebras") -> dict[str, bytes]:
    """The files that a data set has now."""
    files = dict(hub.commits[f"datasets/{name}"][hub.main[f"datasets/{name}"]])
    del files[".gitattributes"]
    return files


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_release_is_exported_beside_it_and_pushed_with_its_card(
    sdwn: Sdwn, release: Path, hub: Hub
) -> None:
    found = sdwn.json("push", release, "lab/zebras", "--private")
    folder = Path(found["path"])
    assert folder.parent == release.parent
    assert there(hub) == files_of(folder)
    assert there(hub)["README.md"].startswith(b"---\n")
    assert pq.read_table(folder / "data").num_rows == 20
    assert (found["dataset"], found["private"]) == ("lab/zebras", True)
    assert found["url"] == f"{hub.url}/datasets/lab/zebras"
    assert found["files"] == len(there(hub))
    assert found["commit"] == hub.main["datasets/lab/zebras"]
    sent = len(hub.sent)
    again = sdwn.json("push", release, "lab/zebras")
    assert (again["commit"], len(hub.sent)) == (found["commit"], sent), "nothing is sent twice"


def test_a_release_itself_goes_without_what_tasks_wrote(
    sdwn: Sdwn, release: Path, hub: Hub
) -> None:
    work = release / "evaluations/drawn/work/jobs"
    work.mkdir(parents=True)
    (work / "7_0_log.err").write_text("on a host that is nobody's business")
    (release / ".DS_Store").write_bytes(b"\0")
    sdwn("push", release, "lab/zebras", "--format", "release")
    pushed = there(hub)
    expected = files_of(release)
    assert "evaluations/drawn/predictions.parquet" in pushed
    del expected[".DS_Store"], expected["evaluations/drawn/work/jobs/7_0_log.err"]
    assert pushed == expected


def test_an_export_of_the_users_own_is_pushed_as_it_is(sdwn: Sdwn, tars: Path, hub: Hub) -> None:
    found = sdwn("push", tars, "lab/zebras")
    assert there(hub) == files_of(tars)
    assert f"{hub.url}/datasets/lab/zebras" in found.stdout
    refused = sdwn("push", tars, "lab/zebras", "--format", "parquet", code=2)
    assert "expected a release, or, without --format, a folder that" in refused.stderr


def test_a_busy_hub_is_asked_again(
    sdwn: Sdwn, tars: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # the library's own waits
    asked = ("repos/create", "api/datasets/lab/zebras$", "preupload", "objects/batch", "PUT /lfs")
    hub.faults = [(one, status) for one in (*asked, "/tree/") for status in (429, 500, 503)]
    hub.faults += [("validate-yaml", 429), ("/commit/", 500), ("/commit/", 429)]
    sdwn("push", tars, "lab/zebras")
    assert not hub.faults
    assert there(hub) == files_of(tars)


def test_a_hub_that_stays_busy_is_given_up_by_name(
    sdwn: Sdwn, tars: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.faults = [("/commit/", 429)] * 4
    refused = sdwn("push", tars, "lab/zebras", code=1).stderr
    assert "429" in refused
    assert "the hub does not take it now" in refused
    assert "run the same command again" in refused
    sent = len(hub.sent)
    sdwn("push", tars, "lab/zebras")
    assert there(hub) == files_of(tars)
    assert len(hub.sent) == sent, "it kept what it had got"


@pytest.mark.process
def test_a_push_that_is_killed_resumes(sdwn: Sdwn, tars: Path, hub: Hub) -> None:
    last = max(tars.glob("*.tar")).read_bytes()
    hub.hold = f"PUT /lfs/{hashlib.sha256(last).hexdigest()}"
    process = OwnProcess(sdwn.folder).start("push", tars, "lab/zebras")
    wait_until(lambda: hub.held.is_set() and hub.sent)
    process.kill()
    process.communicate()
    assert not there(hub)
    hub.hold, before = "", list(hub.sent)
    hub.release.set()
    sdwn("push", tars, "lab/zebras")
    assert there(hub) == files_of(tars)
    assert hub.sent.count(before[0]) == 1, "what was there is not sent again"


def test_other_content_is_named_and_only_replaced_when_asked(
    sdwn: Sdwn, tars: Path, hub: Hub
) -> None:
    sdwn("push", tars, "lab/zebras")
    before = there(hub)
    other = shutil.copytree(tars, sdwn.folder / "other")
    (other / "sdwn-000001.tar").unlink()
    (other / "README.md").write_text("---\n---\n")
    refused = sdwn("push", other, "lab/zebras", code=2).stderr
    assert "lab/zebras holds something else: README.md, sdwn-000001.tar" in refused
    assert there(hub) == before
    sdwn("push", other, "lab/zebras", "--replace")
    assert there(hub) == files_of(other)


def test_files_that_arrive_otherwise_are_named(
    sdwn: Sdwn, tars: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub._commit

    def altered(repository: str, files: dict[str, bytes]) -> str:
        return commit(
            repository, {name: text for name, text in files.items() if ".csv" not in name}
        )

    monkeypatch.setattr(hub, "_commit", altered)
    refused = sdwn("push", tars, "lab/zebras", code=1).stderr
    assert "lab/zebras differs from" in refused
    assert ": synsets.csv; upload it again with: --replace" in refused


def test_a_malformed_name_is_refused(sdwn: Sdwn, release: Path, hub: Hub) -> None:
    for name in ("zebras", "lab/zeb ras", "a/b/c", "lab/--", "https://hf.co/lab/z"):
        assert f"{name}: expected ORG/NAME" in sdwn("push", release, name, code=2).stderr
    assert not hub.requests


def test_who_may_not_write_learns_it_before_anything_is_exported(
    sdwn: Sdwn, release: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = ""
    for name, token in {"other/zebras": TOKEN, "lab/zebras": "hf_AnOldTokenOfSomebody"}.items():
        monkeypatch.setenv("HF_TOKEN", token)
        done = sdwn("push", release, name, code=1)
        assert f"{name}: the hub did not take it (40" in done.stderr
        assert "log in with a token that may write there: hf auth login" in done.stderr
        everything += done.stdout + done.stderr
        # The hub's answer has the token; nothing that is printed has.
        assert token not in everything
        assert "TOKEN" in everything
    monkeypatch.delenv("HF_TOKEN")
    assert "log in with: hf auth login" in sdwn("push", release, "lab/zebras", code=2).stderr
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in sdwn("push", release, "lab/zebras", code=2).stderr
    assert [path.name for path in sdwn.folder.iterdir() if path.name != "hf"] == ["release"]
    assert TOKEN.encode() not in b"".join(files_of(sdwn.folder).values())


def test_private_is_never_public(sdwn: Sdwn, tars: Path, hub: Hub) -> None:
    sdwn("push", tars, "lab/zebras")
    refused = sdwn("push", tars, "lab/zebras", "--private", code=2).stderr
    assert "lab/zebras is there and public" in refused


def test_a_damaged_release_is_not_pushed(sdwn: Sdwn, release: Path, hub: Hub) -> None:
    part = release / "images-00000.h5"
    content = bytearray(part.read_bytes())
    content[Release(release).row(3)["offset"] + 5] ^= 1
    part.write_bytes(content)
    for form in ("release", "parquet"):
        refused = sdwn("push", release, "lab/zebras", "--format", form, code=1).stderr
        assert "images-00000.h5" in refused
        assert "is damaged" in refused
    (release / "metadata.parquet").unlink()
    refused = sdwn("push", release, "lab/zebras", code=1).stderr
    assert "not pushed\nmetadata.parquet: missing" in refused
    assert not there(hub)


def test_what_is_no_release_and_no_export_is_not_pushed(sdwn: Sdwn, tars: Path, hub: Hub) -> None:
    (sdwn.folder / "home").mkdir()
    (sdwn.folder / "home/secret").write_text("a key")
    for folder in ("home", "nowhere"):
        refused = sdwn("push", folder, "lab/zebras", code=2).stderr
        assert f"{folder}: expected a release, or" in refused
    assert not hub.requests, "nothing was made there"
    shutil.copytree(tars, sdwn.folder / "export")
    (sdwn.folder / "export/link").symlink_to(sdwn.folder / "home/secret")
    assert "export/link: a link" in sdwn("push", "export", "lab/zebras", code=1).stderr
    assert not there(hub)
