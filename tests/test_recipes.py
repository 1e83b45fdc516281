"""The recipes of the cluster guide: each of its profiles, as far as a test cluster can tell."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from sdwn.jobs.profile import ClusterProfile, LaterStage, job_script, load_profile, stage_profile

from conftest import REPOSITORY, Testbed

PROFILES = sorted((REPOSITORY / "slurm/profiles").glob("*.yaml"))
# What a site calls its own: the test cluster has other names, and two GPUs a node.
OWN: dict[str, Any] = {"account": "lab", "partition": "main", "qos": None, "constraint": None}


def recipes() -> dict[str, str]:
    """The guide's table of recipes: profile and site."""
    guide = (REPOSITORY / "slurm/README.md").read_text()
    table = guide.partition("## Recipes")[2].partition("\n## ")[0]
    return {name: site for site, name in re.findall(r"^\| (.+?) \| `([a-z0-9-]+)` \|", table, re.M)}


def test_each_recipe_has_its_profile_and_each_profile_its_recipe() -> None:
    assert set(recipes()) == {path.stem for path in PROFILES}


def here(profile: ClusterProfile) -> ClusterProfile:
    """The same request, in the test cluster's words."""
    gpus = min(2, profile.processes)
    request = {"gpus_per_node": f"a100:{gpus}", "gres": None} if profile.gpu_request else {}
    small = {"mem": "2G", "mem_per_cpu": None, "cpus_per_task": 1}
    return profile.model_copy(update={**OWN, **request, **small})


@pytest.mark.slurm
@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_slurm_takes_each_recipes_script(testbed: Testbed, path: Path, tmp_path: Path) -> None:
    """All stages' options, environment and shell lines, but for the site's own names."""
    profile = load_profile(str(path))
    stages: tuple[LaterStage, ...] = ("merge", "evaluate", "report")
    if profile.executor == "local":
        assert job_script(3, tmp_path, profile)
        return
    for site, tasks in [(profile, 3), *((stage_profile(profile, stage), 1) for stage in stages)]:
        text = job_script(tasks, tmp_path, here(site))
        (tmp_path / "job.sh").write_text(text)
        subprocess.run(["bash", "-n", tmp_path / "job.sh"], check=True)
        done = subprocess.run(
            ["sbatch", "--test-only", tmp_path / "job.sh"],
            check=False,
            capture_output=True,
            text=True,
        )
        assert "to start at" in done.stderr, done.stderr


def test_what_the_recipes_are_for() -> None:
    """The options that make each recipe what its name says."""
    by_name = {path.stem: load_profile(str(path)) for path in PROFILES}
    assert by_name["a100"].processes == 1
    assert by_name["whole-node"].processes == 4
    assert by_name["preemptible-signal"].max_num_timeout > by_name["preemptible"].max_num_timeout
    assert by_name["no-accounting"].max_submit_jobs
    assert by_name["no-accounting"].account is None
    assert by_name["mixed"].gpu_kind is None
    assert by_name["offline"].environment["HF_HUB_OFFLINE"] == "1"
    assert "apptainer exec" in (by_name["container"].python or "")
    text = job_script(2, Path("jobs"), by_name["container"])
    assert "apptainer exec --nv --bind /project:/project" in text
    assert "submitit.core._submit" in text.partition("apptainer exec")[2]
