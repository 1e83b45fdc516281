from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from sdwn.cli.console import Result
from sdwn.cli.main import EXAMPLES, app
from sdwn.generation import batching
from sdwn.paths import RunPaths
from sdwn.storage.shards import ImageFile
from typer.core import TyperGroup

from conftest import NOISE, REPOSITORY, OwnProcess, PlanRun, Sdwn

COMMANDS = tuple(dict.fromkeys(line.split()[1] for line in EXAMPLES.splitlines()))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps({**NOISE, "catalog": {"roots": ["corgi.n.01"]}}))
    return path


@pytest.mark.process
def test_the_whole_job_a_command_at_a_time(sdwn: Sdwn, config: Path) -> None:
    planned = sdwn.json("plan", config, "run")
    assert planned["images"] == 5 * planned["synsets"] > 0
    assert planned["imagenet_classes"] == planned["imagenet_names"] == planned["synsets"]
    assert sdwn.json("status", "run")["images_done"] == 0
    refused = sdwn("merge", "run", "--release", "out", code=1)
    assert "shard 0 missing; make them with: sdwn submit run --wait" in refused.stderr
    submitted = sdwn.json("submit", "run", "--wait")
    assert submitted["submitted"] == len(submitted["job_ids"]) > 0
    assert submitted["shards"] == planned["shards"]
    status = sdwn.json("status", "run")
    assert status["images_done"] == status["images_total"] == planned["images"]
    assert status["shards_done"] == status["shards_total"] == planned["shards"]
    again = sdwn("submit", "run", "--wait")
    count = planned["shards"]
    assert f"nothing to submit: all {count} shards are finished" in again.stderr
    assert "next: sdwn merge run --release run/release" in again.stdout
    merged = sdwn.json("merge", "run", "--release", "out")
    assert merged["images"] == planned["images"]
    assert merged["synsets"] == planned["synsets"]
    assert merged["bytes"] == sum(
        path.stat().st_size
        for path in (sdwn.folder / "out").iterdir()
        if path.name not in ("manifest.json", "README.md", "SHA256SUMS")
    )
    assert sdwn.json("verify", "out") == {
        "images": planned["images"],
        "ok": True,
        "problems": [],
        "left_by_desktop_or_server": [],
    }
    (sdwn.folder / "out/synsets.csv").write_text("gone")
    found = sdwn.json("verify", "out", code=1)
    assert not found["ok"]
    assert "synsets.csv" in found["problems"][0]


@pytest.mark.process
def test_without_wait_tasks_go_on_alone(sdwn: Sdwn, config: Path) -> None:
    sdwn("plan", config, "run", "--set", "generation.num_inference_steps=10")
    submitted = sdwn.json("submit", "run")
    assert submitted["submitted"] > 0
    assert sdwn.json("submit", "run")["submitted"] == 0, "live tasks are not submitted again"
    for _ in range(600):
        status = sdwn.json("status", "run")
        # The last image may lie in a piece for a moment before its shard is joined.
        if status["shards_done"] == status["shards_total"]:
            break
        time.sleep(0.1)
    assert status["shards_done"] == status["shards_total"]
    assert status["images_done"] == status["images_total"]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> str:
    """Let every task fail before it needs torch; what its log ends with."""
    monkeypatch.setenv("SDWN_BATCH_SIZE", "many")
    return "SDWN_BATCH_SIZE: expected a number of images"


def test_what_the_doctor_finds_is_refused_before_anything_is_submitted(
    sdwn: Sdwn, config: Path
) -> None:
    sdwn("plan", config, "run", "--set", "model.name=/nowhere/model")
    refused = " ".join(sdwn("submit", "run", "--wait", code=1).stderr.split())
    assert "weights: model /nowhere/model: no such folder" in refused
    assert "submit all the same with: --force" in refused
    refused = " ".join(sdwn("pilot", "run", code=1).stderr.split())
    assert "weights: model /nowhere/model: no such folder" in refused
    assert not (sdwn.folder / "run/pilot").exists()


