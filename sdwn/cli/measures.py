"""The commands that measure a release's images by their features."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.filesize import decimal
from typer import Option

from sdwn.cli import console, options
from sdwn.cli.release import show_submitted
from sdwn.cli.sweep import each_cell
from sdwn.errors import command


@options.with_site
@each_cell
def features_command(
    release: options.ReleaseFolder,
    site: dict[str, str],
    model: Annotated[
        str,
        Option(help="dinov2, efficientnet-lite0, any timm model, clip:FOLDER or clip:ORG/NAME."),
    ] = "dinov2",
    profile: options.MaybeProfile = None,
    wait: options.Wait = False,
    retries: options.Retries = 2,
    as_json: options.AsJson = False,
) -> None:
    """Encode a release's images, for all measures of them.

    One vector an image, kept with the release. The same command resumes after a kill; what is
    encoded stays, also in a release that grows out of this one.
    """
    if profile is None and (site.keys() - {"batch_size"} or wait):
        raise typer.BadParameter("--wait and the profile's options need --profile")
    if profile is None:
        from sdwn.batches import parse_batch_size
        from sdwn.prediction.encode import encode_release
        from sdwn.releases.release import Release

        opened, size = Release(release), None
        if "batch_size" in site:
            size = parse_batch_size(site["batch_size"], "--batch-size")
        with console.progress("encoding", len(opened)) as bar:
            found = encode_release(opened, model, bar.advance, console.say, size)
    else:
        from sdwn.workflow import submitting

        how = submitting.SubmitOptions(wait, retries, command="the same command")
        profiles = submitting.evaluation_profiles(profile, site)
        found = submitting.encode_by_tasks(release, model, profiles, how, console)
    if "work" in found:
        show_submitted(found, as_json, "encoded")
        return
    rows = {
        "features": found["path"],
        "images": f"{found['images']:,}, {found['dimensions']:,} numbers each",
        "size": decimal(found["bytes"]),
    }
    step = command("measure", release, "--features", found["features"])
    console.result(found, as_json, rows, next_=step)
