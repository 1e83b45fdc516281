"""Questions to a release in SQL, what they cannot reach; choices of images, and their exports."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sdwn.errors import UsageError
from sdwn.evaluation.verify import verify
from sdwn.generation.task import generate
from sdwn.measures.query import Database, choose, open_database
from sdwn.measures.record import SCORES
from sdwn.paths import ReleasePaths, RunPaths
from sdwn.planning.plan import make_plan, read_plan, write_plan
from sdwn.releases.merge import MergeOptions, merge
from sdwn.releases.release import Release
from sdwn.wordnet.corpus import WordNet

from conftest import REPOSITORY, Sdwn, noise_config
from drawn import draw_features, evaluation, noise_release, predictions
from test_scores import record_scores

ZEBRA, GONDOLA = "n02391049", "n03447447"
# By concept and number: four zebras, then four gondolas.
CLIP = [30, 10, 20, 20, 5, 40, None, 25]
CORRECT = [True, True, True, False, True, False, False, False]


def score(release: Release) -> None:
    """Lay scores into a release of eight images, as the commands would."""
    table = predictions(release, lambda _: 1.0)
    ranks = pa.array([0 if correct else 7 for correct in CORRECT], pa.int16())
    at = table.column_names.index("label_rank")
    table = table.set_column(at, table.schema.field(at), ranks)
    evaluation(release, table)
    features = draw_features(release, np.eye(8), "clip", clip_score=CLIP)
    record_scores(release, features, "duplicates", duplicate_of_better=[False, True] * 4)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, wordnet: WordNet) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return noise_release(folder, wordnet, [ZEBRA, GONDOLA], images_per_synset=4).paths.root


@pytest.fixture(scope="module")
def release(bare: Path, tmp_path_factory: pytest.TempPathFactory) -> Release:
    root = shutil.copytree(bare, tmp_path_factory.mktemp("scored") / "release")
    order = Release(root).metadata["wnid"].to_pylist()
    assert order == [ZEBRA] * 4 + [GONDOLA] * 4
    score(Release(root))
    return Release(root)


def ask(release: Release, sql: str) -> list[dict[str, Any]]:
    return list(open_database(release, sql).answer(sql)[1])


def numbers(release: Release) -> list[tuple[str, int]]:
    return [(row["wnid"], row["number"]) for row in release.metadata.to_pylist()]


# --- Questions ------------------------------------------------------------------------------------
def test_each_table_is_asked_for_what_it_has(release: Release) -> None:
    (row,) = ask(release, "SELECT count(*) AS images, count(DISTINCT id) AS ids FROM images")
    assert row == {"images": 8, "ids": 2}
    joined = "FROM images JOIN scores USING (id, number) WHERE correct ORDER BY clip_score DESC"
    found = ask(release, f"SELECT synset, number, clip_score {joined}")
    assert [one["clip_score"] for one in found] == [30, 20, 10, 5]
    assert found[0]["synset"] == "zebra.n.01"
    best = ask(release, f"SELECT predicted_wnid FROM predictions WHERE wnid = '{ZEBRA}'")
    assert best[0]["predicted_wnid"] == ZEBRA
    lemmas = ask(release, f"SELECT lemmas FROM Synsets WHERE id = '{GONDOLA}'")
    assert "gondola" in lemmas[0]["lemmas"]


def test_an_answer_is_a_table_csv_or_json(sdwn: Sdwn, release: Release) -> None:
    sql = "SELECT number, clip_score, status, [1.5, 2] AS pair, 'nan'::FLOAT AS none, sum(number) "
    sql += f"OVER () AS total FROM images JOIN scores USING (id, number) WHERE wnid = '{ZEBRA}' "
    sql += "ORDER BY number LIMIT 1;"
    found = sdwn.json("query", release.paths.root, sql)
    assert found["columns"] == ["number", "clip_score", "status", "pair", "none", "total"]
    row = {"number": 0, "clip_score": 30, "status": "ok", "pair": [1.5, 2], "none": None}
    assert found["rows"] == [{**row, "total": 6}]
    text = sdwn("query", release.paths.root, sql, "--csv").stdout
    assert list(csv.reader(text.splitlines())) == [
        found["columns"],
        ["0", "30.0", "ok", "[1.5, 2.0]", "", "6"],
    ]
    shown = sdwn("query", release.paths.root, "SELECT * FROM range(100)").stdout
    assert "100 rows" in shown
    assert len(shown.splitlines()) < 60, "of many rows some are shown"
    cells = "SELECT '=1+1' AS formula, chr(27) || ']0;x' AS title"
    assert sdwn("query", release.paths.root, cells, "--csv").stdout.splitlines()[1][:5] == "'=1+1"
    assert "\x1b" not in sdwn("query", release.paths.root, cells).stdout
    names = 'SELECT 1 AS answer, 2 AS "row", 3 AS row__'
    assert ask(release, names) == [{"answer": 1, "row": 2, "row__": 3}]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_csv('{file}')",
        "SELECT * FROM '{file}'",
        "SELECT * FROM read_text('{file}')",
        "SELECT * FROM glob('*')",
        "SELECT * FROM query('FROM read_csv(''{file}'')')",
        "SELECT * FROM read_parquet('https://127.0.0.1/x.parquet')",
        "COPY images TO '{file}.new'",
        "EXPORT DATABASE '{file}.new'",
        "ATTACH '{file}.new'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "SET threads = 64",
        "SET threads = 64; SELECT 1",
        "SELECT getenv('HOME')",
        "SELECT * FROM table",
    ],
)
def test_nothing_else_can_be_reached(release: Release, tmp_path: Path, sql: str) -> None:
    """Also no Python variable, such as the table that a function here holds."""
    (tmp_path / "file").write_text("secret\n")
    with pytest.raises(UsageError) as refused:
        ask(release, sql.format(file=tmp_path / "file"))
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        (
            "SELECT confidnce FROM scores",
            r'Candidate bindings: "confidence".*; there are scores \(',
        ),
        ("SELECT * FROM score", "score does not exist!; there are images, predictions"),
        ("SELECT * FROM pictures", "pictures does not exist.*images, predictions, scores, synsets"),
        ("SELEC 1", 'syntax error at or near "SELEC"$'),
        ("SELECT id::INT FROM images", "Could not convert string"),
        ("SELECT count(*) FROM range(1e9::BIGINT) a ORDER BY 1 LIMIT", "syntax error"),
        (" ", "expected a SELECT"),
        ("SELECT 1; SELECT 2", "expected one SELECT, found 2 statements"),
    ],
)
def test_an_error_is_a_line_that_says_what_there_is(
    sdwn: Sdwn, release: Release, sql: str, message: str
) -> None:
    refused = sdwn("query", release.paths.root, sql, code=2).stderr
    assert re.search(message, refused.strip())
    assert len(refused.splitlines()) == 1


def test_a_release_without_an_evaluation_says_how_to_make_one(
    bare: Path, caplog: pytest.LogCaptureFixture, sdwn: Sdwn
) -> None:
    assert "run: sdwn evaluate" in sdwn("query", bare, "FROM predictions", code=1).stderr
    assert sdwn.json("query", bare, "SELECT clip_score FROM scores LIMIT 1")["rows"] == [
        {"clip_score": None}
    ]
    assert f"compute it with: sdwn features {bare} --model clip:MODEL" in caplog.text


def test_ctrl_c_ends_a_question() -> None:
    """At once, though the answer would take hours."""
    sql = (
        "SELECT count(*) FROM range(1000000000) a, range(1000000000) b WHERE a.range = b.range + 1"
    )
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(Database({}).answer(sql.replace("=", "<"))[1])
    assert time.monotonic() - began < 60


# --- Choices --------------------------------------------------------------------------------------
def test_a_condition_and_an_order_choose(release: Release) -> None:
    found = choose(release, "correct and not duplicate_of_better")
    assert numbers(found[0]) == [(ZEBRA, 0), (ZEBRA, 2), (GONDOLA, 0)]
    best = choose(release, None, 2, "clip_score DESC")
    assert numbers(best[0]) == [(ZEBRA, 0), (ZEBRA, 2), (GONDOLA, 1), (GONDOLA, 3)]
    assert best[1] == [], "of equal ones the lower number; without a score last"
    three = choose(release, None, 3, "clip_score -- the best last")
    assert numbers(three[0])[:3] == [(ZEBRA, 1), (ZEBRA, 2), (ZEBRA, 3)]
    both = choose(release, f"correct OR wnid = '{ZEBRA}'", 3, "clip_score DESC")
    assert numbers(both[0]) == [(ZEBRA, 0), (ZEBRA, 2), (ZEBRA, 3), (GONDOLA, 0)]
    assert [(one.id, have) for one, have in both[1]] == [(GONDOLA, 1)]
    some = choose(release.subset(rows=[7, 5, 1]), "clip_score > 20", 1, "clip_score")
    assert numbers(some[0]) == [(GONDOLA, 3)]
    assert [(one.id, have) for one, have in some[1]] == [(ZEBRA, 0)]


@pytest.mark.parametrize(
    ("where", "order_by", "message"),
    [
        ("correct; SELECT 1", None, "more than one statement"),
        ("true) OR (true", None, "syntax error"),
        ("true UNION SELECT 1", None, "not an expression"),
        ("true LIMIT 1", None, "not an expression"),
        ("id IN (SELECT * FROM read_csv('/etc/passwd'))", None, "file system operations"),
        ("corect", None, 'Candidate bindings: "correct"'),
        (None, "clip_score) <= 9 --", "syntax error"),
        (None, "clipscore", r"clipscore not found .*; there are images \(.*, clip_score,"),
        ("nearest_real > 0.5", None, r"compute it with: sdwn measure .* --reference REAL"),
    ],
)
def test_what_is_no_condition_or_order_is_refused(
    release: Release, where: str | None, order_by: str | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        choose(release, where, 2, order_by)
    assert "\n" not in str(refused.value)


def test_a_table_of_prompts_is_chosen_from_by_its_own_columns(
    sdwn: Sdwn, tmp_path: Path, wordnet: WordNet
) -> None:
    """Where a column has the name of a score, the score counts; an id may look like a formula."""
    table = tmp_path / "own.csv"
    table.write_text("id,prompt,clip_score,colour\n+a,one,99,red\nb,two,1,blue\n")
    config = noise_config(catalog={"table": table}, images_per_synset=1)
    plan, run = make_plan(config), RunPaths(tmp_path / "run")
    write_plan(plan, run, wordnet=wordnet)
    generate(run.root, range(len(plan.shards)))
    own = merge([run], ReleasePaths(tmp_path / "release"), MergeOptions())
    draw_features(own, np.eye(2), clip_score=[10, 20])
    assert choose(own, "clip_score > 15")[0].metadata["id"].to_pylist() == ["b"]
    assert choose(own, "colour = 'red'")[0].metadata["id"].to_pylist() == ["+a"]
    with pytest.raises(UsageError, match="correct is not computed yet; compute it with: sdwn eval"):
        choose(own, "correct")
    red = ("--where", "colour = 'red'", "--per-synset", 2, "--short", "short.csv")
    found = sdwn("export", own.paths.root, "red", "--format", "parquet", *red)
    assert "concepts with fewer than 2  2" in found.stdout
    more = ("--only", "short.csv", "--set", "images_per_synset=2")
    assert sdwn.json("extend", own.paths.root, "more", *more)["images"] == 2


@pytest.mark.parametrize("form", ["folders", "imagefolder", "webdataset", "parquet", "release"])
def test_a_choice_is_exported_with_its_rule(
    sdwn: Sdwn, release: Release, tmp_path: Path, form: str
) -> None:
    chosen = ("--where", "correct  OR clip_score > 30", "--per-synset", 2, "--short", "s.csv")
    order = ("--order-by", "clip_score DESC", "--status", "ok")
    root = release.paths.root
    found = sdwn.json("export", root, "best", "--format", form, *chosen, *order)
    assert (found["images"], found["synsets"], found["short"]) == (4, 2, 0)
    rule = "status ok, where correct OR clip_score > 30, 2 of each synset by clip_score DESC, "
    card = (tmp_path / "best/README.md").read_text().replace("\\", "")
    assert f"{rule}evaluation drawn" in card
    assert (tmp_path / "s.csv").read_text() == "id,wnid,synset,have,wanted\n"
    if form == "release":
        assert Release(tmp_path / "best").manifest.selection == f"{rule}evaluation drawn"
        assert verify(tmp_path / "best") == []


def test_an_export_refuses_what_chooses_nothing(sdwn: Sdwn, release: Release) -> None:
    export = ("export", release.paths.root, "no", "--format", "parquet")
    none = sdwn(*export, "--where", "clip_score > 99", code=2).stderr
    assert "0 of 8 images fulfil --where clip_score > 99" in none
    assert "--order-by and --short need --per-synset" in sdwn(
        *export, "--order-by", "clip_score", code=2
    ).stderr.replace("\n", " ")
    inside = release.paths.root / "short.csv"
    refused = sdwn(*export, "--per-synset", 3, "--short", inside, code=2).stderr
    assert f"--short {inside}: it lies in the release" in refused


def test_what_falls_short_is_made_and_chosen_again(
    sdwn: Sdwn, release: Release, tmp_path: Path
) -> None:
    """The whole circle: choose, extend by the list, merge with what is known, choose again."""
    root = release.paths.root
    chosen = ("--where", "correct", "--per-synset", 3, "--order-by", "confidence DESC")
    first = sdwn("export", root, "best", "--format", "release", *chosen, "--short", "short.csv")
    assert "synsets with fewer than 3  1" in first.stdout
    next_ = f"next: sdwn extend {root} RUN --only short.csv --set images_per_synset=8"
    assert next_ in first.stdout
    (line,) = csv.DictReader((tmp_path / "short.csv").read_text().splitlines())
    assert line == {
        "id": GONDOLA,
        "wnid": GONDOLA,
        "synset": "gondola.n.02",
        "have": "1",
        "wanted": "3",
    }
    planned = sdwn.json("extend", root, "more", *next_.split("RUN ")[1].split())
    assert planned["images"] == 4
    paths = RunPaths(tmp_path / "more")
    generate(paths.root, range(len(read_plan(paths).shards)))
    sdwn("merge", "more", "--release", "grown")
    grown = Release(tmp_path / "grown")
    assert len(grown) == 12
    assert grown.paths.evaluation("drawn").earlier.exists(), "nothing is classified twice"
    evaluation(grown, predictions(grown, lambda _: 1.0))
    again = sdwn.json("export", "grown", "better", "--format", "release", *chosen)
    assert (again["images"], again["short"]) == (6, 0)


# --- The page -------------------------------------------------------------------------------------
def test_the_questions_and_choices_of_the_page_work(sdwn: Sdwn, release: Release) -> None:
    text = (REPOSITORY / "docs/measures.md").read_text().partition("## Ask and choose")[2]
    assert all(f"`{name}`" in text for name in SCORES)
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if " RELEASE " in line]
    commands = [shlex.split(line.partition(" > ")[0], comments=True)[1:] for line in lines]
    asked = [words for words in commands if words[0] in ("query", "export")]
    assert len(asked) >= 5
    for words in asked:
        done = sdwn(*(release.paths.root if word == "RELEASE" else word for word in words))
        assert done.stdout
        if "--json" in words:
            assert json.loads(done.stdout)["rows"]
