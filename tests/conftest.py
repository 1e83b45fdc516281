"""Real parts, made small: WordNet, plans of a few synsets, the command line as users run it."""

from __future__ import annotations

import os

# Read when numpy, torch and scikit-learn are imported: threads that wait for each other crawl where
# cores are shared.
os.environ["OMP_NUM_THREADS"] = "1"

import contextlib
import functools
import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import nltk
import pytest
import typer
from sdwn.cli import main as cli
from sdwn.config import CatalogConfig, RunConfig
from sdwn.generation import batching
from sdwn.generation.task import GENERATE, generate
from sdwn.io import Advance, OnMessage, ignore
from sdwn.jobs import submit as submission
from sdwn.jobs.profile import ClusterProfile
from sdwn.jobs.scheduler import Job
from sdwn.jobs.task import write_note
from sdwn.paths import RunPaths
from sdwn.planning.plan import Plan, make_plan, write_plan
from sdwn.wordnet import corpus
from sdwn.wordnet.corpus import Synset, WordNet, open_wordnet, read_catalog

# A suite that was started in the background has it ignored, and so would its children.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parent.parent
PACE = batching.SECONDS_A_STEP

NOISE: dict[str, Any] = {
    "catalog": {"roots": ["corgi.n.01", "terrier.n.01"]},
    "images_per_synset": 5,
    "model": {"name": "builtin:noise"},
    "generation": {"height": 8, "width": 16, "num_inference_steps": 1, "precision": "fp32"},
    "storage": {"images_per_shard": 10},
}

# 13 synsets, for where each costs time.
FEW: dict[str, Any] = {"roots": ["corgi.n.01", "spaniel.n.01"]}


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the session's own, so that no test sees what the user has."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("SDWN_CACHE")
    os.environ["SDWN_CACHE"] = str(folder)
    yield folder
    os.environ.pop("SDWN_CACHE")
    if before is not None:
        os.environ["SDWN_CACHE"] = before


@pytest.fixture(scope="session", autouse=True)
def unpaced() -> Iterator[None]:
    """Noise without waiting, and shorter waits for tasks; processes of their own keep both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "SECONDS_A_STEP", 1e-9)
        patch.setattr(submission, "POLL_SECONDS", 0.1)
        # A process builds the tree of commands once.
        patch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
        # What a machine keeps when its power fails no test can see, and it takes a disk long.
        patch.setattr(os, "fsync", lambda _: None)
        yield


SavedModel = Callable[[Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> SavedModel:
    """Saves each small model of a family once, and returns its folder."""

    @functools.cache
    def save(make: Callable[[Path], None]) -> Path:
        folder = tmp_path_factory.mktemp(make.__name__)
        make(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def small_clip(saved: SavedModel) -> Path:
    """A small CLIP that knows the captions of drawings, see ``tests/small_clip.py``."""
    from small_clip import save_small_clip

    return saved(save_small_clip)


@pytest.fixture
def paced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise at the pace that it has for users."""
    monkeypatch.setattr(batching, "SECONDS_A_STEP", PACE)


@pytest.fixture(scope="session")
def wordnet() -> WordNet:
    return open_wordnet()


@pytest.fixture(scope="session")
def paper(wordnet: WordNet) -> tuple[Synset, ...]:
    return read_catalog(CatalogConfig(name="sdwn-26204"), wordnet)


def hide_wordnet(patch: pytest.MonkeyPatch, home: Path) -> None:
    """Let this process find no WordNet on this machine."""
    patch.setattr(corpus, "SYSTEM_FOLDERS", ())
    for name in ("WNSEARCHDIR", "WNHOME", "NLTK_DATA"):
        patch.delenv(name, raising=False)
    patch.setenv("HOME", str(home))
    # What other tests opened already counts as well.
    patch.setattr(corpus, "open_wordnet", corpus.open_wordnet.__wrapped__)
    patch.setattr(nltk, "download", lambda *_, **__: False)


def noise_config(**changes: Any) -> RunConfig:
    """A config of the sampler without a model; a changed section is merged, not replaced."""
    content = {**NOISE}
    for key, value in changes.items():
        old = content.get(key)
        content[key] = {**old, **value} if isinstance(old, dict) and key != "catalog" else value
    return RunConfig.model_validate(content)


