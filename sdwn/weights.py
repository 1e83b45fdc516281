"""Where a model's weights lie: a stand-in, to be replaced."""

from __future__ import annotations

import os
from pathlib import Path

from sdwn.config import RunConfig


def locate(config: RunConfig) -> Path | None:
    """Find the folder of a config's weights, without the network; None where it is not whole."""
    folder = Path(config.model.name).expanduser()
    if (folder / "model_index.json").is_file():
        return folder
    home = os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface"
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    snapshots = hub / f"models--{config.model.name.replace('/', '--')}" / "snapshots"
    found = (path.parent for path in sorted(snapshots.glob("*/model_index.json")))
    return next(found, None)
