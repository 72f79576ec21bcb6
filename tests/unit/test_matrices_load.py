"""Reading matrices: names, layers, overrides, local files, and every mistake with its line."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from matrices.errors import UserError
from matrices.expand import expand
from matrices.language.presets import PRESETS
from matrices.language.settings import BARE, LEAVES, SCHEMAS, example, resolve, validate
from matrices.load import Matrix, load, shipped


def write(directory: Path, text: str) -> Path:
    path = directory / "m.yaml"
    path.write_text(text)
    return path


def read(directory: Path, text: str, *overrides: str, seeds: int | None = None) -> Matrix:
    return load(write(directory, text), overrides, seeds)


def test_sections_bare_and_dotted_names_say_the_same(tmp_path: Path) -> None:
    for text in (
        "train: {steps: 5}\nadapter:\n  rank: 4\nmodel: gpt2\ndata: imdb\n",
        "train.steps: 5\nadapter.rank: 4\nmodel.name: gpt2\ndata.source: imdb\n",
        "steps: 5\nrank: 4\nmodel: {name: gpt2}\nsource: imdb\n",
    ):
        matrix = read(tmp_path, text)
        assert matrix.constants == {
            "train.steps": 5,
            "adapter.rank": 4,
            "model.name": "gpt2",
            "data.source": "imdb",
        }


def test_the_other_keys(tmp_path: Path) -> None:
    matrix = read(
        tmp_path, "name: a.b-c_1\nquestion: Why?\nscore_base: false\ntimeout_seconds: 90\n"
    )
    assert (matrix.name, matrix.question) == ("a.b-c_1", "Why?")
    assert (matrix.score_base, matrix.timeout_seconds) == (False, 90.0)
    bare = read(tmp_path, "rank: 8\n")
    assert (bare.name, bare.question, bare.score_base, bare.timeout_seconds) == (
        "m",
        "",
        True,
        None,
    )


def test_lists_become_tuples_and_whole_numbers_floats(tmp_path: Path) -> None:
    matrix = read(
        tmp_path,
        "tasks: [a, b]\nlearning_rate: 1\naxes: {target_modules: [qv, [q_proj, v_proj]]}\n",
    )
    assert matrix.constants["evaluate.tasks"] == ("a", "b")
    assert isinstance(matrix.constants["train.learning_rate"], float)
    assert matrix.axes == {"adapter.target_modules": ("qv", ("q_proj", "v_proj"))}


def test_scientific_notation_is_a_number(tmp_path: Path) -> None:
    assert read(tmp_path, "learning_rate: 1e-4\n").constants == {"train.learning_rate": 1e-4}


def test_bare_names_are_those_only_one_section_has() -> None:
    assert BARE["rank"] == "adapter.rank"
    assert BARE["seed"] == "seed"
    # In two sections; a matrix key; sections; misleading; filled in by tunebench.
    assert not {"revision", "name", "model", "data", "batch_size", "fingerprint"} & BARE.keys()
    assert set(BARE.values()) <= SCHEMAS.keys()


# A profile's example is a path, and a matrix reads what lies there.
@pytest.mark.parametrize("dotted", [dotted for dotted in LEAVES if dotted != "profile"])
def test_every_example_in_a_message_is_right(dotted: str) -> None:
    from matrices.files.yaml_lines import parse, plain

    validate(dotted, plain(parse(example(dotted), "x")), "x")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_hold_settings(name: str) -> None:
    for key, value in PRESETS[name].items():
        assert resolve(key, "x") == key
        assert validate(key, value, "x") == value


MISTAKES = [
    # Unknown names.
    ("a: 1\nstpes: 5\n", 1, "a: unknown setting; 'python -m matrices.reference' lists them"),
    ("rank: 8\nstpes: 5\n", 2, "stpes: unknown setting; did you mean 'steps'"),
    ("trian:\n  steps: 5\n", 1, "trian: unknown setting; did you mean 'train'"),
    ("train:\n  stpes: 5\n", 2, "train.stpes: unknown setting; did you mean 'steps'"),
    ("train.step: 5\n", 1, "train.step: unknown setting; did you mean 'train.steps'"),
    (
        "train:\n  max_length: 5\n",
        2,
        "train.max_length: unknown setting; it belongs to data: data.max_length",
    ),
    (
        "axes: {use_dora: [true, false]}\n",
        1,
        "use_dora: unknown setting; pass it through: adapter.lora_config: "
        "[{use_dora: true}, {use_dora: false}]",
    ),
    (
        "modules_to_save: [lm_head]\n",
        1,
        "modules_to_save: unknown setting; pass it through: "
        "adapter.lora_config: {modules_to_save: [lm_head]}",
    ),
    ("lora_alpha: 5\n", 1, "lora_alpha: unknown setting; tunebench calls it adapter.alpha"),
    (
        "train:\n  per_device_train_batch_size: 5\n",
        2,
        "train.per_device_train_batch_size: unknown setting; tunebench calls it "
        "train.micro_batch_size",
    ),
    (
        "quantization:\n  zzz: 5\n",
        2,
        "quantization.zzz: unknown setting; quantization has quant_type, double_quant, "
        "quant_storage, kbit_preparation",
    ),
    ("axes:\n  ranks: [8]\n", 2, "ranks: unknown setting; did you mean 'rank'"),
    ("exclude:\n  - {ranks: 8}\n", 2, "ranks: unknown setting; did you mean 'rank'"),
    ("include:\n- rank: 8\n  sed: 1\n", 3, "sed: unknown setting; did you mean 'seed'"),
    ("exlude: []\n", 1, "exlude: unknown setting; did you mean 'exclude'"),
    (
        "batch_size: 8\n",
        1,
        "batch_size: ambiguous; write evaluate.batch_size (lm-eval's) or train.micro_batch_size",
    ),
    ("data: {fingerprint: x}\n", 1, "data.fingerprint: filled in by tunebench; remove it"),
    # Wrong type or value.
    (
        "rank: many\n",
        1,
        'adapter.rank: "many" is not a whole number of at least 1; for example rank: 16',
    ),
    ("rank: 8.0\n", 1, "adapter.rank: 8.0 is not a whole number of at least 1"),
    ("rank: true\n", 1, "adapter.rank: true is not a whole number of at least 1"),
    ("rank: 0\n", 1, "adapter.rank: 0 is not a whole number of at least 1"),
    ("rank: null\n", 1, "adapter.rank: null is not a whole number"),
    ("rank: [8]\n", 1, "adapter.rank: [8] is not a whole number"),
    ("alpha: a\n", 1, 'adapter.alpha: "a" is not a whole number of at least 1 or null; for ex'),
    ("dropout: 1\n", 1, "adapter.dropout: 1 is not a number of at least 0 and below 1; for"),
    ("packing: yes\n", 1, 'data.packing: "yes" is not true or false; for example packing: true'),
    ("model:\n  revision: 1e10\n", 2, "model.revision: 10000000000.0 is not text or null; for"),
    ("model: ''\n", 1, 'model.name: "" is not text that is not empty; for example name: smollm2'),
    ("tasks: hellaswag\n", 1, 'evaluate.tasks: "hellaswag" is not a list of text; for example ta'),
    ("sft_config: 3\n", 1, "train.sft_config: 3 is not a mapping; for example sft_config: {argu"),
    (
        "quant_type: nf5\n",
        1,
        "quantization.quant_type: \"nf5\" is not one of nf4, fp4; did you mean 'nf4'",
    ),
    ("method: qlra\n", 1, 'method: "qlra" is not one of base, full, lora, qlora; did you mean'),
    (
        "target_modules: all_linear\n",
        1,
        'adapter.target_modules: "all_linear" is not one of qv, attention, mlp, all-linear or a '
        "list of text that is not empty; did you mean 'all-linear'?",
    ),
    ("target_modules: []\n", 1, "adapter.target_modules: [] is not one of"),
    (
        "preset: lowmemory\n",
        1,
        'preset: "lowmemory" is not one of low-memory, balanced, high-quality; did you mean ',
    ),
    ("preset: 3\n", 1, "preset: 3 is not one of low-memory, balanced, high-quality; for example"),
    (f"optimizer: {'x' * 80}\n", 1, f'train.optimizer: "{"x" * 56}... is not one of'),
    ("adapter: 8\n", 1, "adapter: is a section of settings, not 8; write for example adapter: {"),
    ("data: [a]\n", 1, 'data.source: ["a"] is not text'),
    ("model: null\n", 1, "model.name: null is not text"),
    # Values that only stand in an axis, an exclude or an include, and would collapse away.
    ("method: full\naxes:\n  quant_type:\n    - nf4\n    - int8\n", 5, "quantization.quant_type: "),
    ("exclude:\n  - method: full\n    rank: [8, 16]\n", 3, "adapter.rank: [8, 16] is not a whole"),
    ("include:\n  - {method: full, rank: -1}\n", 2, "adapter.rank: -1 is not a whole number"),
    ("method: full\nrank: 0\n", 2, "adapter.rank: 0 is not a whole number"),
    # Axes.
    ("axes: [1]\n", 1, "axes: is a mapping of settings to lists, e.g. axes: {rank: [8, 64]}"),
    ("axes:\n", 1, "axes: is a mapping of settings to lists"),
    (
        "axes:\n  rank: 8\n",
        2,
        "adapter.rank: an axis is a list of values, e.g. [16], not 8; a single value is a "
        "constant, outside of axes",
    ),
    (
        "axes:\n  seed: [0]\n  rank: []\n",
        3,
        "adapter.rank: an axis without values makes no cells; give some, e.g. [16], or remove it",
    ),
    ("axes:\n  rank:\n  - 8\n  - 4\n  - 8\n", 5, "adapter.rank: 8 stands twice in this axis"),
    ("axes:\n  learning_rate: [1, 1.0]\n", 2, "train.learning_rate: 1.0 stands twice in this"),
    ("axes: {tasks: [a, b]}\n", 1, 'evaluate.tasks: "a" is not a list of text'),
    ("axes: {adapter: [1]}\n", 1, "adapter: is a section of settings, not [1]"),
    ("axes: {name: [a]}\n", 1, "name: unknown setting"),
    # Twice.
    (
        "rank: 8\ntrain: {steps: 5}\nadapter:\n  rank: 4\n",
        4,
        "adapter.rank: given twice, first at {path}:1; keep one",
    ),
    (
        "adapter: {rank: 8}\nadapter.rank: 4\n",
        2,
        "adapter.rank: given twice, first at {path}:1; keep one",
    ),
    ("model: a\nmodel.name: b\n", 2, "model.name: given twice, first at {path}:1; keep one"),
    ("rank: 8\nrank: 8\n", 2, "rank: given twice, first at {path}:1; keep one"),
    (
        "rank: 8\naxes:\n  adapter.rank: [1, 2]\n",
        3,
        "adapter.rank: an axis here and a constant at {path}:1; keep one",
    ),
    (
        "axes:\n  preset: [balanced]\npreset: balanced\n",
        2,
        "preset: an axis here and a constant at {path}:3; keep one",
    ),
    # exclude and include.
    ("exclude: {rank: 8}\n", 1, "exclude: is a list of settings, e.g. exclude: [{method: full"),
    ("include:\n  - rank\n", 2, "include: an entry names settings, e.g. {method: full, rank: 64}"),
    ("exclude:\n  - {}\n", 2, "exclude: an entry names settings, e.g. {method: full, rank: 64}"),
    # The rest.
    ("name: a b\n", 1, "name: \"a b\" is not made of letters, digits, '.', '_' and '-'; write"),
    ("name: ../x\n", 1, 'name: "../x" is not made of'),
    ("name: [a]\n", 1, 'name: ["a"] is not made of'),
    ("question: [a]\n", 1, 'question: ["a"] is not text; put it in quotes'),
    ("score_base: 1\n", 1, "score_base: 1 is not true or false"),
    ("timeout_seconds: 0\n", 1, "timeout_seconds: 0 is not a number of seconds above 0; write"),
    ("timeout_seconds: true\n", 1, "timeout_seconds: true is not a number"),
    ("timeout_seconds: [1]\n", 1, "timeout_seconds: [1] is not a number"),
    # Local files.
    (
        "rank: 8\nmodel: ./nowhere\n",
        2,
        "model.name: './nowhere' ({dir}/nowhere) does not exist; correct the path",
    ),
    ("data:\n  source: rows.jsonl\n", 2, "data.source: 'rows.jsonl' ({dir}/rows.jsonl) does not"),
    ("data: /no/such/place\n", 1, "data.source: '/no/such/place' does not exist; correct the path"),
    ("model: m.yaml\n", 1, "model.name: 'm.yaml' ({dir}/m.yaml) is not a directory"),
    (
        "model: m.json\n",
        1,
        "model.name: 'm.json' ({dir}/m.json) is not a directory; a config.json alone goes under "
        "model: {config: ...}",
    ),
    (
        "rank: 8\nmodel:\n  config: none.json\n",
        3,
        "model.config: 'none.json' ({dir}/none.json) does not exist; correct the path",
    ),
    ("model: {config: .}\n", 1, "model.config: '.' ({dir}) is not a file; name the config.json"),
    ("model: {config: m.yaml}\n", 1, "model.config: {dir}/m.yaml: not JSON: "),
    ("model: {config: m.json}\n", 1, "model.config: {dir}/m.json: model_type: is missing; a conf"),
    ("model: {config_overrides: 3}\n", 1, "model.config_overrides: 3 is not a mapping"),
    (
        "config: m.json\n",
        1,
        "config: ambiguous; write data.config (of a hub dataset) or model.config (a config.json)",
    ),
    ("parallelism: tensor\n", 1, 'parallelism: "tensor" is not one of single, ddp, fsdp, fsdp1'),
    ("devices: 0\n", 1, "devices: 0 is not a whole number of at least 1"),
    ("train: {devices: 2}\n", 1, "train.devices: unknown setting; it belongs to the top level"),
    ("num_processes: 2\n", 1, "num_processes: unknown setting; tunebench calls it devices"),
    ("data: .\n", 1, "data.source: '.' ({dir}) is not a file ending in .json, .jsonl, .csv, .p"),
    ("data: m.yaml\n", 1, "data.source: 'm.yaml' ({dir}/m.yaml) is not a file ending in"),
    ("include_path: tasks\n", 1, "evaluate.include_path: 'tasks' ({dir}/tasks) does not exist"),
    ("axes:\n  model:\n    - gpt2\n    - ../none\n", 4, "model.name: '../none' ("),
    ("include:\n  - {data: ./none.csv}\n", 2, "data.source: './none.csv' ("),
]


@pytest.mark.parametrize(("text", "line", "message"), MISTAKES, ids=[m[2][:50] for m in MISTAKES])
def test_a_mistake_is_one_line_with_place_key_value_and_fix(
    tmp_path: Path, text: str, line: int, message: str
) -> None:
    path = write(tmp_path, text)
    (tmp_path / "m.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        load(path)
    message = message.replace("{path}", str(path)).replace("{dir}", str(tmp_path))
    assert str(caught.value).startswith(f"{path}:{line}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "# only a comment\n", "[]\n", "{}\n", "rank\n"])
def test_a_file_that_is_no_matrix(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="a matrix is a mapping of keys"):
        read(tmp_path, text)


def test_an_empty_model_directory(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError) as caught:
        read(tmp_path, "rank: 8\nmodel: model\n")
    assert str(caught.value) == (
        f"{tmp_path}/m.yaml:2: model.name: {tmp_path}/model holds no files"
    )


def test_local_paths_start_at_the_file_and_are_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    for directory, text in ((project, "in project"), (elsewhere, "elsewhere")):
        (directory / "model").mkdir(parents=True)
        (directory / "model" / "config.json").write_text(text)
        (directory / "rows.csv").write_text(text)
    monkeypatch.chdir(elsewhere)
    text = "model: ./model\naxes:\n  data: [../project/rows.csv, imdb]\n"
    matrix = read(project, text)
    assert matrix.constants["model.name"] == str(project / "model")
    assert matrix.axes["data.source"] == (str(project / "rows.csv"), "imdb")
    rows = str(project / "rows.csv")
    assert matrix.fingerprints[rows] == hashlib.sha256(b"in project").hexdigest()
    assert set(matrix.fingerprints) == {rows, str(project / "model")}

    overridden = read(project, text, "model=model", "data=rows.csv")
    assert overridden.constants["model.name"] == str(elsewhere / "model")
    assert overridden.constants["data.source"] == str(elsewhere / "rows.csv")
    mine = overridden.fingerprints[str(elsewhere / "rows.csv")]
    assert mine == hashlib.sha256(b"elsewhere").hexdigest()


def test_a_hub_id_is_never_silently_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("Qwen/Qwen3-1.7B", "gpt2", "deep/down/below"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for key in ("model", "data"):
        with pytest.raises(UserError) as caught:
            read(tmp_path, f"rank: 8\n{key}: Qwen/Qwen3-1.7B\n")
        assert f"m.yaml:2: {key}." in str(caught.value)
        assert f"also there as {tmp_path}/Qwen/Qwen3-1.7B; write ./Qwen/Qwen3-1.7B" in str(
            caught.value
        )
    for name in ("./Qwen/Qwen3-1.7B", "deep/down/below"):
        matrix = read(tmp_path, f"model: {name}\n")
        assert matrix.constants["model.name"] == str(tmp_path / name)
        assert matrix.notes == ()
    # Also the name of a directory beside the matrix, as it has always been; but it is said.
    matrix = read(tmp_path, "model: gpt2\n")
    assert matrix.constants["model.name"] == str(tmp_path / "gpt2")
    said = f"{tmp_path}/m.yaml:1: model 'gpt2' is the directory {tmp_path}/gpt2; write ./gpt2"
    assert matrix.notes == expand(matrix).notes == (f"{said} to say so",)


def test_names_that_are_no_paths_stay_names(tmp_path: Path) -> None:
    matrix = read(tmp_path, "model: Qwen/Qwen3-1.7B\ndata: python-reference\n")
    assert matrix.constants == {
        "model.name": "Qwen/Qwen3-1.7B",
        "data.source": "python-reference",
    }
    assert matrix.fingerprints == {}


def test_shipped_matrices_are_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert {"quickstart", "method-comparison", "quantization", "rank-targets"} <= set(shipped())
    assert load("quickstart").name == "quickstart"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("quikstart", "no matrix is called 'quikstart'; did you mean 'quickstart'?; shipped are "),
        ("zzz", "no matrix is called 'zzz'; shipped are method-comparison, parallelism, "),
        ("./zzz", "./zzz: no such file"),
        ("zzz.yaml", "zzz.yaml: no such file"),
        (Path("quickstart"), "quickstart: no such file"),
        (".", ".: is a directory; name a matrix file in it"),
    ],
)
def test_a_matrix_that_is_not_there(
    source: str | Path, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load(source)
    assert str(caught.value).startswith(message)


BASE = "rank: 8\naxes:\n  seed: [0, 1]\n  dropout: [0.0, 0.1]\n"


@pytest.mark.parametrize(
    ("overrides", "constants", "axes"),
    [
        (["rank=16"], {"adapter.rank": 16}, {"seed": (0, 1), "adapter.dropout": (0.0, 0.1)}),
        (["seed=5"], {"adapter.rank": 8, "seed": 5}, {"adapter.dropout": (0.0, 0.1)}),
        (
            ["rank=[8,16]"],
            {},
            {"seed": (0, 1), "adapter.dropout": (0.0, 0.1), "adapter.rank": (8, 16)},
        ),
        # A replaced axis stays where it was.
        (["seed=[7]"], {"adapter.rank": 8}, {"seed": (7,), "adapter.dropout": (0.0, 0.1)}),
        (
            ["adapter={rank: 2, alpha: null}", "dropout=1e-1"],
            {"adapter.rank": 2, "adapter.alpha": None, "adapter.dropout": 0.1},
            {"seed": (0, 1)},
        ),
        (
            ["tasks=[a, b]", "dropout=0"],
            {"adapter.rank": 8, "evaluate.tasks": ("a", "b"), "adapter.dropout": 0.0},
            {"seed": (0, 1)},
        ),
        (
            ["tasks=[[a], [b, c]]", "seed=0", "dropout=0"],
            {"adapter.rank": 8, "seed": 0, "adapter.dropout": 0.0},
            {"evaluate.tasks": (("a",), ("b", "c"))},
        ),
        (
            ["target_modules=[qv, [q_proj]]", "seed=0", "dropout=0"],
            {"adapter.rank": 8, "seed": 0, "adapter.dropout": 0.0},
            {"adapter.target_modules": ("qv", ("q_proj",))},
        ),
    ],
)
def test_overrides(
    tmp_path: Path,
    overrides: list[str],
    constants: dict[str, object],
    axes: dict[str, tuple[object, ...]],
) -> None:
    matrix = read(tmp_path, BASE, *overrides)
    assert matrix.constants == constants
    assert matrix.axes == axes
    assert [*matrix.axes] == [*axes]


def test_seeds_and_matrix_keys_on_the_command_line(tmp_path: Path) -> None:
    matrix = read(tmp_path, BASE, "timeout_seconds=5", "score_base=false", seeds=3)
    assert matrix.axes["seed"] == (0, 1, 2)
    assert (matrix.timeout_seconds, matrix.score_base) == (5.0, False)
    assert matrix.locate("seed") == "--seeds 3"


@pytest.mark.parametrize(
    ("overrides", "seeds", "message"),
    [
        (["rank"], None, "--set rank: write KEY=VALUE, e.g. --set rank=8 or --set rank=[8,64]"),
        (["=8"], None, "--set =8: write KEY=VALUE"),
        (["rnk=8"], None, "--set rnk=8: rnk: unknown setting; did you mean 'rank'"),
        (["rank=a"], None, '--set rank=a: adapter.rank: "a" is not a whole number of at least 1'),
        (["rank="], None, "--set rank=: adapter.rank: null is not a whole number"),
        (["rank=[8,8]"], None, "--set rank=[8,8]: adapter.rank: 8 stands twice in this axis"),
        (["rank=[]"], None, "--set rank=[]: adapter.rank: an axis without values"),
        (["rank=[8"], None, "--set rank=[8: not YAML: "),
        (["rank=8", "adapter.rank=9"], None, "--set adapter.rank=9: adapter.rank: given twice, "),
        (["name=x"], None, "--set name=x: name: can only be changed in the matrix itself"),
        (["exclude=[]"], None, "--set exclude=[]: exclude: can only be changed in the matrix"),
        (["score_base=3"], None, "--set score_base=3: score_base: 3 is not true or false"),
        (["model=./none"], None, "--set model=./none: model.name: './none' ("),
        ([], 0, "--seeds 0: seed: write a count of at least 1"),
        (["seed=1"], 2, "--seeds 2: seed: given twice, first at --set seed=1; keep one"),
    ],
)
def test_mistakes_on_the_command_line(
    tmp_path: Path, overrides: list[str], seeds: int | None, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, BASE, *overrides, seeds=seeds)
    assert str(caught.value).startswith(message)


def test_locate(tmp_path: Path) -> None:
    text = (
        "preset: balanced\nrank: 8\ntrain:\n  steps: 4\naxes:\n  seed: [0]\n"
        "include:\n  - method: full\n    dropout: 0\n"
    )
    matrix = read(tmp_path, text, "alpha=4")
    path = str(tmp_path / "m.yaml")
    expected = {
        "adapter.rank": f"{path}:2",
        "train.steps": f"{path}:4",
        "train.learning_rate": f"{path}:3",  # the section
        "seed": f"{path}:6",
        "method": f"{path}:8",
        "adapter.dropout": f"{path}:9",
        "adapter.alpha": "--set alpha=4",
        "data.source": f"{path}:1",  # the preset
        "axes": f"{path}:5",
    }
    assert {key: matrix.locate(key) for key in expected} == expected
    assert read(tmp_path, "rank: 8\n").locate("data.source") == path