@pytest.mark.parametrize("words", ["plan demo ''", "status ''", "compare a b --out="])
def test_an_empty_argument_is_not_the_current_folder(sdwn: Sdwn, words: str) -> None:
    """As of a shell variable that is not set."""
    refused = sdwn(*shlex.split(words), code=2)
    assert "expected no empty argument, found one" in refused.stderr
    assert not list(sdwn.folder.iterdir())


def test_what_the_system_refuses_is_told_by_path_without_a_number(
    sdwn: Sdwn, planned: PlanRun
) -> None:
    planned()
    (sdwn.folder / "file").touch()
    for place, reason in (
        ("file/x", "expected a folder, found a file"),
        ("x" * 300, "File name too long"),
    ):
        refused = sdwn("plan", "demo", place, code=1).stderr
        assert refused.splitlines()[-1].startswith(f"error: {place}")
        assert refused.endswith(f": {reason}\n")


def test_a_path_in_a_printed_command_is_quoted() -> None:
    """By sdwn.errors.command and shell, wherever a message names a command of the user's paths."""
    bare = re.compile(r"\b(sdwn [a-z]+|rm)( -[-a-z]+)* \{")
    found = [
        f"{path.name}: {line.strip()}"
        for path in (REPOSITORY / "sdwn").rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if bare.search(line)
    ]
    assert found == []


@pytest.mark.process
def test_a_failure_says_why_and_what_to_do(sdwn: Sdwn, config: Path, failing: str) -> None:
    sdwn("plan", config, "run")
    failed = sdwn("submit", "run", "--wait", "--retries", "0", code=1)
    assert "shards failed; shard 0" in failed.stderr
    assert failing in failed.stderr
    assert "submit the rest again with: sdwn retry run --wait --retries 0" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert sdwn("status", "run").stdout.endswith("next: sdwn logs run\n")
    assert sdwn("logs", "run").stdout.endswith("next: sdwn retry run\n")


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["plan", "nothing", "run"], 2, "no config 'nothing': expected a file, or one of those"),
        (["plan", "small.yaml", "run", "--set", "seed=x"], 2, "seed: Input should be a valid int"),
        (["plan", "small.yaml"], 2, "Missing argument"),
        (["plan", "--frobnicate"], 2, "No such option"),
        (["submit", "run", "--profile", "moon"], 1, "no plan here; make one with: sdwn plan"),
        (["status", "nowhere"], 1, "nowhere: no plan here"),
        (["merge", "nowhere", "--release", "out"], 1, "nowhere: no plan here"),
        (["verify", "nowhere"], 1, "nowhere: no release here"),
        (["evaluate", "nowhere"], 1, "nowhere: no release here"),
        (["report", "nowhere"], 1, "nowhere: no release here"),
        (
            ["run", "paper", "run"],
            2,
            "fp16 needs a GPU, and the profile (local) gives none",
        ),
    ],
)
def test_wrong_use_and_failure_have_their_exit_codes(
    sdwn: Sdwn, config: Path, arguments: list[str], code: int, expected: str
) -> None:
    done = sdwn(*arguments, code=code)
    assert expected in " ".join(done.stderr.split())
    assert done.stdout == ""
    assert not (sdwn.folder / "run").exists(), "nothing is planned after a refusal"


def test_debug_shows_the_traceback(sdwn: Sdwn) -> None:
    assert "Traceback" not in sdwn("status", "nowhere", code=1).stderr
    assert "Traceback" in sdwn("--debug", "status", "nowhere", code=1).stderr


@pytest.fixture(scope="module")
def helped() -> dict[str, tuple[list[str], str]]:
    """What the help of each command, in one process, was the first to import; and its text."""
    code = (
        "import contextlib, io, json, sys; from sdwn.cli.main import app\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'timm', 'nltk', 'h5py', 'pyarrow'}\n"
        "heavy |= {'starlette', 'uvicorn', 'rapidfuzz'}\n"
        "found, before = {}, set()\n"
        "for name in sys.argv[1:]:\n"
        "    text = io.StringIO()\n"
        "    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):\n"
        "        app([*name.split(), '--help'], prog_name='sdwn')\n"
        "    after = heavy & set(sys.modules)\n"
        "    found[name], before = (sorted(after - before), text.getvalue()), after\n"
        "print(json.dumps(found))"
    )
    command = [sys.executable, "-c", code, "", *COMMANDS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, tuple[list[str], str]] = json.loads(done.stdout)
    return found


