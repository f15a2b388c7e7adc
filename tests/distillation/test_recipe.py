"""Recipes: what is shipped validates, and whatever is wrong is named before anything is loaded."""

import copy
import json
from pathlib import Path

import pytest
import yaml
from teachers import FAMILIES

from hf_kernel_ffn import InputError
from hf_kernel_ffn.checkpoint_code.settings import DEFAULT_SETTINGS
from hf_kernel_ffn.distillation import load_recipe
from hf_kernel_ffn.distillation.recipe import CONVERSION_KEYS
from hf_kernel_ffn.distillation.run import _require_same_recipe

SHIPPED = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
MINIMAL = {
    "teacher": "some/teacher",
    "data": {"train": "books.txt"},
    "stages": [
        {"name": "layer-wise", "tokens": 1000, "learning_rate": 0.01},
        {"name": "logits", "tokens": 2000, "learning_rate": 0.001},
    ],
    "output_dir": "out",
}


@pytest.fixture
def recipe(tmp_path):
    """Read the minimal recipe with overrides; its file."""
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(MINIMAL))

    def read(*overrides):
        return load_recipe(file, list(overrides))

    return read


@pytest.fixture
def refusal(recipe):
    """The one line that refuses these overrides."""

    def read(*overrides):
        with pytest.raises(InputError) as caught:
            recipe(*overrides)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return read


def test_three_operating_points_per_family_are_shipped():
    points = ("faithful", "readable", "mercer")
    expected = {f"{family}-{point}.yaml" for family in FAMILIES for point in points}
    real = {
        "smollm2-faithful.yaml",
        "smollm2-conic.yaml",
        "smollm2-readable.yaml",
        "smollm2-very-readable.yaml",
        "gemma3-faithful.yaml",
        "minilm-faithful.yaml",
    }
    assert expected | real | {"bert-faithful.yaml", "qwen3-faithful.yaml"} == {
        file.name for file in SHIPPED
    }


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_shipped_recipes_are_valid(file):
    recipe, raw = load_recipe(file), yaml.safe_load(file.read_text())
    settings = recipe.kernel_settings()
    for key, value in raw.get("kernel_ffn", {}).items():
        if key not in CONVERSION_KEYS:
            assert getattr(settings, key) == value
    assert [stage.name for stage in recipe.stages] == [stage["name"] for stage in raw["stages"]]
    assert (
        sum(stage.tokens for stage in recipe.stages) <= 5_000_000
    )  # as much as the README's figures may take


def test_what_is_left_out_has_a_default(recipe):
    read = recipe()
    assert read.student is None and read.lora is None and read.dtype == "float32" and read.seed == 0
    assert read.data.sources == ["books.txt"]
    assert read.kernel_settings() == DEFAULT_SETTINGS


def test_a_recipe_without_settings_takes_what_convert_takes(recipe):
    """Layers are no settings; any other key says that rows are free, unless it is of tied rows."""
    tied = {"kernel_ffn.layers=0-1", "kernel_ffn.pieces=3", "kernel_ffn.values=product"}
    free = {"kernel_ffn.kernel=yat", "kernel_ffn.expansion=2", "kernel_ffn.rows=free"}
    for override in tied | free:
        settings = recipe(override).kernel_settings()
        assert settings.rows == ("tied" if override in tied else "free"), override


def test_a_wrong_key_is_named_with_the_nearest_right_one(refusal):
    wrong = {
        "teachr=x": "unknown key 'teachr', did you mean 'teacher'?",
        "data.sequence_lenght=5": (
            "data: unknown key 'sequence_lenght', did you mean 'sequence_length'?"
        ),
        "stages.0.learnin_rate=1": (
            "stages.0: unknown key 'learnin_rate', did you mean 'learning_rate'?"
        ),
        "stages.1.temprature=1": "stages.1: unknown key 'temprature', did you mean 'temperature'?",
        "kernel_ffn.simplx=softmax": "kernel_ffn: unknown key 'simplx', did you mean 'simplex'?",
        "kernel_ffn.layer=0": "kernel_ffn: unknown key 'layer', did you mean 'layers'?",
        "lora.rnk=3": "lora: unknown key 'rnk', did you mean 'rank'?",
    }
    for override, reason in wrong.items():
        assert reason in refusal(override)


def test_a_key_like_no_other_gets_the_list(refusal):
    message = refusal("kernel_ffn.zzz=1")
    assert "unknown key 'zzz', expected one of layers, allocate, kernel" in message


@pytest.mark.parametrize(
    "override, where",
    [
        ("teacher=5", "teacher"),
        ("teacher=[a]", "teacher"),
        ("data=5", "data"),
        ("data.train=7", "data.train"),
        ("data.sequence_length=long", "data.sequence_length"),
        ("data.sequence_length=1", "data.sequence_length"),
        ("stages=none", "stages"),
        ("stages=[]", "stages"),
        ("stages.0=layer-wise", "stages.0"),
        ("stages.0.name=layerwise", "stages.0.name"),
        ("stages.1.tokens=many", "stages.1.tokens"),
        ("stages.1.tokens=0", "stages.1.tokens"),
        ("stages.1.tokens=10.5", "stages.1.tokens"),
        ("stages.0.learning_rate=-1", "stages.0.learning_rate"),
        ("stages.0.learning_rate=.nan", "stages.0.learning_rate"),
        ("stages.0.warmup=1", "stages.0.warmup"),
        ("lora=yes please", "lora"),
        ("lora.rank=0", "lora.rank"),
        ("kernel_ffn=half-yat", "kernel_ffn"),
        ("kernel_ffn.layers=[0, one]", "kernel_ffn"),
        ("kernel_ffn.layers=true", "kernel_ffn"),
        ("kernel_ffn.layers={0: 1}", "kernel_ffn"),
        ("kernel_ffn.temperature=warm", "kernel_ffn"),
        ("seed=one", "seed"),
        ("dtype=float8", "dtype"),
        ("output_dir=", "output_dir"),
        ("save_every_tokens=0", "save_every_tokens"),
        ("trackers=wandb", "trackers"),
    ],
)
def test_a_wrong_type_or_value_is_named(refusal, override, where):
    message, value = refusal(override), override.partition("=")[2]
    assert f": {where}" in message
    assert value in message or f"{yaml.safe_load(value)!r}" in message


