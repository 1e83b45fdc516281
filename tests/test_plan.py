from __future__ import annotations

import dataclasses
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sdwn.errors import IntegrityError, SdwnError, UsageError
from sdwn.paths import RunPaths
from sdwn.planning.plan import (
    Concept,
    Plan,
    image_seed,
    make_plan,
    plan_summary,
    read_plan,
    sample_prompts,
    write_plan,
)
from sdwn.planning.tables import (
    as_table,
    concept_rows,
    concept_table,
    fill_prompts,
    write_concepts,
)
from sdwn.wordnet.corpus import Synset, WordNet, read_catalog

from conftest import REPOSITORY, PlanRun, Sdwn, noise_config


def synsets(count: int) -> tuple[Synset, ...]:
    return tuple(
        Synset(f"n{number:08d}", f"thing.n.{number:02d}", (f"thing_{number}",), f"gloss {number}")
        for number in range(count)
    )


def same(one: Plan, other: Plan) -> bool:
    """Return whether two plans have the same digest and rows."""
    return one.digest == other.digest and bool(one.table.equals(other.table))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 90))
def test_shards_hold_every_image_once_in_order(count: int, each: int, size: int) -> None:
    config = noise_config(images_per_synset=each, storage={"images_per_shard": size})
    plan = make_plan(config, synsets(count))
    specs = [spec for shard in plan.shards for spec in plan.specs(shard)]
    expected = [(s.wnid, number) for s in synsets(count) for number in range(each)]
    assert [(spec.concept.wnid, spec.number) for spec in specs] == expected
    for shard in plan.shards:
        assert [s.index for s in plan.specs(shard)] == list(range(shard.images))


def test_a_seed_depends_on_run_synset_and_number_alone(wordnet: WordNet) -> None:
    seeds = {}
    for size in (5, 10, 100):
        config = noise_config(storage={"images_per_shard": size})
        plan = make_plan(config, read_catalog(config.catalog, wordnet))
        seeds[size] = {
            (spec.concept.wnid, spec.number): spec.seed
            for shard in plan.shards
            for spec in plan.specs(shard)
        }
    assert seeds[5] == seeds[10] == seeds[100]
    assert len(set(seeds[5].values())) == len(seeds[5])


@given(st.integers(0, 2**63 - 1), st.integers(0, 99_999_999), st.integers(0, 9999))
def test_a_seed_fits_a_signed_integer(seed: int, offset: int, number: int) -> None:
    assert 0 <= image_seed(seed, f"n{offset:08d}", number) < 2**63


def test_shard_size_from_time_and_speed() -> None:
    storage = {"images_per_shard": None, "shard_hours": 2, "images_per_second": 1.1}
    config = noise_config(images_per_synset=10, storage=storage)
    plan = make_plan(config, synsets(1000))
    assert plan_summary(plan)["images_per_shard"] == 7920


def test_a_plan_is_read_back_as_written(planned: PlanRun) -> None:
    paths, plan = planned()
    found = read_plan(paths)
    assert same(found, plan)
    assert (found.catalog, found.config, found.slice) == (plan.catalog, plan.config, plan.slice)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"prompt": "a {lemma}"},
        {"images_per_synset": 4},
        {"generation": {"guidance_scale": 3.0}},
        {"model": {"revision": "abc"}},
        {"storage": {"codec": "png"}},
        {"catalog": {"roots": ["corgi.n.01"]}},
    ],
)
def test_whatever_changes_images_changes_the_digest(
    planned: PlanRun, change: dict[str, Any]
) -> None:
    _, plan = planned("one")
    _, other = planned("two", **change)
    assert plan.digest != other.digest