@pytest.mark.process
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_and_light_commands_import_nothing_heavy(
    helped: dict[str, tuple[list[str], str]], command: str
) -> None:
    heavy, text = helped[command]
    assert heavy == []
    assert f"Usage: sdwn {command}" in text


@pytest.fixture(scope="module")
def commands() -> dict[str, Any]:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    return group.commands


def test_each_example_of_a_help_is_valid_use(commands: dict[str, Any], tmp_path: Path) -> None:
    """Its words are parsed as the command would; nothing runs."""
    with contextlib.chdir(tmp_path):
        for line in EXAMPLES.splitlines():
            program, name, *words = shlex.split(line)
            assert program == "sdwn"
            commands[name].make_context(name, words)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lines_are_short_and_flags_have_no_type(
    helped: dict[str, tuple[list[str], str]], commands: dict[str, Any], name: str
) -> None:
    _, text = helped[name]
    assert "<bool>" not in text
    assert "Examples:" in text
    command = commands[name]
    lines = [
        str(command.help).partition("\n")[0],
        *(getattr(one, "help", "") for one in command.params),
    ]
    for line in lines:
        assert 0 < len(line.split()) <= 10, line
    # The terminal alone breaks lines, whatever its width.
    assert "\n" not in str(command.help).replace("\n\n", "")


Elsewhere = tuple[Path, subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Elsewhere:
    """The paper's run, planned and looked at by a process of its own, of another hash seed."""
    run = tmp_path_factory.mktemp("elsewhere") / "run"
    code = (
        "import contextlib, sys; from sdwn.cli.main import app\n"
        "for command in (['plan', 'paper'], ['status']):\n"
        "    with contextlib.suppress(SystemExit): app([*command, sys.argv[1], '--json'])\n"
        "print(sorted({'torch', 'diffusers', 'timm'} & set(sys.modules)), file=sys.stderr)"
    )
    # This process has one that is drawn at random, unless the environment sets it.
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    command = [sys.executable, "-c", code, str(run)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return run, done


@pytest.mark.process
def test_planning_and_status_need_no_torch_and_json_is_one_object(elsewhere: Elsewhere) -> None:
    run, done = elsewhere
    assert done.stderr.splitlines()[-1] == "[]"
    assert (run / "plan.json").exists()
    planned, status = map(json.loads, done.stdout.splitlines())
    assert planned["images"] == status["images_total"] == 262_040
    assert "planned" in done.stderr


@pytest.mark.process
def test_a_plan_does_not_depend_on_the_hash_seed_and_prints_for_people_too(
    sdwn: Sdwn, elsewhere: Elsewhere
) -> None:
    there, _ = elsewhere
    shown: Any = sdwn("plan", "paper", "run").stdout
    for name in ("plan.json", "concepts.parquet"):
        assert (sdwn.folder / "run" / name).read_bytes() == (there / name).read_bytes()
    counts = ("synsets +26,204", "images +262,040, 10 a synset", "ImageNet classes +862")
    for line in (*counts, "on A100 +28 min 37 s a task, 62.5 GPU-hours; 1.21 images/s"):
        assert re.search(line, shown), shown
    prompts = shown.partition("sample prompts")[2].partition("to make")[0].splitlines()
    assert len(prompts) == 5
    assert shown.endswith("next: sdwn prefetch run\n")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What installing a wheel leaves."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True)
    wheel = next(folder.glob("*.whl"))
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, folder / "site"], check=True)
    return folder / "site"


def from_site(site: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python where only the wheel's sdwn is to be found."""
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=site.parent,
        check=False,
        capture_output=True,
        text=True,
    )


