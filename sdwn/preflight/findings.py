"""What an examination finds before a run: one line each, with what to do."""

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
    """Pick what would stop the run."""
    return [finding for finding in findings if finding.verdict == "problem"]


def ok(subject: str, text: str) -> Finding:
    """Say that something is as it should be."""
    return Finding(subject, "ok", text)


def warning(subject: str, text: str) -> Finding:
    """Say that something may go wrong or take longer."""
    return Finding(subject, "warning", text)


def problem(subject: str, text: str) -> Finding:
    """Say that something stops the run."""
    return Finding(subject, "problem", text)


def unverified(subject: str, text: str) -> Finding:
    """Say that something cannot be known from here."""
    return Finding(subject, "unverified", text)