@pytest.mark.parametrize("key", ["teacher", "data", "stages", "output_dir"])
def test_a_missing_key_is_named(tmp_path, key):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in MINIMAL.items() if k != key}))
    with pytest.raises(InputError, match=f": {key}: Field required"):
        load_recipe(file)


def test_any_key_can_be_overridden(recipe):
    read = recipe(
        "stages.0.tokens=600000",
        "stages.1.cross_entropy=0.5",
        "data.train=[a.txt, b.jsonl]",
        "data.train.1=c.parquet",
        "kernel_ffn.kernel=yat",
        "lora.rank=3",
        "seed=7",
        "student=runs/x=1",
        "stages.0.learning_rate=1e-3",
    )
    assert read.stages[0].tokens == 600_000 and read.stages[0].learning_rate == 1e-3
    assert read.stages[1].tokens == 2000 and read.stages[1].cross_entropy == 0.5
    assert read.data.sources == ["a.txt", "c.parquet"]
    assert read.kernel_settings().kernel == "yat"
    assert read.lora is not None and read.lora.rank == 3 and read.lora.alpha == 16
    assert read.seed == 7 and read.student == "runs/x=1"


def test_the_last_override_counts(recipe):
    assert recipe("seed=1", "seed=2").seed == 2
    assert recipe("lora.rank=3", "lora=null").lora is None


@pytest.mark.parametrize("index", ["2", "-1", "first", "1.5"])
def test_an_index_out_of_range_is_named(refusal, index):
    message = refusal(f"stages.{index}.tokens=1")
    if index != "1.5":
        assert f"'stages.{index}.tokens', expected a number below 2 after 'stages'" in message


@pytest.mark.parametrize("override", ["seed", "", "=3", "stages..tokens=1", ".seed=1", "seed.=1"])
def test_a_malformed_override_is_named(refusal, override):
    assert f"found {override!r}, expected dotted.key=value" in refusal(override)


def test_an_override_that_is_no_yaml_is_named(refusal):
    assert "for seed" in refusal("seed=[1")


@pytest.mark.parametrize(
    "overrides, reason",
    [
        (["kernel_ffn.kernel=linear"], "'linear'"),
        (["kernel_ffn.simplex=argmax"], "simplex='argmax'"),
        (["kernel_ffn.simplex=top-k"], "top_k=None"),
        (["kernel_ffn.top_k=4"], "only 'top-k'"),
        (
            ["kernel_ffn.values=gated", "kernel_ffn.init=polarised"],
            "values 'gated' with init 'polarised'",
        ),
        (["kernel_ffn.expansion=9"], "expansion=9"),
        (["kernel_ffn.kernel=nowhere.py:mine"], "'nowhere.py'"),
    ],
)
def test_a_refused_combination_says_why(refusal, overrides, reason):
    message = refusal(*overrides)
    assert "kernel_ffn: " in message and reason in message


@pytest.mark.parametrize(
    "content",
    [
        b"teacher: [x",
        b"teacher: x\n\tdata: y",
        b"\xff\xfe",
        b"teacher: 2020-13-45",
        b"teacher: *nobody",
        b"!!python/none x: 1",
    ],
)
def test_an_unreadable_file_is_named(tmp_path, content):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_recipe(file)
    assert (
        str(file) in str(caught.value)
        and "YAML" in str(caught.value)
        and "\n" not in str(caught.value)
    )


@pytest.mark.parametrize("content", ["", "- teacher", "teacher"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, content):
    file = tmp_path / "recipe.yaml"
    file.write_text(content)
    with pytest.raises(InputError, match="expected a mapping"):
        load_recipe(file, ["seed=1"])


@pytest.mark.parametrize("name", ["nowhere.yaml", "."])
def test_a_file_that_is_not_there_is_named(tmp_path, name):
    with pytest.raises(InputError, match="unreadable"):
        load_recipe(tmp_path / name)


def test_a_state_of_an_earlier_version_lacks_what_is_new_in_a_recipe(recipe):
    now = json.loads(recipe().model_dump_json())
    before = copy.deepcopy(now)
    for name in ("chat", "bos"):
        del before["data"][name]
    _require_same_recipe(before, now)
    with pytest.raises(InputError, match="use the same recipe"):
        _require_same_recipe(before, {**now, "data": {**now["data"], "chat": True}})


def test_allocate_is_true_or_false(recipe, refusal):
    assert recipe("kernel_ffn.allocate=true").kernel_ffn["allocate"] is True
    assert "found allocate 'some'" in refusal("kernel_ffn.allocate=some")