PlanRun = Callable[..., tuple[RunPaths, Plan]]


@pytest.fixture
def planned(wordnet: WordNet, tmp_path: Path) -> PlanRun:
    """Plan a run of a few synsets: ``planned("name", generation={...})``."""

    def plan_run(name: str = "run", **changes: Any) -> tuple[RunPaths, Plan]:
        config = noise_config(**changes)
        plan = make_plan(config, read_catalog(config.catalog, wordnet))
        paths = RunPaths(tmp_path / name)
        write_plan(plan, paths, wordnet=wordnet)
        return paths, plan

    return plan_run


@pytest.fixture(scope="session")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that were generated in this session, by the digests of their plans."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def generated(planned: PlanRun, whole_runs: Path, wordnet: WordNet) -> PlanRun:
    """Plan a run and make all its shards in this process; the same plan's are made once."""

    def generate_run(name: str = "run", **changes: Any) -> tuple[RunPaths, Plan]:
        paths, plan = planned(name, **changes)
        whole = RunPaths(whole_runs / plan.digest)
        if not whole.root.exists():
            write_plan(plan, whole, wordnet=wordnet)
            generate(whole.root, range(len(plan.shards)))
        shutil.copytree(whole.root, paths.root, dirs_exist_ok=True)
        return paths, plan

    return generate_run


def submit_shards(
    paths: RunPaths,
    plan: Plan,
    indices: Sequence[int],
    profile: ClusterProfile,
    on_message: OnMessage = ignore,
) -> list[Job]:
    """Submit some shards of a run, whatever lives already."""
    tasks = submission.WorkOrder(paths, plan, {"generate": GENERATE}, profile).tasks_for(indices)
    return submission.submit_tasks(paths, tasks, profile, on_message)


def keep_record(run: Path, job: str, device: str, **changes: Any) -> None:
    """Keep a task's record: 400 images in 200 s of sampling, a fifth of the time beside it."""
    fields = {"job": job, "rank": 0, "host": "n1", "device": device, "memory_gb": 40}
    fields |= {"batch_size": 10, "batch_source": "one synset", "vae_slicing": False}
    fields |= {"loading_seconds": 30.0, "started": "2026-01-01", "total": 410, "done": 410}
    fields |= {"images": 400, "seconds": 200.0, "busy": 0.8, "ended": True, **changes}
    write_note(RunPaths(run), RunPaths(run).task(job, 0), json.dumps(fields))


