import json
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

import pytest

from etude.experience.errors import UserError
from etude.learning.learner import Optim
from etude.learning.setting import Common, named, parse_options
from etude.methods.api import method
from etude.methods.catalog import CATALOG
from etude.methods.options import build

WORKING = [slug for slug, row in CATALOG.items() if row.works]


@dataclass(frozen=True)
class Inner:
    a: int = 1
    b: float = 2.0


@dataclass(frozen=True)
class Outer:
    n: int = 3
    x: float = 0.5
    y: float | None = None
    kind: Literal["one", "two"] = "one"
    words: tuple[str, ...] = ()
    flag: bool = False
    table: dict[str, int] = field(default_factory=dict)
    inner: Inner = field(default_factory=lambda: Inner(b=7.0))


def test_what_is_not_named_keeps_its_default_also_inside():
    assert build(Outer, {}) == Outer()
    made = build(Outer, {"inner": {"a": 5}})
    assert made.inner == Inner(5, 7.0)  # the outer's default for b, not the inner class's
    assert build(Outer, {"inner": Inner(9)}).inner == Inner(9, 2.0)


def test_values_of_the_right_type_are_taken():
    values = {"n": 4, "x": 1, "y": 2, "kind": "two", "words": ["a", "b"], "flag": True, "table": {"k": 1}}
    made = build(Outer, values)
    assert made == Outer(4, 1.0, 2, "two", ("a", "b"), True, {"k": 1})
    assert isinstance(made.x, float)
    assert build(Outer, {"y": None}).y is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"n": "4"}, "option n takes a whole number, not '4'"),
        ({"n": 4.0}, "option n takes a whole number, not 4.0"),
        ({"n": True}, "option n takes a whole number, not True"),
        ({"x": "1"}, "option x takes a number, not '1'"),
        ({"x": False}, "option x takes a number, not False"),
        ({"y": "z"}, "option y takes a number or nothing, not 'z'"),
        ({"kind": "three"}, "option kind takes one of one, two, not 'three'"),
        ({"words": "ab"}, "option words takes a list, not 'ab'"),
        ({"words": [1]}, r"option words takes a list, not \[1\]"),
        ({"flag": 1}, "option flag takes true or false, not 1"),
        ({"table": [1]}, "option table takes"),
        ({"inner": 3}, "option inner takes named values, such as a=..., not 3"),
        ({"inner": {"a": "x"}}, r"option inner\.a takes a whole number, not 'x'"),
        ({"inner": {"c": 1}}, r"unknown option 'inner\.c': did you mean inner\.[ab]"),
        ({"wrods": ["a"]}, "unknown option 'wrods': did you mean words"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(values, said):
    with pytest.raises(UserError, match=said) as error:
        build(Outer, values)
    assert "\n" not in str(error.value)


def changed(value: Any) -> Any:
    """Another value of the same kind, where one can be made up that no check refuses."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 0.999
    if isinstance(value, tuple):
        return (*value, "more=1")
    if is_dataclass(value) and not isinstance(value, type):
        fixed = ("tuple", "Literal")
        free = [f.name for f in fields(value) if not str(f.type).startswith(fixed) or f.type == "tuple[str, ...]"]
        return replace(value, **{name: changed(getattr(value, name)) for name in free})
    return value


@pytest.mark.parametrize("slug", WORKING)
def test_a_config_comes_back_the_same_from_its_json(slug):
    config = method(slug).config
    assert is_dataclass(config)
    assert config.__dataclass_params__.frozen
    for made in (config(), changed(config()), Common(), changed(Common())):
        assert build(type(made), json.loads(json.dumps(asdict(made)))) == made
    assert changed(config()) != config()


@pytest.mark.parametrize("slug", WORKING)
def test_a_method_shares_no_option_name_with_what_all_methods_have(slug):
    own = {f.name for f in fields(method(slug).config)}
    assert not own & ({f.name for f in fields(Common)} | {"out", "name", "json", "reporter"})


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"eval_every": -1}, "eval_every must be at least 0"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
        ({"base_low": 0.5}, "base_low must be a share below base_high"),
        ({"base_high": 1.5}, "base_low must be a share below base_high"),
    ],
)
def test_shared_options_are_checked(wrong, said):
    with pytest.raises(UserError, match=said):
        Common(**wrong)


@pytest.mark.parametrize(
    ("slug", "wrong", "said"),
    [
        ("grpo", {"members": 0}, "members must be at least 1"),
        ("grpo", {"normalise": "words"}, "normalise"),
        ("grpo", {"constant": 3.0}, "constant, above 0, goes with normalise=constant"),
        ("grpo", {"normalise": "constant", "constant": 0.0}, "constant, above 0"),
        ("grpo", {"optim": {"lr": -1.0}}, "lr must be a number above 0"),
        ("sft", {"steps": 0}, "steps must be at least 1"),
        ("rft", {"rounds": 0}, "rounds must be at least 1"),
        ("dpo", {"beta": 0.0}, "beta must be above 0"),
        ("dpo", {"label_smoothing": 0.5}, "label_smoothing must lie in"),
    ],
)
def test_a_methods_options_are_checked(slug, wrong, said):
    with pytest.raises(UserError, match=said):
        build(method(slug).config, wrong)


def test_world_options_are_json_where_they_can_be():
    words = ("a=1", "b=[1, 2]", "c=text", "d=", "e=x=y", "f=true")
    assert parse_options(words) == {"a": 1, "b": [1, 2], "c": "text", "d": "", "e": "x=y", "f": True}
    assert named(("prompt=question", "a=b=c"), "column") == {"prompt": "question", "a": "b=c"}
    for word in ("a", "=1", ""):
        with pytest.raises(UserError, match="a column is given as name=value"):
            named((word,), "column")


def test_nested_defaults_of_a_real_config():
    made = build(method("sft").config, {"optim": {"lr": 3e-3}})
    assert made.optim == Optim(lr=3e-3, schedule="cosine", warmup=0.05)