@pytest.mark.process
def test_the_wheel_carries_configs_and_profiles(site: Path) -> None:
    code = (
        "from sdwn.paths import shipped_file; import sdwn.paths\n"
        "print(sdwn.paths.__file__)\n"
        "print(shipped_file('config', 'paper'), shipped_file('profile', 'local'))"
    )
    done = from_site(site, "-c", code)
    assert done.returncode == 0, done.stderr
    assert all(part.startswith(str(site / "sdwn")) for part in done.stdout.split())


@pytest.mark.process
def test_the_wheel_carries_the_miniature(site: Path) -> None:
    def carried(folder: Path) -> dict[str, bytes]:
        files = (path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    assert carried(site / "sdwn/miniature") == carried(REPOSITORY / "sdwn/miniature")


@pytest.mark.process
def test_a_miniature_that_is_not_whole_is_told_in_one_line(site: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(site, tmp_path / "site")
    weights = broken / "sdwn/miniature/unet/diffusion_pytorch_model.safetensors"
    weights.unlink()
    done = from_site(broken, "-m", "sdwn", "plan", "demo", str(tmp_path / "run"))
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if "rror" in line]
    assert f"{weights}: " in error
    assert "install sdwn again" in error


def readme_commands(containing: str = "", readme: str = "README.md") -> list[str]:
    """The lines of a README's shell blocks, of those that contain some text."""
    text = (REPOSITORY / readme).read_text()
    blocks = re.findall(r"```(?:console|sh|bash)\n(.*?)```", text, re.DOTALL)
    wanted = [block for block in blocks if containing in block]
    return [line.strip() for block in wanted for line in block.splitlines() if line.strip()]


GUIDES = (
    *("README.md", "slurm/README.md", "docs/gpu.md", "docs/releases.md", "docs/evaluation.md"),
    *("docs/sweeps.md", "docs/measures.md", "docs/study.md", "docs/training.md"),
)


def test_the_first_config_of_the_readme(sdwn: Sdwn, tmp_path: Path) -> None:
    """Its two lines are planned as they stand, and the line for the miniature with fewer steps."""
    text = (REPOSITORY / "README.md").read_text()
    first, second = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    for content in (first, first + second):
        (sdwn.folder / "mine.yaml").write_text(content)
        (line,) = [line for line in readme_commands() if line.startswith("sdwn plan mine.yaml")]
        shutil.rmtree(sdwn.folder / "MINE", ignore_errors=True)
        sdwn(*shlex.split(line)[1:])
    (line,) = [line for line in readme_commands() if line.startswith("sdwn run demo ZEBRAS")]
    planned = sdwn("plan", *shlex.split(line)[2:], "--profile", "testbed")
    assert planned.stdout.endswith("next: sdwn submit ZEBRAS --profile testbed --wait\n")


@pytest.mark.parametrize("readme", GUIDES)
def test_every_sdwn_line_of_a_readme_is_valid_use(
    helped: dict[str, tuple[list[str], str]], readme: str
) -> None:
    """Each command and option named there exists: its help is asked for."""
    lines = [line for line in readme_commands(readme=readme) if line.startswith("sdwn ")]
    assert lines
    for line in lines:
        words = line.split("#")[0].split()
        _, help_text = helped[words[1]]
        for option in (word for word in words if word.startswith("--")):
            assert option in help_text, line


def test_the_cluster_guide_names_every_field_and_profile() -> None:
    from sdwn.jobs.profile import ClusterProfile

    guide = (REPOSITORY / "slurm/README.md").read_text()
    profiles = [path.stem for path in (REPOSITORY / "slurm/profiles").glob("*.yaml")]
    for name in (*ClusterProfile.model_fields, *profiles):
        assert f"`{name}`" in guide, name


@pytest.mark.process
def test_cancel_ends_local_tasks_and_retry_goes_on(sdwn: Sdwn, config: Path) -> None:
    sdwn("plan", config, "run", "--set", "generation.num_inference_steps=200")
    assert "nothing was submitted yet" in sdwn("retry", "run", code=1).stderr
    submitted = sdwn.json("submit", "run")
    assert "are making the last" in sdwn("submit", "run").stderr
    cancelled = sdwn.json("cancel", "run")
    assert "nothing to cancel" in sdwn("cancel", "run").stdout
    assert sorted(cancelled["job_ids"]) == sorted(submitted["job_ids"])
    status = sdwn.json("status", "run")
    assert status["shards_running"] == 0
    assert status["shards_failed"] == 0
    assert status["shards_cancelled"] == submitted["shards"]
    again = sdwn.json("retry", "run")
    assert again["shards"] == submitted["shards"]
    sdwn("cancel", "run")


def test_what_people_read_has_separators_and_no_none(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"images": 262_040, "revision": None, "rate": 12345.6, "left": ["a", "b\x1b[2J"]}
    Result({"json": 1}, "a sentence", rows, next_="sdwn status RUN").print(as_json=False)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    facts = ["images 262,040", "rate 12,346", "left a", "b\\x1b[2J"]
    assert lines == ["a sentence", *facts, "next: sdwn status RUN"]


@pytest.mark.process
def test_tuning_measures_a_batch_size_that_later_tasks_take(
    sdwn: Sdwn, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "SECONDS_A_STEP", 0.002)
    (profile,) = sdwn.json("tune", config)["profiles"]
    probes = profile["tuning"]["probes"]
    assert 1 <= len(probes) <= 10
    best = max(probe["images_per_second"] for probe in probes)
    assert profile["tuning"]["images_per_second"] >= 0.9 * best
    assert profile["workload"]["device"] == "cpu"
    curve = Path(profile["curve"]).read_text()
    assert "<svg" in curve
    assert "images/s" in curve
    shown = sdwn("tune", config, "--profile", "local").stdout
    assert "images/s" in shown
    assert "chosen" in shown
    again = json.loads(Path(profile["path"]).read_text())
    sdwn("plan", config, "run")
    sdwn("submit", "run", "--wait")
    (record, *_) = (sdwn.folder / "run/tasks").glob("*.json")
    task = json.loads(record.read_text())
    assert task["batch_size"] == again["tuning"]["batch_size"]
    assert task["batch_source"].startswith("tuned 20")
    Path(profile["path"]).unlink()


@pytest.mark.process
def test_a_gpu_that_torch_does_not_find_is_told(
    sdwn: Sdwn, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken CUDA installation looks like this machine, which has no GPU, with one promised."""
    tiny = ("--set", "model.name=builtin:tiny", "--set", "generation.height=16")
    tiny += ("--set", "catalog={roots: [corgi.n.01]}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    kept = set(Path(os.environ["SDWN_CACHE"]).glob("gpus/*"))
    for where in ((), ("--profile", "local")):
        refused = sdwn("tune", config, *tiny, *where, code=1)
        assert "nothing is measured: a GPU was given (number 7) and torch finds" in refused.stderr
    assert set(Path(os.environ["SDWN_CACHE"]).glob("gpus/*")) == kept, "no GPU profile of a CPU"
    sdwn("plan", config, "run", *tiny)
    found = sdwn.json("pilot", "run")
    assert found["device"] == "cpu"
    assert found["warning"].startswith("a GPU was requested, but the task ran on the CPU")
    (told,) = sdwn.json("status", "run/pilot")["without_gpu"]
    assert "a GPU was given (number 7) and torch finds none" in told
    drawn = sdwn("tune", config, "--profile", "local", "--gpus", "a100", code=2)
    assert "builtin:noise is drawn on the CPU; leave out --gpus" in drawn.stderr


@pytest.mark.process
def test_a_pilot_answers_for_the_whole_run(sdwn: Sdwn, config: Path) -> None:
    planned = sdwn.json("plan", config, "run")
    found = sdwn.json("pilot", "run", "--batch-size", "10")
    assert found["images"] == min(20, planned["images"]) > 0
    assert (found["batch_size"], found["nsfw"], found["nan"]) == (10, 0, 0)
    assert 0 < found["images_per_second"] <= 100, "a step of noise takes 10 ms"
    assert found["run_images"] == planned["images"]
    seconds = planned["images"] / found["images_per_second"]
    submitted = sdwn.json("submit", "run", "--dry-run", "--profile", "local")
    assert submitted["shards"] == planned["shards"]
    assert found["run_tasks"] == min(2, planned["shards"]), "the profile's, at once"
    assert planned["estimate"]["costs"][0]["speed_source"] == "the set pace of builtin:noise"
    (told,) = submitted["estimate"]["costs"]
    assert told["speed_source"] == "the run's pilot"
    for figure in ("hours_per_task", "device_hours", "hours", "warning", "loading_seconds"):
        assert told[figure] == found[figure], "one arithmetic gives both"
    assert submitted["estimate"]["bytes"] == pytest.approx(found["run_bytes"], rel=0.01)
    seconds += found["run_tasks"] * found["loading_seconds"]
    assert found["device_hours"] == pytest.approx(seconds / 3600)
    assert found["hours"] == pytest.approx(found["hours_per_task"])
    assert found["hours"] >= 0.99 * seconds / 3600 / found["run_tasks"]
    assert found["run_bytes"] == pytest.approx(
        found["bytes_per_image"] * planned["images"], rel=0.01
    )
    assert found["synsets"] == 2
    assert Image.open(sdwn.folder / found["contact_sheet"]).width == 10 * 160
    assert sdwn.json("status", "run")["images_done"] == 0, "the run itself has not begun"
    sdwn("submit", "run", "--wait")
    small = RunPaths(sdwn.folder / "run/pilot")
    with ImageFile(small.shard(0)) as file:
        rows = file.rows()
        made = {
            (wnid, number): digest.tobytes()
            for wnid, number, digest in zip(
                rows["wnid"], rows["number"], rows["sha256"], strict=True
            )
        }
    for shard in RunPaths(sdwn.folder / "run").shards.iterdir():
        with ImageFile(shard) as file:
            rows = file.rows()
            for wnid, number, digest in zip(
                rows["wnid"], rows["number"], rows["sha256"], strict=True
            ):
                assert made.pop((wnid, number), digest.tobytes()) == digest.tobytes()
    assert not made, "an image of the pilot is an image of the run"


@pytest.mark.process
def test_a_pilot_that_fails_says_why(sdwn: Sdwn, config: Path, failing: str) -> None:
    sdwn("plan", config, "run")
    failed = sdwn("pilot", "run", code=1)
    assert "the pilot failed" in failed.stderr
    assert failing in failed.stderr


def test_a_batch_size_off_the_grid_is_refused_at_once(sdwn: Sdwn, config: Path) -> None:
    refused = sdwn("plan", config, "run", "--set", "generation.batch_size=7", code=2)
    assert "7 is neither a multiple of images_per_synset (5)" in refused.stderr
    sdwn("plan", config, "run")
    refused = sdwn("submit", "run", "--batch-size", "7", code=2)
    assert "try 5 or 10" in refused.stderr
    refused = sdwn("tune", config, "--gpus", "a100", code=2)
    assert "--profile" in refused.stderr


def test_a_release_goes_out_and_comes_back_and_an_image_is_made_again(
    sdwn: Sdwn, generated: PlanRun
) -> None:
    generated(catalog={"roots": ["corgi.n.01"]})
    endless = sdwn("merge", "run", "--release", "out", "--part-size", "inf", code=2).stderr
    assert "'--part-size'" in endless
    sdwn("merge", "run", "--release", "out", "--check", "full", "--part-size", "0.001")
    exported = sdwn.json("export", "out", "pictures", "--format", "folders", "--status", "ok")
    assert exported["images"] == 10
    imported = sdwn.json("import", "pictures", "again", "--format", "folders")
    assert (imported["images"], imported["synsets"], imported["skipped"]) == (10, 2, 0)
    assert sdwn.json("verify", "again")["ok"]
    (sdwn.folder / "pictures/cardigan.n.02/broken.jpg").write_bytes(b"no picture")
    told = sdwn("import", "pictures", "third", "--format", "folders")
    assert "left out: cardigan.n.02/broken.jpg: " in told.stderr
    sample = sdwn.json("export", "out", "small", "--format", "release", "--sample", "50%")
    assert (sample["images"], sample["synsets"]) == (5, 1)
    assert sdwn.json("verify", "small", "--check", "quick")["ok"]
    one = sdwn.json("export", "out", "one", "--format", "webdataset", "--below", "pembroke.n.01")
    assert one["synsets"] == 1
    lossy = sdwn.json("export", "out", "lossy", "--format", "imagefolder", "--quality", "80")
    assert lossy["images"] == len(list((sdwn.folder / "lossy").glob("*/*.jpg"))) == 10
    found = sdwn.json("regenerate", "out", "pembroke", 4, "--save", "pembroke.png")
    assert (found["verdict"], found["synset"], found["number"]) == ("equal", "pembroke.n.01", 4)
    assert (sdwn.folder / "pembroke.png").read_bytes().startswith(b"\x89PNG")
    assert "no image 5; it has 0 to 4" in sdwn("regenerate", "out", "pembroke", 5, code=2).stderr
    for share in ("0", "1", "101%", "-1%", "some", "nan"):
        refused = sdwn("export", "out", "no", "--format", "parquet", f"--sample={share}", code=2)
        assert f"--sample {share}: expected a share such as 1%" in refused.stderr
    assert not (sdwn.folder / "no").exists()
    for place in ("out/manifest.json", "pipe", "out/x.png"):
        refused = sdwn("regenerate", "out", "pembroke", 0, "--save", place, code=2)
        assert f"--save {place}: " in refused.stderr
    for option in ("--below", "--status"):
        sdwn("export", "out", "no", "--format", "parquet", option, "", code=2)


@pytest.mark.process
def test_what_libraries_warn_of_reaches_nobody(tmp_path: Path) -> None:
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x09"  # of nine entries there is none
    (tmp_path / "pictures/n02391049").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "pictures/n02391049/a.jpg", exif=exif)
    command = OwnProcess(tmp_path)
    taken = command("import", "pictures", "real", "--format", "imagefolder")
    assert taken.stderr == ""
    told = command("--debug", "import", "pictures", "again", "--format", "imagefolder").stderr
    assert "Corrupt EXIF data" in told, "who looks for a fault sees them"


@pytest.mark.process
def test_only_errors_of_libraries_reach_the_terminal() -> None:
    code = """
import contextlib, logging
from sdwn.cli import main as cli
with contextlib.suppress(SystemExit):
    cli.main(["--version"])
import huggingface_hub.utils.logging
for name in ("library", "huggingface_hub", "sdwn.jobs"):
    logging.getLogger(name).warning(f"{name} warns")
    logging.getLogger(name).error(f"{name} fails")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    told = [f"{name} fails" for name in ("library", "huggingface_hub")]
    assert done.stderr.splitlines() == [*told, "sdwn.jobs warns", "sdwn.jobs fails"]


@pytest.mark.process
def test_a_user_without_a_home_or_a_name_and_a_terminal_of_few_letters_meet_no_traceback(
    tmp_path: Path, config: Path
) -> None:
    """A container started under a number; a run whose name is no UTF-8."""
    # The kernel lets every user become one, where it lets anybody.
    alone = ("unshare", "--user", "--map-user=12345", "--map-group=12345")
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], check=False).returncode:
        alone = ()
    without = ("HOME", "USER", "LOGNAME", "SDWN_CACHE", "XDG_CACHE_HOME", "HF_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in without}
    environment |= {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    environment |= {"PYTHONUTF8": "0", "TMPDIR": str(tmp_path)}
    run = os.fsdecode(b"caf\xe9")
    for words in ("plan", config, run), ("submit", run, "--wait"), ("doctor", run, "--json"):
        done = subprocess.run(
            [*alone, sys.executable, "-m", "sdwn", *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout.isascii()
    assert json.loads(done.stdout)["ok"]
    assert not (tmp_path / "~").exists(), "no library made a folder of this name"
