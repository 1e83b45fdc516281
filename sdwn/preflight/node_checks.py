"""What a compute node says of itself, held against what a run needs there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.filesize import decimal

import sdwn
from sdwn.jobs.cluster import gives_gpu
from sdwn.jobs.profile import ClusterProfile
from sdwn.models.weights import is_hub_name
from sdwn.planning.plan import Plan
from sdwn.preflight.findings import Finding, ok, problem, warning
from sdwn.preflight.probe import FINE, NO_LOCKS, NodeReport


def check_node(report: NodeReport, plan: Plan, profile: ClusterProfile) -> list[Finding]:
    """Hold a node's answer against a run."""
    return [
        *_python(report),
        *_device(report, plan, profile),
        ok("run folder", f"{report.node} sees it, writes to it and renames there"),
        _weights(report, plan),
        *_classifier(report, plan),
        _locks(report),
        _cache(report),
    ]


def with_node(found: Sequence[Finding], node: Sequence[Finding]) -> list[Finding]:
    """Put a node's answers in the place of what was found without it."""
    answered = {finding.subject for finding in node}
    return [*(finding for finding in found if finding.subject not in answered), *node]


def _python(report: NodeReport) -> Iterator[Finding]:
    text = f"{report.node}: Python {report.python_version} ({report.python}), sdwn {report.sdwn}"
    memory = f"{report.cpus} CPUs, {decimal(report.memory_bytes)} of memory free"
    if report.missing:
        missing = ", ".join(report.missing)
        yield problem("node", f"{text}, but no {missing}; install them there, or set python, setup")
    elif (report.sdwn, Path(report.code)) != (sdwn.__version__, Path(sdwn.__file__).parent):
        here = f"{sdwn.__version__} in {Path(sdwn.__file__).parent}"
        yield warning("node", f"{text} in {report.code}; here it is {here}; {memory}")
    else:
        yield ok("node", f"{text}; {memory}")


def _device(report: NodeReport, plan: Plan, profile: ClusterProfile) -> Iterator[Finding]:
    device = report.device
    if device == "cpu" and (plan.config.needs_gpu or gives_gpu(profile)):
        verdict = problem if plan.config.needs_gpu else warning
        seen = f"though nvidia-smi lists {report.gpus[0]}" if report.gpus else "nor does nvidia-smi"
        text = f"a GPU is asked for and torch on {report.node} sees none, {seen}: tasks would work "
        text += "on the CPU, many times slower; install a torch built for its CUDA"
        yield verdict("device", f"{text}, or load its modules in setup")
    elif device is not None:
        yield ok("device", f"torch on {report.node} has {device}")


def _weights(report: NodeReport, plan: Plan) -> Finding:
    if report.weights is not None:
        return ok("weights", f"{report.node} finds {report.weights}")
    verdict = problem if report.offline or not is_hub_name(plan.config.model) else warning
    return verdict(
        "weights",
        f"{report.node} does not find {plan.config.model.name}; put it into a folder or a cache "
        "that nodes share (HF_HOME): sdwn prefetch CONFIG",
    )


def _classifier(report: NodeReport, plan: Plan) -> Iterator[Finding]:
    if report.classifier:
        yield ok("classifier", f"{report.node} finds {report.classifier}")
    elif report.classifier is not None:
        chosen = plan.config.evaluation
        advice = "put its weights into a cache that nodes share (HF_HOME, TORCH_HOME): sdwn "
        advice += "prefetch RUN"
        if chosen.checkpoint:
            advice = f"put {chosen.checkpoint} into a folder that nodes share"
        text = f"{report.node} cannot load {chosen.model}, which evaluates the release"
        yield warning("classifier", f"{text}; {advice}")


def _locks(report: NodeReport) -> Finding:
    if report.hdf5 == FINE:
        return ok("locks", f"{report.node} writes and reads HDF5 files in the run folder")
    if report.hdf5 == NO_LOCKS:
        return problem(
            "locks",
            f"{report.node} opens HDF5 files only without locks; set "
            'HDF5_USE_FILE_LOCKING: "FALSE" in the profile\'s environment',
        )
    return problem("locks", f"{report.node} cannot write HDF5 files there: {report.hdf5}")


def _cache(report: NodeReport) -> Finding:
    if report.cache_fault:
        return warning("cache", f"{report.node}: {report.cache_fault}")
    if report.cache_seen:
        return ok("cache", f"{report.node} sees this machine's, in {report.cache}")
    return warning(
        "cache",
        f"{report.node} has another one in {report.cache}, without what is tuned or prefetched "
        "here; set SDWN_CACHE to a shared folder, here and in the profile's environment",
    )
