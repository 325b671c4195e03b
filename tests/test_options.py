"""The constructor as command line, configuration and help."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_plugins.catalog.options import _TAKEN, check, options_of, parse
from kd_plugins.catalog.registry import config_of, create_distiller, from_json, options_from_strings, to_json
from kd_plugins.catalog.values import AtLeastOne, Share, as_text, convert
from kd_plugins.distiller import _HOOKS, Distiller
from kd_plugins.errors import DistillError


class Everything(Distiller):
    """All kinds of options.

    Somebody, Somewhere 2020.

    Args:
        weight: Of the term: in front of
            everything, and
            on several lines.
        layers (tuple): Where it is read.
        first, second: Share a text.
    Departures: none.
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        rounds: int = 3,
        flag: bool = False,
        kernel: Literal["poly", "linear"] = "poly",
        power: Literal[1, 2] | None = None,
        layers: tuple[str | int, ...] = ("layer4",),
        pair: tuple[int, float] = (1, 2.0),
        pairs: tuple[tuple[int, int], ...] = (),
        names: list[str] | None = None,
        shape: Sequence[int] = (1,),
        temperature: float | Literal["auto"] = "auto",
        note: str | None = None,
        size: Optional[int] = None,  # noqa: UP045
        rates: dict[str, float] | None = None,
        by_layer: Mapping[int, int] | None = None,
        first: int = 0,
        second: int = 0,
        function: Callable[[int], int] | None = None,
    ) -> None:
        super().__init__()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("weight=50", 50.0),
        ("weight=1e-3", 1e-3),
        ("rounds=-4", -4),
        ("flag=yes", True),
        ("flag=0", False),
        ("kernel=linear", "linear"),
        ("power=2", 2),
        ("power=none", None),
        ("layers=layer3,layer4.0", ("layer3", "layer4.0")),
        ("layers=-1,layer4", (-1, "layer4")),
        ("layers=", ()),
        ('layers=["0", 1]', ("0", 1)),
        ("pair=3,4", (3, 4.0)),
        ("pair=(3, 4)", (3, 4.0)),
        ("pairs=[[1, 2], [3, 4]]", ((1, 2), (3, 4))),
        ("names=a, b", ["a", "b"]),
        ("names=none", None),
        ("shape=4,5", (4, 5)),
        ("temperature=auto", "auto"),
        ("temperature=2", 2.0),
        ("note=a=b=c", "a=b=c"),
        ("note=none", None),
        ("note=4", "4"),
        ("size=4", 4),
        ('rates={"a": 1}', {"a": 1.0}),
        ('by_layer={"1": 2}', {1: 2}),
    ],
)
def test_strings_become_what_the_annotation_says(text, value):
    parsed = parse(Everything, [text])[text.partition("=")[0]]
    assert parsed == value
    assert type(parsed) is type(value)
    # What was parsed is well-typed, and passes through JSON unchanged.
    name = text.partition("=")[0]
    assert check(Everything, {name: parsed}) == {name: parsed}
    assert check(Everything, json.loads(json.dumps({name: parsed}))) == {name: parsed}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weight=heavy", r"expected weight to be float, got 'heavy'"),
        ("rounds=1.5", r"expected rounds to be int, got '1\.5'"),
        ("flag=maybe", r"expected flag to be bool, got 'maybe'"),
        ("kernel=pole", r"expected kernel to be poly \| linear, got 'pole'.* Did you mean poly\?"),
        ("power=3", r"expected power to be 1 \| 2 \| none, got '3'"),
        ("pair=1,2,3", r"expected pair to be tuple\[int, float\], got '1,2,3' \(2 values expected\)"),
        ("rates={a}", r"expected rates to be dict\[str, float\] \| none"),
        ("function=print", r"expected function to be Callable"),
        ("weigth=1", r"no option 'weigth'\. Did you mean weight\?"),
        ("weight", r"expected option=value, got 'weight'"),
        ("=1", r"expected option=value, got '=1'"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_says_what_was_expected(text, message):
    with pytest.raises(DistillError, match=message):
        parse(Everything, [text])


def test_an_option_given_twice_is_an_error():
    with pytest.raises(DistillError, match="'weight' twice"):
        parse(Everything, ["weight=1", "weight=2"])


def test_an_unknown_option_gets_the_table_of_all():
    with pytest.raises(DistillError) as raised:
        check(Everything, {"wieght": 1})
    message = str(raised.value)
    assert "Of the term: in front of everything, and on several lines." in message
    assert "kernel: poly | linear = poly" in message
    assert "layers: tuple[str | int, ...] = layer4" in message
    assert len(message.splitlines()) == 1 + len(options_of(Everything))


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({"weight": 2}, 2.0),
        ({"weight": "2"}, 2.0),
        ({"layers": ["a", "b"]}, ("a", "b")),
        ({"layers": ("0", 0)}, ("0", 0)),
        ({"names": ("a",)}, ["a"]),
        ({"flag": "true"}, True),
        ({"note": "none"}, "none"),
        ({"function": abs}, abs),
        ({"temperature": 3}, 3.0),
    ],
)
def test_python_values_are_checked_and_converted_where_nothing_is_lost(options, value):
    checked = check(Everything, options)
    assert checked == dict.fromkeys(options, value)
    assert type(next(iter(checked.values()))) is type(value)


