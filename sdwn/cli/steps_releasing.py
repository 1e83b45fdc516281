"""Making a release, holding it against its record, making an image of it again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdwn.cli import terminal
from sdwn.errors import UsageError

if TYPE_CHECKING:
    from sdwn.generation.regenerate import Comparison, Wanted
    from sdwn.releases.merge import MergeOptions


def merge_runs(
    runs: list[Path], release: Path, options: MergeOptions | None = None
) -> dict[str, Any]:
    """Merge runs into a release."""
    from sdwn.paths import ReleasePaths, RunPaths
    from sdwn.planning.plan import differing, read_plan
    from sdwn.releases.merge import MergeOptions, merge, merged_summary

    paths = [RunPaths(run) for run in runs]
    first, *others = [read_plan(path).config.evaluation.model_dump(mode="json") for path in paths]
    for path, other in zip(paths[1:], others, strict=True):
        if told := differing(first, other, (f"in {runs[0]}", f"in {path.root}")):
            terminal.say(
                f"the runs' evaluations have other settings ({'; '.join(told)}); the release takes "
                f"those of {runs[0]}"
            )
    with terminal.progress("merge", read_plan(paths[0]).images, unit="images") as advance:
        merged = merge(paths, ReleasePaths(release), options or MergeOptions(), advance)
    return merged_summary(merged)


def verify_release(release: Path, quick: bool) -> dict[str, Any]:
    """Hold a release against its own record."""
    from sdwn.evaluation.verify import verify
    from sdwn.io import strays
    from sdwn.releases.release import Release

    opened = Release(release)
    with terminal.progress("verify", opened.manifest.bytes, unit="bytes") as advance:
        problems = verify(release, quick, advance)
    left = [str(path.relative_to(opened.paths.root)) for path in strays(opened.paths.root)]
    found = {"images": len(opened), "ok": not problems, "problems": problems}
    return {**found, "left_by_desktop_or_server": left}


def require_savable(save: Path, release: Path, endings: Sequence[str]) -> None:
    """Refuse a place for a file that is none, lies in the release, or names another format."""
    if save.suffix.lower() not in endings:
        valid = " or ".join(endings)
        raise UsageError(f"--save {save}: expected a file name that ends in {valid}")
    if not save.parent.is_dir():
        raise UsageError(f"--save {save}: expected a file in a folder that exists")
    if save.is_symlink() or (save.exists() and not save.is_file()):
        raise UsageError(f"--save {save}: expected a file or nothing there, found something else")
    if release.resolve() in save.resolve().parents:
        raise UsageError(f"--save {save}: it lies in the release; choose another place")


def regenerated(release: Path, wanted: Wanted, save: Path | None) -> Comparison:
    """Make an image again, and compare."""
    from sdwn.generation.regenerate import regenerate
    from sdwn.io import atomic
    from sdwn.releases.release import Release

    if save is not None:
        require_savable(save, release, (".png",))
    with terminal.working("making the image again"):
        found, image = regenerate(Release(release), wanted)
    if save is not None:
        with atomic(save) as temporary:
            image.save(temporary, "PNG")
    return found
