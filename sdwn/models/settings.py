"""Whether a pipeline takes what a config asks of it: its scheduler and its safety checker."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from sdwn.config import RunConfig
from sdwn.errors import UsageError
from sdwn.io import read_json
from sdwn.models.weights import INDEX, components, is_elsewhere, locate, located, source

# Any of these stands in for any other, which is known without diffusers' import of seconds.
_INTERCHANGEABLE = {
    f"{name}Scheduler"
    for name in (
        *("DDIM", "DDPM", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep"),
        *("EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete"),
        *("KDPM2Discrete", "LMSDiscrete", "PNDM", "UniPCMultistep"),
    )
}
# Its steps draw noise for the batch as a whole, out of no image's generator.
_UNREPEATABLE = {"DPMSolverSDEScheduler"}


def require_scheduler(name: str, own: Any, pipeline: str) -> None:
    """Refuse a scheduler that cannot stand in for a pipeline's own.

    Raises:
        UsageError: it is none, it is of another family, or what it draws cannot be repeated.
    """
    kinds = {kind.__name__ for kind in getattr(own, "compatibles", ())}
    valid = (kinds | {type(own).__name__}) - _UNREPEATABLE
    if name not in valid:
        raise UsageError(
            f"generation.scheduler: {name} does not fit {pipeline}; "
            f"valid: {', '.join(sorted(valid))}"
        )


def require_safety_checker(config: RunConfig, *, there: bool) -> None:
    """Refuse a config that asks for a safety checker where there is none.

    Raises:
        UsageError: the model has none.
    """
    if config.generation.safety_checker and not there:
        raise UsageError(
            f"generation.safety_checker is true, but model {config.model.name} has none; "
            "plan with --set generation.safety_checker=false"
        )


def require_usable(config: RunConfig) -> None:
    """Refuse a model that no task could load, and settings that it does not take.

    Weights that are not on this machine are no reason, for they may be fetched later.

    Raises:
        UsageError: no model has this name, or it does not take the scheduler or safety checker.
        IntegrityError: a part of the model is missing in its folder.
    """
    if is_elsewhere(config.model):
        check_settings(config, None)
    else:
        here = source(config.model) == "folder"
        check_settings(config, located(config) if here else locate(config))


def check_settings(config: RunConfig, folder: Path | None) -> bool:
    """Refuse what loading the weights in a folder would refuse; tell whether that is all known.

    Only loading knows a scheduler that is not diffusers' own, or takes more than its settings.
    Without a folder, only a scheduler that diffusers does not have is refused.

    Raises:
        UsageError: the model does not take the config's scheduler, or has no safety checker.
        IntegrityError: its index cannot be read.
    """
    index: dict[str, Any] = {}
    if folder is not None:
        require_safety_checker(config, there="safety_checker" in components(folder))
        index = read_json(folder / INDEX)
    match index.get("scheduler"):
        case ["diffusers", str(kind)]:
            name = config.generation.scheduler or kind
            if (name == kind and kind not in _UNREPEATABLE) or {name, kind} <= _INTERCHANGEABLE:
                return True
            if own := _made(kind):
                require_scheduler(name, own, str(index.get("_class_name")))
                return True
    _require_known(config.generation.scheduler)
    return False


def _require_known(scheduler: str | None) -> None:
    if scheduler is None or scheduler in _INTERCHANGEABLE:
        return
    import diffusers  # takes seconds

    known = {name.removesuffix("Scheduler").lower(): name for name in dir(diffusers)}
    known = {short: name for short, name in known.items() if name.endswith("Scheduler")}
    if scheduler not in known.values():
        short = str(scheduler).removesuffix("Scheduler").lower()
        close = difflib.get_close_matches(short, known, n=3, cutoff=0.4)
        meant = " or ".join(known[one] for one in close) or ", ".join(sorted(known.values()))
        raise UsageError(
            f"generation.scheduler: diffusers has no {scheduler}; did you mean {meant}?"
        )


def _made(kind: str) -> Any:
    """Make a scheduler of diffusers; None where that takes more than its name."""
    import diffusers  # takes seconds

    try:
        return getattr(diffusers, kind)()
    except (AttributeError, ImportError, TypeError):
        return None
