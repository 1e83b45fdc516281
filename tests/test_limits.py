from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sdwn.config import validated
from sdwn.jobs import limits, scheduler
from sdwn.jobs.profiles import ClusterProfile
from sdwn.jobs.site import Site, site

# What the test cluster's own commands print, with accounts, QOS and partitions as sites have them.
CONFIG = [
    "AccountingStorageEnforce = associations,limits,qos",
    "ClusterName             = testbed",
    "MaxArraySize            = 30",
    "MaxJobCount             = 10000",
    "SLURM_VERSION           = 22.05.8",
]
PARTITIONS = [
    "PartitionName=main AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL Default=YES QoS=N/A "
    "MaxTime=1-00:00:00 Nodes=n[1-4] State=UP JobDefaults=(null) TRES=cpu=8,mem=32000M,node=4",
    "PartitionName=high AllowGroups=ALL AllowAccounts=lab,chem AllowQos=ALL Default=NO QoS=N/A "
    "MaxTime=UNLIMITED Nodes=n[1-4] State=UP JobDefaults=(null) TRES=cpu=8,mem=32000M,node=4",
    "PartitionName=short AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL Default=NO QoS=brief "
    "MaxTime=02:00:00 Nodes=n[1-4] State=DOWN JobDefaults=(null) TRES=cpu=8,mem=32000M,node=4",
]
NODES = [
    "main|idle|2|2|8000|gpu:a100:2",
    "main|drain|2|2|16000|gpu:v100:2(S:0-1)",
    "high|idle|4|2|8000|(null)",
]
QOS = [
    "normal||5|||12:00:00",
    "long|DenyOnLimit,PartitionTimeLimit||9|11|7-00:00:00",
    "brief||4|||",
    "over|OverPartQOS|20|||",
    "free|||||",
]
USER = [
    "testbed|lab|lab|high|3|||long,normal|long",
    "testbed|lab|lab||77|||free,normal,over|free",
    "testbed|lab|root|||||normal|",
    "elsewhere|lab|lab||1|||normal|",
]


def known() -> Site:
    return site(CONFIG, PARTITIONS, NODES, QOS, USER)


def profile(**fields: Any) -> ClusterProfile:
    return validated(ClusterProfile, fields, source="test")


@pytest.mark.parametrize(
    ("fields", "jobs", "source"),
    [
        # An association's limit holds where no QOS sets one.
        ({}, 77, "MaxSubmitJobs of your association with account lab"),
        ({"account": "root"}, 5, "MaxSubmitJobsPerUser of QOS normal"),
        ({"qos": "normal"}, 5, "MaxSubmitJobsPerUser of QOS normal"),
        # A QOS's takes its place, also where it allows more: 9 instead of 3.
        ({"partition": "high"}, 9, "MaxSubmitJobsPerAccount of QOS long"),
        # The partition's QOS comes before the job's, unless that says otherwise.
        ({"partition": "short", "qos": "normal"}, 4, "MaxSubmitJobsPerUser of QOS brief"),
        ({"partition": "short", "qos": "over"}, 20, "MaxSubmitJobsPerUser of QOS over"),
        ({"partition": "main,high"}, 9, "MaxSubmitJobsPerAccount of QOS long"),
        ({"max_submit_jobs": 50}, 50, "max_submit_jobs of the profile"),
        ({"account": "nobody", "qos": "free"}, 10000, "MaxJobCount, of all users together"),
    ],
    ids=str,
)
def test_the_limit_on_jobs_is_the_one_that_slurm_applies(
    fields: dict[str, Any], jobs: int, source: str
) -> None:
    found = limits.limits(known(), profile(**fields))
    assert (found.max_submit_jobs, found.max_submit_source) == (jobs, source)
    assert found.max_array_size == 30


def test_the_longest_time_is_the_partitions_and_the_qoss() -> None:
    def longest(**fields: Any) -> dict[str, int | None]:
        walls = limits.limits(known(), profile(**fields)).walls
        return {name: bound and bound.value for name, bound in walls.items()}

    assert longest(partition="main") == {"main": 24 * 60}
    assert longest(partition="main", qos="normal") == {"main": 12 * 60}
    assert longest(partition="high") == {"high": 7 * 24 * 60}
    assert longest(partition="main,short", qos="long") == {"main": 10080, "short": 10080}
    assert longest(partition="high", qos="free") == {"high": None}


@pytest.mark.parametrize(("size", "tasks"), [("30", 30), ("1", 1), ("0", 1), ("", 1001)])
def test_a_site_without_arrays_gets_single_jobs(size: str, tasks: int) -> None:
    told = site([f"MaxArraySize = {size}"], PARTITIONS, NODES, QOS, USER)
    assert limits.limits(told, profile()).max_array_size == tasks


def test_a_tool_that_hangs_is_given_up(tmp_path: Path) -> None:
    assert scheduler.run(["sleep", "60"], 0.05) is None
    assert scheduler.run([str(tmp_path / "nothing")]) is None
    assert scheduler.run(["false"]) is None