@pytest.mark.parametrize(
    "options",
    [
        {"weight": True},
        {"weight": [1.0]},
        {"weight": None},
        {"weight": float("nan")},
        {"weight": float("inf")},
        {"temperature": float("nan")},
        {"rounds": 1.0},
        {"rounds": True},
        {"flag": 1},
        {"kernel": None},
        {"power": True},
        {"layers": 4},
        {"layers": [1.5]},
        {"pair": (1,)},
        {"note": 4},
        {"rates": {"a": "b"}},
        {"function": 1},
    ],
)
def test_ill_typed_python_values_are_refused(options):
    with pytest.raises(DistillError, match=f"expected {next(iter(options))} to be"):
        check(Everything, options)


@given(st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.none()))
def test_a_value_survives_its_own_text(value):
    hint: Any = type(value)
    assert convert(as_text(value), hint, text=True) == value


@given(st.lists(st.one_of(st.integers(), st.text("abcdefgh.", min_size=1))).map(tuple))
def test_a_list_survives_its_own_text(value):
    text = as_text(value)
    assert convert("" if text == "()" else text, tuple[int | str, ...], text=True) == value


def test_help_comes_from_the_docstring_and_the_type_from_the_annotation():
    options = options_of(Everything)
    assert options["weight"].help == "Of the term: in front of everything, and on several lines."
    assert options["layers"].help == "Where it is read."
    assert options["first"].help == options["second"].help == "Share a text."
    assert options["rounds"].help == ""
    assert options["kernel"].type == "poly | linear"
    assert options["power"].type == "1 | 2 | none"


def test_a_constructor_with_kwargs_has_the_options_of_its_base_too():
    class Child(Everything):
        def __init__(self, *, extra: int = 1, **options: Any) -> None:
            """More.

            Args:
                extra: Of this class.
            """
            super().__init__(**options)

    assert list(options_of(Child))[:2] == ["extra", "weight"]
    assert options_of(Child)["extra"].help == "Of this class."
    assert options_of(Child)["weight"].help.startswith("Of the term")
    assert parse(Child, ["weight=2", "extra=3"]) == {"weight": 2.0, "extra": 3}
    config = config_of(Child(extra=2, weight=4.0))
    assert config["options"]["weight"] == 4.0
    assert config["options"]["extra"] == 2
    assert config["options"]["rounds"] == 3


def test_a_constructor_that_is_no_command_line_is_refused():
    class Positional(Distiller):
        def __init__(self, weight: float = 1.0) -> None:
            super().__init__()

    class Required(Distiller):
        def __init__(self, *, weight: float) -> None:
            super().__init__()

    class Untyped(Distiller):
        def __init__(self, *, weight=1.0) -> None:
            super().__init__()

    class Unresolved(Distiller):
        def __init__(self, *, weight: Missing = 1.0) -> None:  # noqa: F821
            super().__init__()

    for cls in (Positional, Required, Untyped):
        with pytest.raises(DistillError, match="keyword-only, annotated and defaulted, got 'weight"):
            options_of(cls)
    with pytest.raises(DistillError, match="resolved at run time"):
        options_of(Unresolved)
    assert options_of(Distiller) == {}


def test_an_option_of_a_name_that_distillers_keep_is_refused():
    """`Distiller.__init__` would overwrite it, and a training go on without what was given."""

    class Remote(Distiller):
        def __init__(self, *, host: str = "localhost") -> None:
            super().__init__()

    with pytest.raises(DistillError, match="got 'host', where every distiller keeps something else"):
        options_of(Remote)

    class Named(Distiller):
        def __init__(self, *, task: float = 1.0) -> None:
            super().__init__()

    with pytest.raises(DistillError, match="got 'task', where every distiller keeps something else"):
        options_of(Named)
    assert set(_TAKEN) <= {*vars(Distiller()), *_HOOKS}
    assert {name for name in _HOOKS if not name.startswith("_")} <= set(_TAKEN)