def test_the_classifier_is_no_part_of_the_digest(planned: PlanRun) -> None:
    _, plan = planned("one")
    _, other = planned("two", evaluation={"model": "resnet50"})
    assert plan.digest == other.digest


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 7}, "belongs to another plan: seed: 0 here, 7 now; plan into a new folder"),
        ({"generation": {"negative_prompt": "blurry"}}, 'prompt: not set here, "blurry" now;'),
        (
            {"catalog": {"roots": ["corgi.n.01"]}},
            r'catalog\.roots: .* here, \["corgi.n.01"\] now; synsets: \d+ here, 2 now',
        ),
        (
            {"seed": 7, "storage": {"codec": "png"}},
            r'seed: .*; storage.codec: ".*" here, "png" now',
        ),
    ],
)
def test_a_run_folder_keeps_its_plan_and_names_what_differs(
    planned: PlanRun, changes: dict[str, Any], told: str
) -> None:
    paths, plan = planned()
    assert not write_plan(plan, paths), "the same plan again is no work"
    before = paths.plan.read_bytes()
    with pytest.raises(UsageError, match=told):
        planned("run", **changes)
    assert same(read_plan(paths), plan)
    assert paths.plan.read_bytes() == before


@pytest.mark.parametrize("name", ["settings", "summary"])
def test_a_plan_changed_by_hand_is_told_as_damaged(planned: PlanRun, name: str) -> None:
    paths, _ = planned()
    paths.plan.write_text(json.dumps({**json.loads(paths.plan.read_text()), name: None}))
    with pytest.raises(IntegrityError, match=r"plan\.json: damaged: "):
        planned("run")


def test_a_plan_that_cannot_be_read_is_told_with_what_to_do(sdwn: Sdwn, planned: PlanRun) -> None:
    paths, _ = planned()
    paths.plan.write_text("{")
    told = sdwn("status", paths.root, code=1).stderr
    assert "plan.json: damaged: JSONDecodeError" in told
    assert "; restore it, or plan the run into a new folder" in told


@pytest.mark.parametrize(
    ("setting", "told"),
    [("groups=nosuch", "no groups 'nosuch': expected a file"), ("model=''", "evaluation.model: ")],
)
def test_an_evaluation_that_cannot_be_is_refused_before_images_are_made(
    sdwn: Sdwn, setting: str, told: str
) -> None:
    refused = sdwn("plan", "demo", "run", "--set", f"evaluation.{setting}", code=2).stderr
    assert told in refused
    assert not (sdwn.folder / "run").exists()


def test_other_words_of_the_same_number_of_synsets_are_another_plan(planned: PlanRun) -> None:
    paths, plan = planned()
    row = dataclasses.replace(plan.concepts[0], definition="something else")
    other = dataclasses.replace(plan, concepts=(row, *plan.concepts[1:]))
    with pytest.raises(UsageError, match="its catalog holds other synsets, or other texts of them"):
        write_plan(other, paths)


def test_planning_again_takes_other_settings_of_the_evaluation_and_says_so(
    sdwn: Sdwn, planned: PlanRun
) -> None:
    paths, plan = planned(evaluation={"model": "paper"})
    config = {**noise_config().model_dump(mode="json"), "evaluation": {"model": "resnet50"}}
    (sdwn.folder / "c.yaml").write_text(json.dumps(config))
    told = " ".join(
        sdwn("plan", "c.yaml", paths.root, "--set", "evaluation.images=all").stderr.split()
    )
    assert "planned already" in told
    assert 'evaluation\'s settings are changed: model: "paper" before, "resnet50" now; ' in told
    assert 'images: "imagenet" before, "all" now' in told
    found = read_plan(paths)
    assert (found.config.evaluation.model, found.config.evaluation.images) == ("resnet50", "all")
    assert same(found, plan)
    before = paths.plan.read_bytes()
    told = sdwn("plan", "c.yaml", paths.root, "--set", "evaluation.images=all").stderr
    assert "changed" not in told
    assert paths.plan.read_bytes() == before