class Sdwn:
    """The command line: run in this process, or started in one of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, with all that it imports imported already."""
        command = [str(argument) for argument in arguments]
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as end,
        ):
            cli.main(command)
        done = subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())
        assert (end.value.code or 0) == code, done.stderr + done.stdout
        return done

    def json(self, *arguments: object, code: int = 0) -> dict[str, Any]:
        """Run with ``--json``: all of stdout must be one JSON object."""
        answer = json.loads(self(*arguments, "--json", code=code).stdout)
        assert isinstance(answer, dict)
        return answer

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        """Start it and go on; it may be sent signals."""
        return subprocess.Popen(
            [sys.executable, "-m", "sdwn", *map(str, arguments)],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


class OwnProcess(Sdwn):
    """The command line where each command has to read its environment anew."""

    def __call__(self, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a command to its end in a process of its own."""
        process = self.start(*arguments)
        printed, log = process.communicate(timeout=300)
        assert process.returncode == code, log + printed
        return subprocess.CompletedProcess(process.args, code, printed, log)


@pytest.fixture
def sdwn(tmp_path: Path) -> Sdwn:
    return Sdwn(tmp_path)


TESTBED = REPOSITORY / "slurm/testbed"
NOT_RUN = "NOT RUN: the tests"


class Testbed:
    """A running test cluster; short arrays, so that splitting them is tested."""

    __test__ = False
    max_array_size = 30

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *command: str) -> str:
        """Run a SLURM command and return what it prints."""
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def controller(self, action: str) -> None:
        subprocess.run([TESTBED / "controller", action, "--dir", self.folder], check=True)
        if action == "start":
            # Until its nodes have come back to it, sbatch takes no task.
            away = ("sinfo", "--noheader", "--states=down,unknown,no_respond", "--format=%N")
            wait_until(lambda: not self.run(*away))

    def node(self, name: str, action: str) -> None:
        subprocess.run([TESTBED / "node", name, action, "--dir", self.folder], check=True)


def interrupt_at(count: int) -> Advance:
    """Return a report of progress that interrupts the work, as Ctrl-C does, at so much of it."""
    done = 0

    def interrupt(more: int) -> None:
        nonlocal done
        done += more
        if done == count:
            raise KeyboardInterrupt

    return interrupt


def wait_until(true: Callable[[], Any], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


@pytest.fixture(scope="session")
def testbed() -> Iterator[Testbed]:
    """A real SLURM of four nodes, started once; installed where root may do so."""
    folder = Path(tempfile.mkdtemp(prefix="sdwn-"))
    options = ["--dir", folder, "--max-array-size", Testbed.max_array_size]
    # So many jobs are no limit, but a test may set one.
    options += ["--gpus-per-node", 2, "--max-submit-jobs", 5000, "--port-base", free_ports(6)]
    try:
        for step in ([TESTBED / "install"], [TESTBED / "up", *map(str, options)]):
            done = subprocess.run(step, capture_output=True, text=True, check=False)
            if done.returncode:
                _not_run("on a real SLURM", done.stderr.strip(), "arrays work")
        assert f"stop it with: {TESTBED}/down --dir {folder}" in done.stderr
        os.environ["SLURM_CONF"] = done.stdout.strip().partition("=")[2]
        # The README's lines call sdwn by name.
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        yield Testbed(folder)
    finally:
        subprocess.run([TESTBED / "down", "--dir", folder], check=True)
        os.environ.pop("SLURM_CONF", None)
        shutil.rmtree(folder, ignore_errors=True)


def profile_for_testbed(folder: Path, addition: str) -> Path:
    """Write the testbed's shipped profile with a line more."""
    shipped = (REPOSITORY / "slurm/profiles/testbed.yaml").read_text()
    path = folder / "site.yaml"
    path.write_text(f"{shipped}\n{addition}\n")
    return path


def free_ports(count: int) -> int:
    """The first of so many free ports in a row, so that two suites may run at once."""
    # Not from the same one on: what another suite chose just now may not be taken yet.
    for base in range(18000 + 100 * (os.getpid() % 60), 30000, 100):
        with contextlib.ExitStack() as probes, contextlib.suppress(OSError):
            for port in range(base, base + count):
                probe = probes.enter_context(socket.socket())
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", port))
            return base
    raise OSError("no free ports")


@pytest.fixture
def cluster(testbed: Testbed) -> Iterator[Testbed]:
    """The test cluster, left without a job and with all its nodes."""
    yield testbed
    testbed.run("scancel", "--user=root")
    wait_until(lambda: not testbed.run("squeue", "--noheader"))


def workers(paths: RunPaths) -> list[int]:
    """The processes that make this run's images."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = os.fsdecode((process / "cmdline").read_bytes()).rstrip("\0").split("\0")
        except OSError:
            continue
        if "submitit.core._submit" in command and Path(command[-1]).parent == paths.jobs.absolute():
            found.append(int(process.name))
    return found


@pytest.fixture(scope="session")
def chromium() -> str:
    """The distribution's Chromium; installed where root may do so."""
    names = ("chromium", "chromium-browser", "google-chrome")
    installed = subprocess.run(
        [REPOSITORY / "tests/install-chromium"], capture_output=True, text=True, check=False
    )
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        reason = (installed.stderr.strip().splitlines() or ["no reason given"])[-1]
        _not_run("in a browser", reason, "pages open")
    return found


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium)
        yield started
        started.close()


def _not_run(where: str, reason: str, unknown: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(f"CI must run the tests {where}: {reason}")
    pytest.skip(f"{NOT_RUN} {where}: {reason}; nothing above says that {unknown}")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what waits for SLURM: it takes long, and the CPUs have other tests meanwhile.

    Then the files of most tests: the last ones are short, so that all processes end at once.
    """
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.get_closest_marker("slurm") is None, -tests[item.path]))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = {report.longrepr[2].removeprefix("Skipped: ") for report in skipped}
    for reason in sorted(reason for reason in reasons if reason.startswith(NOT_RUN)):
        terminalreporter.section(reason.partition(": ")[0], red=True, bold=True)
        terminalreporter.line(reason.partition(": ")[2])
