"""Recipes: TOML, overrides, defaults, and refusals that name the key."""

import inspect
import json
import shlex
import tomllib
from dataclasses import fields

import pytest

from dualform.core.errors import ConfigError
from dualform.models.config import RATES
from dualform.models.presets import preset
from dualform.train.recipe import RECIPE_FILE, RECIPES, Data, Lora, Optim, Recipe, setting


def refused(*overrides, source="stdlib"):
    with pytest.raises(ConfigError) as error:
        Recipe.load(source, overrides)
    return str(error.value)


def test_a_recipe_file_says_what_it_says(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('model = "byte-lstm"\nsteps = 7\n[data]\nlength = 33\n[optim]\nbetas = [0.8, 0.9]\nlr = 1\n')
    recipe = Recipe.load(path)
    assert recipe == Recipe(model="byte-lstm", steps=7, data=Data(length=33), optim=Optim(betas=(0.8, 0.9), lr=1))
    assert recipe.minutes is None and recipe.data.batch == Data().batch


def test_the_built_in_recipe_names_every_key():
    """Those that are none by default in a comment; a key that is left at its default has the default's value."""
    options = tomllib.loads((RECIPES / "stdlib.toml").read_text())
    assert set(options) | {"steps", *RATES} == {f.name for f in fields(Recipe)}
    assert set(options["data"]) == {f.name for f in fields(Data)}
    assert set(options["optim"]) == {f.name for f in fields(Optim)}
    assert "# steps = " in (RECIPES / "stdlib.toml").read_text()
    recipe = Recipe.load("stdlib")
    assert recipe.data == Data() and recipe.optim == Optim() and recipe.lora == Lora()
    assert recipe == Recipe(minutes=2)


@pytest.mark.parametrize("table", [Recipe, Data, Optim, Lora])
def test_every_key_is_documented(table):
    text = (RECIPES / "stdlib.toml").read_text()
    for f in fields(table):
        assert f"\n    {f.name}: " in inspect.cleandoc(table.__doc__), f.name
        assert f"\n{f.name} = " in text or f"\n# {f.name} = " in text or f"[{f.name}]" in text, f.name


def test_overrides_are_toml_values_and_texts_need_no_quotes():
    overrides = ["optim.lr=3e-3", "out=runs/a b", 'data.path="text"', " data.length = 64 ", "optim.betas=[0, 0.5]"]
    recipe = Recipe.load("stdlib", overrides)
    assert (recipe.optim.lr, recipe.out, recipe.data.path, recipe.data.length) == (3e-3, "runs/a b", "text", 64)
    assert recipe.optim.betas == (0, 0.5)
    assert Recipe.load("stdlib", ["out=a=b"]).out == "a=b"
    assert Recipe.load("stdlib", ["seed=1", "seed=2"]).seed == 2


def test_minutes_and_steps_replace_one_another():
    assert Recipe.load("stdlib", ["minutes=10"]).minutes == 10
    steps = Recipe.load("stdlib", ["steps=10"])
    assert (steps.steps, steps.minutes) == (10, None)
    both = Recipe.load("stdlib", ["steps=10", "minutes=0.5"])
    assert (both.steps, both.minutes) == (10, 0.5)


def test_a_limit_that_is_replaced_is_told():
    told = []
    for overrides in (["steps=10"], ["steps=10", "minutes=1"], ["minutes=3"], ["seed=1"]):
        Recipe.load("stdlib", overrides, tell=told.append)
    assert told == ["steps = 10 replaces minutes = 2 of stdlib; set both to keep both limits"]


def test_a_preset_can_be_changed():
    recipe = Recipe.load("stdlib", ["model.d_model=64", "model.pattern=AM"])
    want = preset("byte-hybrid").to_dict() | {"d_model": 64, "pattern": "AM"}
    assert recipe.model == want
    assert Recipe(model=preset("byte-lstm"), steps=1).model == preset("byte-lstm").to_dict()  # type: ignore[arg-type]


def test_a_recipe_survives_json_and_a_run_folder(tmp_path):
    recipe = Recipe.load("stdlib", ["model.d_model=64", "steps=3", "optim.clip=0"])
    (tmp_path / RECIPE_FILE).write_text(json.dumps(recipe.to_dict()))
    assert Recipe.from_dict(recipe.to_dict()) == recipe == Recipe.load(tmp_path)
    assert Recipe.load(tmp_path, ["minutes=1"]).steps is None


@pytest.mark.parametrize(
    "override, named, near",
    [
        ("data.lenght=3", "'data.lenght'", "'length'"),
        ("stpes=3", "'stpes'", "'steps'"),
        ("optim.learning_rate=3", "'optim.learning_rate'", "known: lr"),
        ("lr=3", "'lr'", "did you mean 'optim.lr'? in a file it stands below [optim]"),
        ("d_model=3", "'d_model'", "'model.d_model'"),
        ("data=3", "data is 3", "[data]"),
        ("data.path.x=3", "data.path", "no table"),
    ],
)
def test_unknown_keys_are_named_with_the_nearest(override, named, near):
    message = refused(override)
    assert named in message and near in message


@pytest.mark.parametrize(
    "override, said",
    [
        ("steps=0", "steps is 0, expected at least 1"),
        ("steps=1.5", "steps is 1.5, expected a whole number, or none"),
        ('steps="5"', "steps is '5', expected a whole number, or none"),
        ("steps=true", "steps is True"),
        ("minutes=-1", "minutes is -1"),
        ("minutes=inf", "minutes is inf"),
        ("minutes=ten", "minutes is 'ten', expected a number"),
        ("seed=-1", "seed is -1"),
        ("keep=0", "keep is 0"),
        ("out=3", "out is 3, expected a text"),
        ("precision=float23", "did you mean 'float32'"),
        ("device=1", "device is 1, expected a text"),
        ('device=""', "device is '', expected 'auto', or a name such as 'cpu' or 'cuda:1'"),
        ("data.length=0", "data.length is 0"),
        ("data.held_out=1", "data.held_out is 1, expected at least 2"),
        ('data.separator=""', "data.separator"),
        ("optim.lr=0", "optim.lr is 0, expected a positive number"),
        ("optim.lr=nan", "optim.lr is nan"),
        ("optim.betas=[0.9, 1.0]", "optim.betas is [0.9, 1.0]"),
        ("optim.betas=0.9", "optim.betas is 0.9"),
        ("optim.betas=[0.9]", "optim.betas is (0.9,), expected 2 numbers"),
        ("optim.floor=2", "optim.floor is 2"),
        ("optim.warmup=never", "optim.warmup is 'never', expected a whole number or 'auto'"),
        ("optim.freeze=[embed]", "optim.freeze is '[embed]', expected a list of names"),
        ("optim.freeze=[3]", "optim.freeze is (3,), expected a list of texts"),
        ("optim.warmup=-1", "optim.warmup is -1"),
    ],
)
def test_values_that_do_not_fit_are_named(override, said):
    assert said in refused(override)


@pytest.mark.parametrize("override", ["steps", "=3", ".a=3", "data.=3", ""])
def test_an_override_that_is_none_is_refused(override):
    assert "a.b=c" in refused(override)


def test_a_recipe_must_end():
    with pytest.raises(ConfigError, match="neither steps nor minutes"):
        Recipe()


def test_a_recipe_that_is_none_is_refused(tmp_path):
    assert "no recipe 'stdlb'" in refused(source="stdlb") and "stdlib" in refused(source="stdlb")
    (tmp_path / "bad.toml").write_text("steps = = 3")
    assert "not a recipe" in refused(source=tmp_path / "bad.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    assert "not a recipe" in refused(source=tmp_path / "binary.toml")
    assert f"{tmp_path}: holds no training run" in refused(source=tmp_path)
    for name, meant in {"a.txt": "a.txt", "my notes": "'data.path={}'", "a.toml": "--print-recipe > my.toml"}.items():
        (tmp_path / name).write_text("to be, or not to be")
        path = tmp_path / name
        command = f"dualform train --set data.path={path} --out runs/new" if name == "a.txt" else meant.format(path)
        assert "not a recipe" in refused(source=path) and command in refused(source=path)


def test_a_text_that_reads_as_something_else_is_quoted():
    for text in ("notes", "2024", "true", " a", '"quoted"', "it's"):
        shown = setting("data.path", text)
        _, override = shlex.split(shown)
        assert Recipe.load("stdlib", [override]).data.path == text
