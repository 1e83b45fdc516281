"""Tables of prompts that users bring, and prompts from templates."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sdwn.errors import SdwnError, UsageError
from sdwn.paths import RunPaths
from sdwn.planning.plan import image_seed, make_plan, read_plan, write_plan
from sdwn.planning.tables import fill_prompts, read_prompts, read_table, with_article
from sdwn.wordnet.corpus import Synset, WordNet

from conftest import REPOSITORY, Sdwn, hide_wordnet, noise_config


def written(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    if isinstance(content, pa.Table):
        pq.write_table(content, path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        lines = content if isinstance(content, str) else "\n".join(map(json.dumps, content))
        path.write_text(lines, encoding="utf-8")
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_table(path, (), 10).to_pylist()
    return found


# What a prompt, a label or an own column may hold; HDF5 ends text at a NUL.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1)
IDS = NAMES.filter(lambda name: name not in (".", "..") and len(name.encode()) <= 150)
OWN = {
    "own_text": TEXT,
    "own_int": st.integers(-(2**63), 2**63 - 1),
    "own_float": st.floats(allow_nan=False, allow_infinity=False),
    "own_bool": st.booleans(),
    "own_list": st.lists(TEXT),
}
ROW = st.fixed_dictionaries(
    {"id": IDS, "prompt": TEXT.filter(str.strip)},
    optional={
        "label": TEXT.map(lambda text: f"my {text}"),
        "images": st.integers(1, 10_000),
        "seed": st.integers(0, 2**63 - 1),
        "negative_prompt": TEXT,
        **{name: st.none() | values for name, values in OWN.items()},
    },
)


def folded(row: dict[str, Any]) -> str:
    # As Arrow's utf8_lower, letter by letter.
    composed = unicodedata.normalize("NFC", row["id"])
    return "".join(one.lower() if len(one.lower()) == 1 else one for one in composed)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(ROW, min_size=1, max_size=8, unique_by=folded), kind=st.sampled_from("cjp"))
def test_every_value_of_a_table_comes_back(
    rows: list[dict[str, Any]], kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("table")
    if kind == "c":
        # It has no lists, and text that is a number is one.
        texts = {"own_text": "text {}".format}
        rows = [
            {name: texts.get(name, lambda v: v)(v) for name, v in row.items() if name != "own_list"}
            for row in rows
        ]
    names = sorted({name for row in rows for name in row})
    table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
    if kind == "c":
        pyarrow.csv.write_csv(table, folder / "table.csv")
        path = folder / "table.csv"
    elif kind == "j":
        path = written(folder, "table.jsonl", rows)
    else:
        path = written(folder, "table.parquet", table)
    for row, found in zip(rows, rows_of(path), strict=True):
        assert found["id"] == row["id"]
        assert found["prompts"] == [row["prompt"]]
        assert (found["images"], found["seed"]) == (row.get("images", 10), row.get("seed"))
        assert found["label"] == row.get("label", "")
        assert found["negative_prompt"] == row.get("negative_prompt")
        for name in names:
            if name.startswith("own_"):
                assert found[name] == row.get(name), name


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "ID,prompt\n1,a\n", "expected the column id, found 'ID', 'prompt'"),
        ("a.csv", "name,text\n1,a\n", "expected the columns id and prompt, found 'name', 'text'"),
        ("a.csv", "id,prompt,id\n1,a,2\n", "column 'id': expected one column of this name"),
        ("a.csv", "id,prompt,x,X\n1,a,2,3\n", "column 'X': expected one column of this name, wha"),
        ("a.csv", ",id,prompt\n0,1,a\n", "column '': sdwn has a column of this name"),
        ("a.csv", "id,prompt,Seed\n1,a,2\n", "column 'Seed': sdwn has a column of this name; ren"),
        ("a.csv", "id,prompt,width\n1,a,2\n", "column 'width': sdwn has a column of this name; r"),
        ("a.csv", "id,prompt\n", "expected rows, found none"),
        ("a.csv", "", "cannot be read: ArrowInvalid: CSV parse error: Empty CSV file"),
        (
            "a.csv",
            "id,prompt\n1,a dog, asleep\n2,b\n3,a,b,c\n",
            "CSV parse error: Row #2: Expected 2 columns, got 3: 1,a dog, asleep",
        ),
        ("a.csv", 'id,prompt\n1,"a dog\n2,b\n', "a quotation mark is never closed"),
        ("a.csv", b"id,prompt\n1,caf\xe9\n", "expected text in UTF-8, save it as such"),
        ("a.csv", "id,prompt\n1,\n2,a\n3,  \n", "expected a prompt; found row 2, row 4 ('  ')"),
        ("a.csv", "id,prompt\n,a\n", "expected an id; found row 2"),
        ("a.csv", "id,prompt\r1,a\r2,\r", "expected a prompt; found row 3"),
        ("a.csv", '"' + "x" * 200_000, "cannot be read: Error: field larger than field limit"),
        (
            "a.jsonl",
            '{"id": "a", "prompt": "b", "negative_prompt": "c\\u0000"}',
            "expected a negative prompt; found row 1 ('c\\x00')",
        ),
        (
            "a.jsonl",
            '{"id": "a", "prompt": "b", "x": ' + "[" * 900 + "]" * 900 + "}",
            "or lists of one of these; found list<item: list<item: ",
        ),
        (
            "a.csv",
            "id,prompt\na/b,a\n..,a\n",
            'can name a folder: no "/", at most 150 bytes; found',
        ),
        ("a.csv", "id,prompt\n" + 76 * "é" + ",a\n", "at most 150 bytes; found row 2 ('ééé"),
        ("a.csv", 'id,prompt\n"a\tb",a\n', "found row 2 ('a\\tb')"),
        ("a.csv", f"id,prompt\n{'a' * 150},a\n{'b' * 151},a\n", "at most 150 bytes; found row 3"),
        ("a.csv", "id,prompt,plan\n1,a,2\n", "column 'plan': sdwn has a column of this name"),
        (
            "a.csv",
            "id,prompt\nA,a\nb,a\nc,a\nb,a\na,a\n",
            "ids that differ, and in more than case; found row 2 ('A'), row 3 ('b'), row 5 ('b'), ",
        ),
        ("a.csv", "id,prompt\ne\u0301,a\n\u00e9,a\n", "and in more than case; found row 2 ("),
        (
            "a.csv",
            "id,prompt\n" + "".join(f"{n % 50},a\n" for n in range(100)),
            "found row 2 ('0'), row 3 ('1'), row 4 ('2'), row 5 ('3'), row 6 ('4') and 95 more",
        ),
        (
            "a.csv",
            "id,prompt,images\n1,a,0\n2,a,2.5\n",
            "from 1 to 10,000; found row 2 (0.0), row 3",
        ),
        ("a.csv", "id,prompt,images\n1,a,9\n2,a,ten\n", "from 1 to 10,000; found row 3 ('ten')"),
        (
            "a.csv",
            "id,prompt,seed\n1,a,-1\n",
            "from 0 to 9,223,372,036,854,775,807; found row 2 (-1",
        ),
        (
            "a.csv",
            f"id,prompt,seed\n1,a,{2**63}\n",
            "9,223,372,036,854,775,807; found row 2 (9.2233",
        ),
        (
            "a.jsonl",
            '{"id": "a", "prompt": "b", "seed": 9007199254740993.0}',
            "found row 1 (900719925",
        ),
        (
            "a.jsonl",
            '{"id": "a", "prompt": "b", "seed": true}',
            "column 'seed': expected text or whole numbers, found bool",
        ),
        (
            "a.jsonl",
            '{"id": 1.5, "prompt": "b"}',
            "column 'id': expected text or whole numbers, found dou",
        ),
        ("a.jsonl", '{"id": "a", "prompt": "b", "x": {"y": 1}}', "found struct<y: int64>"),
        (
            "a.jsonl",
            '{"id": "a", "prompt": "b", "x": NaN}',
            "expected finite numbers, or nothing; found nan or",
        ),
        (
            "a.jsonl",
            '{"id": "a", "prompt": "b", "x": [NaN]}',
            "expected finite numbers, or nothing; found nan o",
        ),
        (
            "a.jsonl",
            '{"id": "a", "prompt": "b\\u0000"}',
            "expected a prompt; found row 1 ('b\\x00')",
        ),
        (
            "a.jsonl",
            '{"id": "a", "prompt": "b"}\n{"id"',
            "JSON parse error: Missing a colon after a",
        ),
        (
            "a.jsonl",
            '{"id": "a", "prompt": "b"}\n{"id": 7, "prompt": "b"}',
            "Column(/id) changed from string to number in row 2",
        ),
        (
            "a.jsonl",
            '\nnull\n{"id": "a", "prompt": "b"}',
            "expected an object, found null in row 1",
        ),
        ("a.jsonl", '[{"id": "a", "prompt": "b"}]', "changed from object to array in row 1"),
        (
            "a.jsonl",
            '{"id": "a", "prompt": "%s"}\n' % ("b" * 2_000_000) + '{"id": "c", "prompt": 1}',
            "Column(/prompt) changed from string to number in row 2",
        ),
        (
            "a.parquet",
            pa.table({"id": ["a"], "prompt": pa.array([b"\xff"]).view(pa.string())}),
            "Invalid UTF8 sequence",
        ),
        ("a.parquet", b"no table", "damaged: ArrowInvalid: Parquet magic bytes not found"),
        (
            "a.parquet",
            pa.table({"id": ["a"], "prompt": ["b"], "t": pa.array([0], pa.timestamp("us"))}),
            "column 't': expected text, numbers, truth values, or lists of one of these; found",
        ),
        ("a.xlsx", b"", "expected .csv, .tsv, .jsonl, .ndjson or .parquet"),
    ],
)
def test_a_faulty_table_is_refused_by_row_or_column(
    tmp_path: Path, name: str, content: Any, expected: str
) -> None:
    with pytest.raises(SdwnError) as error:
        rows_of(written(tmp_path, name, content))
    assert expected in str(error.value)
    assert str(error.value).startswith(str(tmp_path / name))


def test_faults_of_several_kinds_are_told_at_once(tmp_path: Path) -> None:
    text = (
        "id,prompt,label,wnid,synset\n"
        "1,a,crane,,\n"  # two ImageNet classes have it
        "2,a,crane,n03126707,\n"  # no matter: the wnid says which
        "3,a,,n02391049,dog.n.01\n"  # two synsets
        "4,a,,,dgo.n.01\n"
        "5,,,n00000001,\n"
    )
    with pytest.raises(UsageError) as error:
        read_table(written(tmp_path, "t.csv", text), (), 10)
    noun = "a noun of WordNet 3.0, such as dog.n.01 or n02084071; found"
    assert [line.removeprefix(f"{tmp_path}/t.csv: ") for line in str(error.value).split("\n")] == [
        "expected a prompt; found row 6",
        f"expected as wnid {noun} row 6 ('n00000001')",
        f"expected as synset {noun} row 5 ('dgo.n.01')",
        "expected wnid and synset to be the same one; found row 4 ('n02391049')",
        "expected a label of one ImageNet class only; write a wnid into the column wnid; "
        "found row 2 ('crane: n02012849 or n03126707')",
    ]


def test_synsets_and_labels_of_classes_are_looked_up(tmp_path: Path) -> None:
    text = (
        "id,prompt,label,wnid,synset\n"
        "a,x,,,dog.n.01\nb,x,my zebra,n02391049,\nc,x,Sea_Lion,,\nd,x,sorrel horse,,\ne,x,,,\n"
        'f,x,"tench, Tinca tinca",,\n'
    )
    found = read_table(written(tmp_path, "t.csv", text), (), 10).to_pylist()
    names = ("label", "wnid", "synset", "imagenet_class")
    assert [tuple(row[name] for name in names) for row in found] == [
        ("dog", "n02084071", "dog.n.01", None),
        ("my zebra", "n02391049", "zebra.n.01", 340),
        ("Sea_Lion", "n02077923", "sea_lion.n.01", 150),
        ("sorrel horse", None, None, None),
        ("", None, None, None),
        ("tench, Tinca tinca", "n01440764", "tench.n.01", 0),
    ]
    assert found[1]["lemmas"] == "zebra"
    assert found[0]["definition"].startswith("a member of the genus Canis")


def test_text_has_several_lines_in_a_long_file_too(tmp_path: Path) -> None:
    prompt = "a line\n" * 20
    content = "id,prompt\n" + "".join(f'{n},"{prompt}"\n' for n in range(10_000))
    found = rows_of(written(tmp_path, "t.csv", content))
    assert {(row["prompts"][0], len(found)) for row in found} == {(prompt, 10_000)}


def test_values_of_text_stay_text(tmp_path: Path) -> None:
    day = "2026-01-31"
    days = [{"id": day, "prompt": day, "before": 1, "day": day, "days": [day]}]
    (found,) = rows_of(written(tmp_path, "t.jsonl", days))
    assert list(found)[-3:] == ["before", "day", "days"]
    assert [found[name] for name in ("id", "prompts", "day", "days")] == [
        day,
        [day],
        day,
        [day],
    ]
    text = "id;prompt;code;share\r\n007;NA;01;0.5\r\n8;null;2;\r\n"
    first, second = rows_of(written(tmp_path, "t.csv", text.encode("utf-16")))
    assert (first["id"], first["prompts"], first["code"]) == ("007", ["NA"], "01")
    assert (second["id"], second["prompts"], second["share"]) == ("8", ["null"], None)
    assert first["share"] == 0.5


def test_only_some_rows_are_kept_in_the_order_of_the_table(tmp_path: Path) -> None:
    path = written(tmp_path, "t.csv", "id,prompt\nx,1\ny,2\nz,3\n")
    assert read_table(path, ("z", "x"), 1)["id"].to_pylist() == ["x", "z"]
    with pytest.raises(UsageError, match=r"only: .*t\.csv has no row with the id q"):
        read_table(path, ("z", "q"), 1)


# --- Prompts of synsets --------------------------------------------------------------------------
def some_synsets(wordnet: WordNet, *names: str) -> tuple[Synset, ...]:
    return tuple(map(wordnet.synset, names))


def test_written_prompts_of_synsets(tmp_path: Path, wordnet: WordNet) -> None:
    synsets, said = some_synsets(wordnet, "dog.n.01", "zebra.n.01"), list[str]()
    rows = [("zebra.n.01", "one"), ("n02391049", "two"), ("cat.n.01", "three"), ("dog.n.01", "one")]
    lines = [{"synset": name, "prompt": prompt, "note": 1} for name, prompt in rows]
    path = written(tmp_path, "p.jsonl", lines)
    found = read_prompts(path, synsets, said.append)
    assert found == [("one",), ("one", "two")]
    assert said == ["p.jsonl: left out 1 row of synsets outside the catalog"]
    more = (*synsets, *some_synsets(wordnet, "teapot.n.01", "yawl.n.02"))
    with pytest.raises(UsageError, match=r"2 of 4 synsets have no prompt: teapot\.n\.01, yawl"):
        read_prompts(path, more, said.append)
    nobody = written(
        tmp_path, "q.jsonl", [{"wnid": None, "prompt": "a"}, {"wnid": "a", "prompt": ""}]
    )
    with pytest.raises(UsageError, match=r"(?s)expected a prompt; found row 2.*expected as wnid"):
        read_prompts(nobody, synsets, said.append)


def test_images_take_templates_in_turn(wordnet: WordNet) -> None:
    config = noise_config(prompt=["a photo of {a_lemma}", "{definition}"])
    plan = make_plan(config, some_synsets(wordnet, "zebra.n.01"))
    definition = wordnet.synset("zebra.n.01").definition
    found = [(one.prompt_number, one.prompt) for one in plan.specs(plan.shards[0])]
    assert found == [(0, "a photo of a zebra"), (1, definition)] * 2 + [(0, "a photo of a zebra")]


def test_hypernyms_are_fields(wordnet: WordNet) -> None:
    dog, *tops = some_synsets(wordnet, "dog.n.01", "entity.n.01")
    templates = ["{lemma}, a kind of {hypernym}", "{hypernyms}"]
    assert list(fill_prompts(templates, [dog])) == [
        ("dog, a kind of domestic animal", "domestic animal, canine")
    ]
    with pytest.raises(UsageError, match=r"entity\.n\.01 has no hypernym to fill into"):
        list(fill_prompts(templates, [dog, *tops]))
    with pytest.raises(UsageError, match='"a photo" has no field'):
        list(fill_prompts(["{lemma}", "a photo"], [dog]))
    with pytest.raises(UsageError, match="has no field"):
        make_plan(noise_config(prompt=None), (dog,))


@pytest.mark.parametrize(
    "noun",
    [
        *("an electric guitar", "a unicorn", "an hour angle", "a European ash", "a ewe", "an heir"),
        *("a one-way street", "an oncologist", "an umbrella", "an usher", "a user", "a Ugandan"),
        *("a uniform", "an unilluminated room", "an X-ray tube", "an L-plate", "a B-girl"),
        *("a UNIX guru", "a U-boat", "a RAM", "an LP", "a CD-ROM", "an honest woman", "a houri"),
        *("an mRNA", "an n-type semiconductor", "a uakari", "a eucalyptus", "an S"),
    ],
)
def test_the_article_is_that_of_the_sound(noun: str) -> None:
    assert with_article(noun.partition(" ")[2]) == noun


# --- From a table to a plan ----------------------------------------------------------------------
def blocks(kind: str) -> list[str]:
    page = (REPOSITORY / "docs/concepts.md").read_text()
    return re.findall(rf"^```{kind}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def test_the_examples_of_the_docs_are_planned(
    tmp_path: Path, sdwn: Sdwn, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, captions = blocks("csv")
    written(tmp_path, "prompts.csv", table)
    written(tmp_path, "prompts.jsonl", blocks("json")[0])
    written(tmp_path, "captions.csv", captions)
    noise = ["--set", "model.name=builtin:noise", "--set", "generation.precision=fp32"]
    for number, text in enumerate(blocks("yaml")):
        written(tmp_path, f"{number}.yaml", text)
        sdwn("plan", tmp_path / f"{number}.yaml", tmp_path / f"run{number}", *noise)
    own, several, captioned = (read_plan(RunPaths(tmp_path / f"run{n}")) for n in range(3))
    assert (len(own.concepts), own.images, own.unit) == (5, 9, "concept")
    assert own.table["score"].to_pylist() == [0.5, 1.0, 0.25, None, 0.75]
    assert [one.synset for one in own.concepts][:3] == ["zebra.n.01", "zebra.n.01", None]
    guitar = next(one for one in several.concepts if one.synset == "electric_guitar.n.01")
    assert guitar.prompts[:2] == (
        "a photo of an electric guitar",
        "a drawing of an electric guitar, a kind of guitar",
    )
    assert [len(one.prompts) for one in captioned.concepts] == [1, 2]
    lines = ["--set", "catalog={table: prompts.jsonl}"]
    monkeypatch.chdir(tmp_path)
    shown = sdwn("plan", tmp_path / "0.yaml", tmp_path / "lines", *noise, *lines).stdout
    assert "2; 1 with a synset (1 different)" in shown
    assert "source (string), score (double), tags (list<item: string>)" in shown
    assert "4, 1 to 3 a concept" in shown


def test_a_thousand_rows_of_several_kinds_become_a_plan(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {
            "id": f"caption-{n:04d}",
            "prompt": f"caption {n // 2}",  # each of two rows
            "source": "abc"[n % 3],
            "tags": [str(n), "x"],
            **({"label": f"my thing {n % 7}"} if n % 5 else {}),
            **({"seed": 10**18 + n, "images": 1 + n % 2} if n % 4 < 2 else {}),
        }
        for n in range(1000)
    ]
    table = written(tmp_path, "captions.jsonl", rows)
    config = noise_config(catalog={"table": str(table)}, images_per_synset=2, seed=5)
    paths = RunPaths(tmp_path / "run")
    write_plan(make_plan(config), paths)
    plan = read_plan(paths)
    found = {(s.concept.id, s.number): s for shard in plan.shards for s in plan.specs(shard)}
    assert len(found) == plan.images == sum(row.get("images", 2) for row in rows)
    for row in rows:
        count = row.get("images", 2)
        for number in range(count):
            spec = found[row["id"], number]
            derived = image_seed(row.get("seed", 5), row["id"], number)
            own = "seed" in row and count == 1
            assert (spec.prompt, spec.concept.label) == (row["prompt"], row.get("label", ""))
            assert spec.seed == (row["seed"] if own else derived)
    assert plan.table["tags"].to_pylist() == [row["tags"] for row in rows]
    types = {"id": pa.string(), "prompt": pa.string(), "label": pa.string(), "seed": pa.int64()}
    types |= {"images": pa.int64(), "source": pa.string(), "tags": pa.list_(pa.string())}
    again = written(tmp_path, "again.parquet", pa.Table.from_pylist(rows, pa.schema(types)))
    other = noise_config(catalog={"table": str(again)}, images_per_synset=2, seed=5)
    assert make_plan(other).digest == plan.digest, "content, not a file"


def test_a_table_without_synsets_needs_no_wordnet(
    tmp_path: Path, sdwn: Sdwn, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_wordnet(monkeypatch, tmp_path)
    written(tmp_path, "t.csv", "id,prompt,label\n1,a,my thing\n2,b,\n")
    written(tmp_path, "c.yaml", 'catalog: {table: t.csv}\nmodel: {name: "builtin:noise"}\n')
    assert "concepts          2\n" in sdwn("plan", "c.yaml", "run").stdout
    (tmp_path / "t.csv").write_text("id,prompt,label\n1,a,zebra\n")
    assert "found no WordNet" in sdwn("plan", "c.yaml", "other", code=1).stderr