class Ranged(Distiller):
    """Options that are numbers of some range, and one of which it makes something else."""

    def __init__(
        self,
        *,
        share: Share = 0.5,
        count: AtLeastOne | Literal["all"] | None = None,
        free: float = 1.0,
        layers: str = "a+b",
    ) -> None:
        super().__init__()
        self.layers = layers.split("+")


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("share", 1.7, "float from 0 to 1"),
        ("share", -1, "float from 0 to 1"),
        ("share", math.nan, "float from 0 to 1"),
        ("share", True, "float from 0 to 1"),
        ("count", 0, r"int from 1 \| all \| none"),
        ("count", 1.5, r"int from 1 \| all \| none"),
    ],
)
def test_a_number_that_the_constructor_refuses_is_refused_later(name, value, kind):
    distiller = Ranged()
    with pytest.raises(DistillError, match=f"expected {name} to be {kind}, got {value}"):
        setattr(distiller, name, value)
    assert (distiller.share, distiller.count, distiller.layers) == (0.5, None, ["a", "b"])
    distiller.share, distiller.count, distiller.free = 1, 3, -7.0
    distiller.count = "all"
    assert (distiller.share, distiller.count, distiller.free) == (1, "all", -7.0)
    for _ in range(3):
        distiller.share = (0.3 if distiller.share == 1 else distiller.share) - 0.1
    assert -1e-12 < distiller.share < 0  # a rounding


@pytest.mark.parametrize("name", ["afd", "cwd", "dafl", "dist", "dkd", "endd", "internal", "kd", "noisy"])
@pytest.mark.parametrize("value", [0.0, 1e-300, 1e200, 10**400])
def test_a_temperature_whose_square_no_loss_can_hold_is_refused(name, value):
    with pytest.raises(
        DistillError, match=rf"temperature to be float from 0.0001 to 10000.*got {re.escape(str(value))}"
    ):
        create_distiller(name, temperature=value)


# --- with the installed methods ---------------------------------------------------------------------------------------


def test_strings_of_a_composition_are_typed_and_create_it():
    options = options_from_strings("kd+nst", ["kd.temperature=2", "kernel=poly", "nst.weight=50"])
    assert options == {"kd.temperature": 2.0, "nst.kernel": "poly", "nst.weight": 50.0}
    both = create_distiller("kd+nst", **options)
    assert both.parts["kd"].config["temperature"] == 2.0
    assert both.parts["nst"].config["kernel"] == "poly"


def test_strings_of_a_single_method_may_set_its_groups():
    options = options_from_strings("kd", ["temperature=2", "critic.lr=2e-5", "critic.clip=none"])
    assert options == {"temperature": 2.0, "critic.lr": 2e-5, "critic.clip": None}
    assert create_distiller("kd", **options).optim_overrides == {"critic": {"lr": 2e-5, "clip": None}}
    with pytest.raises(DistillError, match="KD has no option 'temprature'. Did you mean temperature?"):
        options_from_strings("kd", ["temprature=2"])
    with pytest.raises(DistillError, match=r"expected kd\.temperature to be float"):
        options_from_strings("kd+nst", ["kd.temperature=hot"])
    with pytest.raises(DistillError, match=r"before the first dot, got 'kdd\.temperature'\. Did you mean kd\?"):
        options_from_strings("kd+nst", ["kdd.temperature=2"])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kd", {"temperature": 2.0, "critic.lr": 1e-3}),
        ("nst", {"kernel": "linear", "weight": 3}),
        ("internal", {}),
        ("kd+nst", {"kd.temperature": 2.0, "nst.kernel": "linear", "nst.critic.lr": 1e-3}),
    ],
)
def test_a_distiller_is_made_again_from_its_json(tmp_path, name, options):
    distiller = create_distiller(name, **options)
    path = tmp_path / "distiller.json"
    text = to_json(distiller, path)
    config = json.loads(text)
    assert config["distiller"] == name
    assert config["options"].items() >= options.items()
    assert {"kd-plugins", "torch"} <= set(config["versions"])
    for source in (path, str(path), config):
        again = from_json(source)
        assert type(again) is type(distiller)
        assert config_of(again) == config


def test_a_config_of_another_version_says_who_wrote_it():
    config = {"distiller": "kd", "options": {"heat": 1.0}, "versions": {"kd-plugins": "9.0"}}
    with pytest.raises(DistillError, match=r"(?s)no option 'heat'.*written by kd-plugins 9\.0"):
        from_json(config)
    for other in ({"name": "kd"}, [], None, 3):
        with pytest.raises(DistillError, match="the key 'distiller'"):
            from_json(other)


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(DistillError, match="JSON can hold"):
        config_of(Everything(function=abs))
