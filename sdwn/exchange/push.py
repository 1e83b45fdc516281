"""Upload of a release, or of an export of it, to a data set of the Hugging Face hub."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdwn import io
from sdwn.errors import IntegrityError, SdwnError, UsageError, first_line, some
from sdwn.exchange.export import ExportOptions, export
from sdwn.paths import ReleasePaths
from sdwn.releases.release import Release

# Seconds before each further attempt; the hub counts a user's requests over five minutes.
WAITS = (10, 60, 300, 300)
# Hidden files, thumbnails of file servers, and what tasks wrote about themselves and their hosts.
IGNORED = (".*", "*/.*", "@*", "*/@*", "evaluations/*/work/*")
SMALL = 10_000_000  # the hub keeps texts of up to 10 MB in git itself


class HubDataset:
    """A data set of the hub that this user may write to; made where it is missing.

    A request is repeated while the hub is busy or cannot be reached; ``on_message`` is told.
    """

    def __init__(
        self, name: str, private: bool = False, on_message: io.OnMessage = io.ignore
    ) -> None:
        from huggingface_hub import HfApi, constants, get_token
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        try:
            if "/" not in name:
                raise ValueError("no user or organization before a slash")
            validate_repo_id(name)
        except ValueError as error:
            raise UsageError(f"{name}: expected ORG/NAME, as lab/zebras: {error}") from None
        if constants.HF_HUB_OFFLINE:
            raise UsageError("HF_HUB_OFFLINE is set, which keeps off the hub; unset it to push")
        if (token := get_token()) is None:
            raise UsageError("not logged in to the hub; log in with: hf auth login")
        self.name, self._token, self._on_message, self._api = name, token, on_message, HfApi()
        self.url = f"{self._api.endpoint}/datasets/{name}"
        self._ask(self._api.create_repo, exist_ok=True, private=private or None)
        self.private = bool(self._ask(self._api.repo_info).private)
        if private and not self.private:
            raise UsageError(f"{name} is there and public; make it private at {self.url}/settings")

    def checksums(self) -> dict[str, str]:
        """Return by name the SHA-256 of its large files, and the SHA-1 of git of its small ones."""
        tree = self._ask(lambda **of: list(self._api.list_repo_tree(**of, recursive=True)))
        files = [one for one in tree if hasattr(one, "blob_id") and one.path != ".gitattributes"]
        return {one.path: one.lfs.sha256 if one.lfs else one.blob_id for one in files}

    def upload(self, folder: Path, replace: bool) -> str:
        """Upload a folder and return the commit; ``replace`` deletes what is no file of it."""
        how: dict[str, Any] = {"folder_path": folder, "commit_message": "Upload with sdwn"}
        how["delete_patterns"] = "*" if replace else None
        return str(self._ask(self._api.upload_folder, ignore_patterns=[*IGNORED], **how).oid)

    def _ask(self, request: Callable[..., Any], **how: Any) -> Any:
        waits = iter(WAITS)
        while True:
            try:
                return request(repo_id=self.name, repo_type="dataset", **how)
            except Exception as error:  # each of the HTTP libraries that hub's has used has its own
                cause = error
                while not hasattr(cause, "response") and isinstance(cause.__cause__, Exception):
                    cause = cause.__cause__
                status = getattr(getattr(cause, "response", None), "status_code", None)
                # A busy hub may answer by a page; not every library's network errors are OSErrors.
                lost = isinstance(cause, OSError | RuntimeError | json.JSONDecodeError)
                lost |= type(cause).__module__.startswith("http")
                said = str(getattr(cause, "server_message", None) or "").partition("\n")[0]
                fault = f"{status}: {said}" if said else first_line(cause)
                fault = fault.replace(self._token, "TOKEN")  # the hub's answer may repeat it
                wait = next(waits, None)
            if wait is None or not (status == 429 or status >= 500 if status else lost):
                advice = "it keeps what it has got: run the same command again"
                if status in (401, 403):
                    advice = "log in with a token that may write there: hf auth login"
                raise SdwnError(f"{self.name}: the hub did not take it ({fault}); {advice}")
            self._on_message(f"the hub does not take it now ({fault}); trying again in {wait} s")
            time.sleep(wait)


def export_to_push(release: Release, form: str, advance: io.Advance = lambda _: None) -> Path:
    """Export a release into a folder beside it, named by its digest, unless it is there."""
    root = release.paths.root
    folder = root.with_name(f"{root.name}-{form}-{release.digest[:8]}")
    if not ReleasePaths(folder).card.exists():
        export(release, folder, ExportOptions(form), advance)
    return folder


def push(folder: Path, hub: HubDataset, replace: bool = False) -> dict[str, Any]:
    """Upload a release or an export, and compare what the hub then lists with its files.

    Of a data set that holds something else nothing is changed, unless ``replace`` is given.
    """
    from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]
    from huggingface_hub.utils.sha import git_hash

    io.refuse_links(folder)
    every = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    sums, size = dict[str, set[str]](), 0
    for name in filter_repo_objects(every, ignore_patterns=[*IGNORED]):
        path, bytes_ = every[name], every[name].stat().st_size
        # Of a small one the hub may list the SHA-1 of git instead.
        sums[name] = {io.file_sha256(path)}
        if bytes_ <= SMALL:
            sums[name].add(git_hash(path.read_bytes()))
        size += bytes_

    def others(there: dict[str, str]) -> list[str]:
        return sorted(name for name, sum_ in there.items() if sum_ not in sums.get(name, ()))

    if (foreign := others(hub.checksums())) and not replace:
        advice = "choose another name, or replace all that it holds with: --replace"
        raise UsageError(f"{hub.name} holds something else: {some(foreign, 5)}; {advice}")
    commit = hub.upload(folder, replace)
    there = hub.checksums()
    if wrong := others(there) + sorted(sums.keys() - there.keys()):
        fault = f"{hub.name} differs from {folder}: {some(wrong, 5)}"
        raise IntegrityError(f"{fault}; upload it again with: --replace")
    found = {"dataset": hub.name, "url": hub.url, "private": hub.private, "commit": commit}
    return {**found, "files": len(sums), "bytes": size, "path": str(folder)}