def test_a_plan_without_a_newer_setting_of_the_evaluation_has_its_default(planned: PlanRun) -> None:
    paths, plan = planned()
    content = json.loads(paths.plan.read_text())
    del content["evaluation"]["images"]
    paths.plan.write_text(json.dumps(content))
    told = list[str]()
    assert not write_plan(plan, paths, told.append)
    assert told == []


@pytest.mark.parametrize("template", ["a photo of a dog", "{{lemma}}"])
def test_a_template_that_gives_all_synsets_one_prompt_is_refused(sdwn: Sdwn, template: str) -> None:
    config = {**noise_config().model_dump(mode="json"), "prompt": template}
    (sdwn.folder / "c.yaml").write_text(json.dumps(config))
    assert "has no field" in sdwn("plan", "c.yaml", "run", code=2).stderr
    assert not (sdwn.folder / "run").exists()


def cut_short(text: str) -> str:
    return text[: len(text) // 2]


def with_version_9(text: str) -> str:
    return json.dumps({**json.loads(text), "format_version": 9})


def without(key: str) -> Callable[[str], str]:
    return lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != key})


def test_planning_again_restores_a_lost_table(planned: PlanRun) -> None:
    paths, plan = planned()
    paths.concepts.unlink()
    planned()
    assert same(read_plan(paths), plan)


def test_planning_over_a_plan_of_a_later_version_is_refused(planned: PlanRun) -> None:
    paths, plan = planned()
    paths.plan.write_text(later := with_version_9(paths.plan.read_text()))
    with pytest.raises(IntegrityError, match="found sdwn-plan 9; read it with the sdwn that wrote"):
        write_plan(plan, paths)
    assert paths.plan.read_text() == later


@pytest.mark.parametrize(
    ("name", "alter", "expected"),
    [
        ("plan", lambda text: text.replace('"seed": 0', '"seed": 1'), "was changed after planning"),
        ("plan", with_version_9, "expected sdwn-plan 2, found sdwn-plan 9"),
        ("plan", without("digest"), "plan.json: damaged: KeyError"),
        ("plan", without("settings"), "plan.json: damaged: KeyError"),
        ("plan", without("summary"), "plan.json: damaged: KeyError"),
        ("plan", cut_short, "plan.json: damaged"),
        ("plan", lambda _: "[]", "expected a JSON object, found list"),
    ],
)
def test_an_altered_plan_is_refused(
    planned: PlanRun, name: str, alter: Callable[[str], str], expected: str
) -> None:
    paths, _ = planned()
    path = getattr(paths, name)
    path.write_text(alter(path.read_text()))
    with pytest.raises(IntegrityError, match=expected):
        read_plan(paths)


def test_an_altered_table_is_refused_where_its_rows_are_read(planned: PlanRun) -> None:
    paths, plan = planned()
    whole, other = paths.concepts.read_bytes(), dataclasses.replace(plan.concepts[0], lemmas="cat")
    write_concepts(paths.concepts, as_table((other, *plan.concepts[1:])))
    with pytest.raises(IntegrityError, match=r"concepts.parquet was changed after planning"):
        list(read_plan(paths).specs(plan.shards[0]))
    paths.concepts.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(IntegrityError, match=r"concepts.parquet: damaged"):
        list(read_plan(paths).specs(plan.shards[0]))
    paths.concepts.unlink()
    with pytest.raises(IntegrityError, match=r"concepts.parquet: missing"):
        list(read_plan(paths).specs(plan.shards[0]))
    planned()
    assert same(read_plan(paths), plan), "planning again restores it"


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=9)
ROWS = st.lists(
    st.tuples(
        st.integers(1, 7),  # images
        st.none() | st.integers(0, 2**63 - 1),  # seed
        st.none() | TEXTS,  # negative prompt
        st.lists(TEXTS, min_size=1, max_size=3),  # prompts
        st.none() | st.integers(-9, 9),  # columns of the user
        st.none() | st.lists(st.none() | TEXTS, max_size=2),
    ),
    min_size=1,
    max_size=20,
)


