"""Findings of the doctor: one line each, with what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warning", "problem", "unverified"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; a problem stops the run, what is unverified may."""

    subject: str
    verdict: Verdict
    text: str


def problems(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings that would stop the run."""
    return [finding for finding in findings if finding.verdict == "problem"]
