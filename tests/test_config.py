from __future__ import annotations

import json
from pathlib import Path

import pytest
from sdwn.config import RunConfig, load_config
from sdwn.errors import UsageError

from conftest import REPOSITORY

SMALL = """
catalog: {name: closure}
model: {name: "builtin:noise"}
storage: {images_per_shard: 100}
"""


def load(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return load_config(path, overrides)


SHIPPED = (REPOSITORY / "configs").glob("*.yaml")
CONFIGS = {path for path in SHIPPED if "\nvary:" not in path.read_text()}  # the others are sweeps


@pytest.mark.parametrize("path", sorted(CONFIGS), ids=str)
def test_every_shipped_config_loads(path: Path) -> None:
    assert load_config(path).images_per_synset == 10


def test_paper_pins_what_the_paper_used() -> None:
    config = load_config(REPOSITORY / "configs/paper.yaml")
    generation = config.generation
    assert config.model.name == "CompVis/stable-diffusion-v1-4"
    assert (generation.height, generation.width) == (512, 512)
    assert (generation.num_inference_steps, generation.guidance_scale) == (50, 7.5)
    assert (generation.scheduler, generation.precision) == ("PNDMScheduler", "fp16")
    assert generation.safety_checker
    assert config.prompt == "{definition}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            SMALL.replace("catalog", "catalogue"),
            "unknown key 'catalogue'; valid keys here: catalog,",
        ),
        (SMALL + "sede: 3", "unknown key 'sede'; valid keys here: catalog, prompt,"),
        (SMALL + "generation: {steps: 3}", "unknown key 'generation.steps'; valid keys here: hei"),
        (
            SMALL.replace('noise"', 'noise", lora: [{name: a, weight: 1}]'),
            "unknown key 'model.lora.0.weight'; valid keys here: name, file, revision, scale",
        ),
        (SMALL.replace('noise"', 'noise", lora: [a]'), "lora.0: Input should be a section of set"),
        (SMALL + "generation: {compile: fast}", "compile: Input should be 'blocks' or 'whole', f"),
        (SMALL + "generation: {height: 500}", "generation.height: Input should be a multiple of 8"),
        (SMALL.replace("noise", "tinny"), "no model 'builtin:tinny'; built in: builtin:tiny, bui"),
        (SMALL.replace("name: closure", "only: dog.n.01"), "Input should be a list, as [a, b]"),
        (SMALL.replace("images_per_shard", "quality: 9, images_per_shard"), "quality is JPEG's al"),
        (SMALL + "images_per_synset: 0", "images_per_synset: Input should be greater than 0"),
        (SMALL + "seed: -1", "seed: Input should be greater than or equal to 0, found -1"),
        (SMALL + "seed: 1\nseed: 2", 'found duplicate key "seed"'),
        (SMALL + "prompt: 'a {lemna}'", "{lemna}'; valid fields: {definition}, {lemma}"),
        (SMALL + "prompt: 'a {lemma'", "prompt: not a template"),
        (SMALL + "prompt: ['{lemma}', 'a {lemna}']", "{lemna}'; valid fields: {definition}"),
        (
            SMALL + "prompt: ['{lemma}', '{lemma}']",
            "prompt: expected a list of templates, each of t",
        ),
        (SMALL + "prompt: []", "prompt: expected a list of templates, each of them once"),
        (SMALL + "prompts: a.csv\nprompt: '{lemma}'", "prompts come from one of prompts, prompt; "),
        (
            SMALL.replace("name: closure", "table: a.csv") + "prompt: '{lemma}'",
            "prompts come from one of catalog.table, prompt; leave one out",
        ),
        (
            SMALL.replace("name: closure", "table: a.csv") + "prompts: b.csv",
            "prompts come from one of catalog.table, prompts; leave one out",
        ),
        (
            SMALL.replace("name: closure", "name: closure, table: a.csv"),
            "give at least one of synsets, name, roots, file; or a table alone",
        ),
        ("catalog: {name: closure}", "model: Field required"),
        (SMALL + "prompt: '{lemma!r}'", "prompt: not a template"),
        (SMALL + "prompt: '{definition:>99999999}'", "prompt: not a template"),
        (SMALL + "prompt: '{definition.__class__}'", "prompt: not a template"),
        (SMALL + "prompt: ' '", "not a template such as {definition}: ' '"),
        (SMALL + 'prompt: "a\\r{lemma}"', "prompt: not a template"),
        (SMALL + 'prompt: "{lemma}\\0"', "prompt: not a template"),
        (SMALL + 'generation: {negative_prompt: "a\\0"}', "negative_prompt: String should match"),
        (SMALL + "generation: {guidance_scale: .inf}", "Input should be a finite number"),
        (SMALL + "seed: true", "seed: Input should be a valid integer, found True"),
        (SMALL + "seed: 2020-13-45", "not valid YAML: month must be"),
        ("a: &a [1]\nb: *a", "YAML aliases are not supported"),
        ("[" * 600 + "]" * 600, "not valid YAML: maximum recursion depth"),
        ("catalog: [unclosed", "not valid YAML"),
        ("- a list", "expected a mapping of settings, found list"),
        (
            SMALL.replace("name: closure", "only: [dog.n.01]"),
            "give at least one of synsets, name, roots",
        ),
        (SMALL + "generation: {batch_size: 9999999999}", "generation.batch_size: Input should be"),
        (
            SMALL.replace("images_per_shard: 100", "shard_hours: 1e300, images_per_second: 1e300"),
            "storage.shard_hours: Input should be less than or equal to 1000000",
        ),
        (
            SMALL.replace("images_per_shard: 100", "codec: jpeg, quality: 0"),
            "storage.quality: Input should be greater than or equal to 1, found 0",
        ),
        (SMALL.replace("images_per_shard: 100", "shard_hours: 2"), "give either images_per_shard"),
    ],
)
def test_a_mistake_is_told_in_one_line_with_what_is_valid(
    tmp_path: Path, text: str, expected: str
) -> None:
    with pytest.raises(UsageError) as error:
        load(tmp_path, text)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_synsets_and_a_model_suffice(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("catalog: {synsets: [zebra]}\nmodel: {name: builtin:miniature}\n")
    config = load_config(path)
    assert config.catalog.synsets == ("zebra",)
    assert config.storage.images_per_shard == 1000
    written_out = load_config(path, ("storage.images_per_shard=1000",))
    assert written_out == config, "one plan, whether the default is written out or not"


def test_one_template_is_the_same_with_and_without_a_list(tmp_path: Path) -> None:
    listed = load(tmp_path, SMALL, 'prompt=["a {lemma}"]')
    assert listed == load(tmp_path, SMALL, "prompt=a {lemma}")
    several = load(tmp_path, SMALL, 'prompt=["a {lemma}", "{definition}"]')
    assert several.prompt == ("a {lemma}", "{definition}")


def test_files_of_prompts_start_at_the_folder_of_the_config(tmp_path: Path) -> None:
    # Its rows may have other numbers of images, so that any size of a batch will do.
    table = SMALL.replace("name: closure", "table: mine.csv")
    config = load(tmp_path, table, "generation.batch_size=16")
    assert config.catalog.table == tmp_path / "mine.csv"
    config = load(tmp_path, SMALL + "prompts: mine.csv")
    assert (config.prompts, config.prompt) == (tmp_path / "mine.csv", None)
    again = RunConfig.model_validate(config.model_dump(mode="json"))
    assert again == config, "what a plan records is read back"


def test_a_path_that_is_typed_starts_where_it_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.txt").write_text("zebra.n.01\n")
    monkeypatch.chdir(tmp_path)
    assert (
        load_config(REPOSITORY / "configs/demo.yaml", ("catalog.file=mine.txt",)).catalog.file
        == tmp_path / "mine.txt"
    )


def test_the_schema_for_editors_is_that_of_the_settings() -> None:
    written = json.loads((REPOSITORY / "configs/schema.json").read_text())
    schema = "json.dumps(RunConfig.model_json_schema(), indent=1)"
    anew = f"import json; from sdwn.config import RunConfig; print({schema})"
    assert written == RunConfig.model_json_schema(), f"python -c '{anew}' > configs/schema.json"


def test_overrides_are_read_as_yaml_and_checked(tmp_path: Path) -> None:
    config = load(tmp_path, SMALL, "generation.batch_size=20", "generation.negative_prompt=blurry")
    assert config.generation.batch_size == 20
    assert config.generation.negative_prompt == "blurry"
    with pytest.raises(UsageError, match=r"config\.yaml with --set seed=x: seed: Input should"):
        load(tmp_path, SMALL, "seed=x")
    with pytest.raises(UsageError, match="expected key=value"):
        load(tmp_path, SMALL, "generation.batch_size")
    with pytest.raises(UsageError, match=r"unknown key 'generation\.bacth_size'"):
        load(tmp_path, SMALL, "generation.bacth_size=20")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_config_may_be_saved_by_any_editor(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(SMALL.replace("\n", "\r\n").encode(encoding))
    assert load_config(path) == load(tmp_path, SMALL)
    path.write_bytes(SMALL.encode() + b"# caf\xe9")
    with pytest.raises(UsageError, match=r"config\.yaml: expected text in UTF-8, save it as such"):
        load_config(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.yaml: cannot be read"):
        load_config(tmp_path / "nowhere.yaml")


def test_paths_in_a_config_start_at_its_folder(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    text = SMALL.replace("name: closure", "file: mine.txt").replace("builtin:noise", "my-model")
    config = load(tmp_path, text)
    assert config.catalog.file == tmp_path / "mine.txt"
    assert config.model.name == str(tmp_path / "my-model")
    assert load(tmp_path, SMALL, "model.name=org/model").model.name == "org/model"
    (tmp_path / "below").mkdir()
    (tmp_path / "link").symlink_to("my-model")
    for way in ("../my-model", "../link", str(tmp_path / "link")):
        found = load(tmp_path / "below", SMALL.replace("builtin:noise", way)).model.name
        assert found == str(tmp_path / "my-model"), "one plan, whatever leads to the folder"
    # Groups are a file here, or else the name of some that are shipped.
    (tmp_path / "mine.yaml").write_text("dogs: dog.n.01")
    for groups, expected in (("mine.yaml", str(tmp_path / "mine.yaml")), ("default", "default")):
        found = load(tmp_path, SMALL, f"evaluation.groups={groups}").evaluation.groups
        assert found == expected


@pytest.mark.parametrize(
    "line",
    [
        "prompt: {gloss}",
        "prompt: {lemma}, {definition}",
        "prompt: {lemma} in the wild",
        "prompt: {lemma",
        'prompt: "{lemma}" {definition}',
        "generation: {negative_prompt: {ugly}}",
    ],
)
def test_braces_without_quotes_are_told_to_need_them(tmp_path: Path, line: str) -> None:
    with pytest.raises(UsageError, match="needs quotes in YAML, as in prompt"):
        load(tmp_path, f"{line}\n{SMALL}")


def test_a_fault_without_braces_does_not_speak_of_quotes(tmp_path: Path) -> None:
    for line in ("seed: [1", "seed: seven", "prompt: [1]"):
        with pytest.raises(UsageError) as caught:
            load(tmp_path, f"{SMALL}{line}")
        assert "quotes" not in str(caught.value)


@pytest.mark.parametrize("line", ["prompt: 5", "prompt: {lemma}"])
def test_a_prompt_that_is_neither_text_nor_a_list_is_one_mistake(tmp_path: Path, line: str) -> None:
    with pytest.raises(UsageError, match="prompt: ") as caught:
        load(tmp_path, f"{SMALL}{line}")
    assert "more)" not in str(caught.value)