def table_of(rows: list[Any]) -> pa.Table:
    images, seeds, negative, prompts, stars, tags = zip(*rows, strict=True)
    return concept_table(
        {
            "id": [f"row{number}" for number in range(len(rows))],
            "prompts": prompts,
            "images": images,
            "seed": seeds,
            "negative_prompt": negative,
            "stars": pa.array(stars, pa.int64()),
            "tags": pa.array(tags, pa.list_(pa.string())),
        }
    )


@settings(max_examples=25, deadline=None)
@given(ROWS, st.integers(1, 20))
def test_a_plan_of_any_rows_comes_back_with_its_shards_and_its_own_columns(
    rows: list[Any], size: int
) -> None:
    plan = Plan("t", noise_config(storage={"images_per_shard": size}), concept_rows(table_of(rows)))
    with tempfile.TemporaryDirectory() as folder:
        paths = RunPaths(Path(folder))
        assert write_plan(plan, paths)
        assert not write_plan(plan, paths)
        found = read_plan(paths)
        assert (found.shards, found.grid) == (plan.shards, plan.grid)
        assert (found.unit, found.images) == ("concept", sum(row[0] for row in rows))
        assert same(found, plan), "own columns included"
        assert found.concepts[2:5] == tuple(found.concepts)[2:5] == tuple(plan.concepts)[2:5]
        assert found.concepts[-1] == plan.concepts[len(rows) - 1]
    specs = [(spec, shard) for shard in plan.shards for spec in plan.specs(shard)]
    assert [spec.index for spec, _ in specs] == [i for s in plan.shards for i in range(s.images)]
    assert len({(spec.concept.id, spec.number) for spec, _ in specs}) == plan.images
    for spec, _ in specs:
        _, seed, negative, prompts, *_ = rows[int(spec.concept.id.removeprefix("row"))]
        assert spec.prompt == prompts[spec.number % len(prompts)] == prompts[spec.prompt_number]
        assert spec.negative_prompt == negative
        single = spec.concept.images == 1 and seed is not None
        run_seed = plan.config.seed if seed is None else seed
        derived = image_seed(run_seed, spec.concept.id, spec.number)
        assert spec.seed == (seed if single else derived)
    if plan.counts.each is None:
        before = itertools.accumulate([row[0] for row in rows], initial=0)
        shards = [there // size for there in list(before)[:-1]]
        starts = [row for row, shard in enumerate(shards) if shard not in shards[:row]]
        assert [shard.start for shard in plan.shards] == starts, "cut at multiples, in whole rows"


@pytest.mark.parametrize(
    ("changed", "held"),
    [
        ({}, True),
        ({"definition": 'in quotes: ",\r\n'}, True),
        ({"definition": "a carriage return: \r"}, None),  # as this Python's csv quotes it
        *[({name: None}, False) for name in ("synset", "wnid")],
        *[({name: 1}, False) for name in ("seed", "first_image", "images")],
        *[({name: "other"}, False) for name in ("id", "label", "negative_prompt")],
        ({"prompts": ("one", "two")}, False),
    ],
)
def test_rows_that_version_1_could_hold_keep_its_digest(
    changed: dict[str, Any], held: bool | None
) -> None:
    config = noise_config()
    texts = ("dog, domestic_dog", "a pet", ("a pet",), 0, config.images_per_synset)
    row = dataclasses.replace(Concept("n1", "dog", "n1", "dog.n.01", None, *texts), **changed)
    plan = Plan("t", config, concept_rows(as_table((row,))))
    assert held in (None, "synsets_sha256" in plan.identity)
    assert plan.digest


@settings(max_examples=40, deadline=None)
@given(ROWS, st.data())
def test_the_digest_covers_the_content_of_every_column_and_nothing_else(
    rows: list[Any], data: st.DataObject
) -> None:
    def digest(table: pa.Table) -> str:
        return Plan("t", noise_config(), concept_rows(table)).digest

    table = table_of(rows)
    content = digest(table)
    cut = data.draw(st.integers(0, len(table)))
    pieces = pa.concat_tables([table.slice(0, cut), table.slice(cut)])
    assert digest(pieces) == digest(pa.concat_tables([table, table]).slice(len(table))) == content
    others = table.set_column(1, "label", pa.array(["x"] * len(table)))
    renamed = table.rename_columns({"stars": "moons"})
    nulls = table.set_column(
        table.column_names.index("tags"), "tags", pa.nulls(len(table), pa.list_(pa.string()))
    )
    digests = {content, digest(others), digest(renamed), digest(table.drop_columns("stars"))}
    assert len(digests) == 4
    assert (digest(nulls) == content) == nulls.equals(table)


@pytest.mark.process
def test_who_counts_images_reads_no_row(planned: PlanRun) -> None:
    paths, _ = planned()
    paths.concepts.unlink()
    code = (
        "import pathlib, sys; from sdwn.paths import RunPaths\n"
        "from sdwn.planning.plan import read_plan\n"
        "for folder in sys.argv[1:]:\n"
        "    plan = read_plan(RunPaths(pathlib.Path(folder)))\n"
        "    assert plan.assigned_images == plan.images == plan.grid * len(plan.concepts) > 0\n"
        "    assert (plan.unit, len(plan.shards) > 1) == ('synset', True)\n"
        "assert 'pyarrow' not in sys.modules\n"
    )
    folders = [str(paths.root), str(REPOSITORY / "tests/files/stopped")]
    subprocess.run([sys.executable, "-c", code, *folders], check=True)


@pytest.mark.long
def test_a_task_reads_little_of_a_million_rows(tmp_path: Path) -> None:
    count = 1_000_000
    prompts = [[f"a photograph of thing {number}, in the evening sun"] for number in range(count)]
    rows = {"id": list(map(str, range(count))), "prompts": prompts, "images": [1] * count}
    config = noise_config(storage={"images_per_shard": 1000})
    paths = RunPaths(tmp_path)
    write_plan(Plan("table", config, concept_rows(concept_table(rows))), paths)
    before = bytes_read()
    plan = read_plan(paths)
    assert (len(plan.shards), plan.images) == (1000, count)
    assert bytes_read() - before < 100_000
    for index in (500, 501):
        specs = list(plan.specs(plan.shards[index]))
        assert [spec.prompt for spec in specs] == [p[0] for p in prompts[index * 1000 :][:1000]]
    assert bytes_read() - before < paths.concepts.stat().st_size / 10


def bytes_read() -> int:
    """Count what this process has read of files."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def test_sample_prompts_are_the_shortest_the_longest_and_some_others(planned: PlanRun) -> None:
    _, plan = planned(catalog={"roots": ["dog.n.01"]})
    shortest, longest, *others = sample_prompts(plan)
    lengths = [len(row.prompt) for row in plan.concepts]
    assert (len(shortest), len(longest), len(set(others))) == (min(lengths), max(lengths), 3)
    assert sample_prompts(plan) == [shortest, longest, *others]


def test_a_folder_without_a_plan_is_explained(tmp_path: Any) -> None:
    with pytest.raises(SdwnError, match="no plan here; make one with: sdwn plan"):
        read_plan(RunPaths(tmp_path))


def test_prompt_templates() -> None:
    dog = Synset("n02084071", "dog.n.01", ("dog", "domestic_dog"), "a member of the genus Canis")
    odd = dataclasses.replace(synsets(1)[0], definition="a {curly} thing")
    templates = ["{definition}", "{lemma}: {lemmas} ({synset})"]
    assert list(fill_prompts(templates, [dog, odd])) == [
        ("a member of the genus Canis", "dog: dog, domestic dog (dog.n.01)"),
        ("a {curly} thing", "thing 0: thing 0 (thing.n.00)"),
    ]
