"""Every setting and every option refuses what is no number of its kind; names and paths stay where they belong."""

import dataclasses
import math
from typing import Annotated, Any, Literal, get_args, get_origin

import pydantic
import pytest

from fedjax_qp import config
from fedjax_qp.experiment import REGISTRIES
from fedjax_qp.registry import ConfigurationError, Registry
from fedjax_qp.settings.values import Count, Finite, Name, Positive, Whole, checkable, shown, takes
from fedjax_qp.sweeps import space

NO_NUMBERS = (math.nan, math.inf, -math.inf, True, False, 10**400, -(10**400), "nan", "-inf", [], {}, "ten")
GROUPS = (config.Config, *config.groups().values(), config.Wandb, config.Mlflow)
OF_SWEEPS = (space.Sweep, space.Variant, space.Rank, space.EarlyStopping, space.Range, space.Comparison)
SETTINGS = [(cls, field.name, field.type) for cls in (*GROUPS, *OF_SWEEPS) for field in dataclasses.fields(cls)]
OPTIONS = [
    (registry, name, option, parameter.annotation)
    for registry in REGISTRIES.values()
    for name in registry.names()
    for option, parameter in registry.options(name).items()
]


def refused(adapter: pydantic.TypeAdapter, value: Any) -> bool:
    try:
        adapter.validate_python(value)
    except pydantic.ValidationError:
        return True
    return False


def around(annotation: Any, value: Any) -> list[Any]:
    """The value itself, and in a list where the setting takes a list."""
    return [value, [value]] if takes_list(annotation) else [value]


def takes_list(annotation: Any) -> bool:
    return get_origin(annotation) is tuple or any(takes_list(inner) for inner in get_args(annotation))


@pytest.mark.parametrize(("cls", "name", "annotation"), SETTINGS, ids=lambda value: getattr(value, "__name__", None))
def test_no_setting_takes_what_is_no_number(cls, name, annotation):
    adapter = pydantic.TypeAdapter(annotation)
    if takes(annotation, float) or takes(annotation, int):
        for value in (bad for one in NO_NUMBERS for bad in around(annotation, one)):
            if not (value == [] and takes_list(annotation)) and not (
                isinstance(value, bool) and takes(annotation, bool)
            ):
                assert refused(adapter, value), value
    if takes(annotation, bool):
        assert all(refused(adapter, value) for value in (0, 1, "yes", "true", 1.0))


@pytest.mark.parametrize(("registry", "name", "option", "annotation"), OPTIONS)
def test_no_option_takes_what_is_no_number(registry: Registry, name, option, annotation):
    """Through the registry, which gives plain `int`, `float` and `bool` their meaning."""
    adapter = pydantic.TypeAdapter(checkable(annotation))
    if takes(annotation, float) or takes(annotation, int):
        for value in (bad for one in NO_NUMBERS for bad in around(annotation, one)):
            if value != []:
                assert refused(adapter, value), value
                with pytest.raises(ConfigurationError) as error:
                    registry.checked(name, option, value)
                assert len(str(error.value)) <= 500 and "\n" not in str(error.value)
    if takes(annotation, bool):
        assert all(refused(adapter, value) for value in (0, 1, "yes", "true", 1.0))


TEXTS = (" ", "x" * 5000, "a\0b", "a\nb", "a\tb", "\x1b[31m", "a\u2028b", "\ud800", "\x7f")


@pytest.mark.parametrize(("registry", "name", "option", "annotation"), OPTIONS)
def test_no_option_takes_what_is_no_line_of_text(registry: Registry, name, option, annotation):
    for value in (bad for one in TEXTS for bad in around(annotation, one)):
        with pytest.raises(ConfigurationError) as error:
            registry.checked(name, option, value)
        assert len(str(error.value)) <= 500 and "\n" not in str(error.value)


@pytest.mark.parametrize(("cls", "name", "annotation"), SETTINGS, ids=lambda value: getattr(value, "__name__", None))
def test_no_setting_takes_what_is_no_line_of_text(cls, name, annotation):
    for value in TEXTS:
        assert refused(pydantic.TypeAdapter(annotation), value), value


def test_texts_of_one_line_are_taken_as_they_are():
    registry = Registry("thing")

    @registry.register
    def one(
        *, text: str = "", texts: tuple[str, ...] | str = "", bounded: Annotated[str, pydantic.Field(min_length=2)]
    ): ...

    given = {"text": "tcp://10.0.0.1:8786", "texts": ("Größe 1", "~/a b"), "bounded": "é😀"}
    assert registry.resolve("one", given) == given
    with pytest.raises(ConfigurationError, match="text = '' must be a line of text, not empty"):
        registry.resolve("one", {**given, "text": ""})


def test_plain_types_get_their_meaning_at_every_depth():
    """A registered function may write `float`; so may one of a user's own, outside this package."""
    registry = Registry("thing")

    @registry.register
    def one(
        *,
        share: float | None = None,
        sizes: tuple[int, ...] | int = 1,
        bounds: Annotated[float, pydantic.Field(ge=0)] = 1.0,
        flag: bool = False,
        kind: Literal["a", "b"] = "a",
    ) -> None: ...

    for option, value in [
        ("share", math.inf),
        ("share", True),
        ("share", 1e39),  # infinite in float32
        ("share", 1e-50),  # 0 in float32
        ("sizes", [1, 10**12]),
        ("sizes", [True]),
        ("bounds", math.nan),
        ("bounds", -1),
        ("flag", 1),
        ("kind", "c"),
    ]:
        with pytest.raises(ConfigurationError, match=option):
            registry.resolve("one", {option: value})
    given = {"share": 0.5, "sizes": [1, 2], "bounds": 0, "flag": True, "kind": "b"}
    assert registry.resolve("one", given) == {**given, "sizes": (1, 2)}


def test_an_option_that_all_entries_have_cannot_be_an_entry_s_own():
    def common(*, test: str = "common") -> None: ...
    def halves(*, share: float = 0.5, test: float = 0.1) -> None: ...

    with pytest.raises(ValueError, match="thing 'halves' has the option 'test', which every thing has already"):
        Registry("thing", common).register(halves)


def test_what_checks_an_option_is_made_once(monkeypatch):
    made = []
    adapter = pydantic.TypeAdapter
    monkeypatch.setattr(pydantic, "TypeAdapter", lambda kind: made.append(kind) or adapter(kind))
    registry = Registry("thing")

    @registry.register
    def one(*, share: float = 0.5, name: str = "") -> None: ...

    for share in (0.1, 0.2, 0.3):
        assert registry.resolve("one", {"share": share, "name": "x"}) == {"share": share, "name": "x"}
    assert len(made) == 2


@pytest.mark.parametrize(
    ("kind", "value", "read"),
    [(Count, "010", 10), (Count, 10.0, 10), (Whole, -5, -5), (Finite, "1e-3", 0.001), (Positive, 1, 1.0)],
)
def test_numbers_are_read_as_they_are_meant(kind, value, read):
    assert pydantic.TypeAdapter(kind).validate_python(value) == read


@pytest.mark.parametrize(
    "name", ["../../x", "/abs", "a/b", "a\\b", "", " ", "x ", ".", "..", "a\0b", "a\nb", "\ud800", "ö" * 150]
)
def test_a_name_is_one_component_of_a_path(name):
    assert refused(pydantic.TypeAdapter(Name), name)


@pytest.mark.parametrize("name", ["x", "mnist-5k", "Größe 1", "x[red]", "...", "~", "$x$", "2026-11-27"])
def test_ordinary_names_are_names(name):
    assert pydantic.TypeAdapter(Name).validate_python(name) == name


def test_a_shown_value_is_short_however_large_it_is():
    """Ten aliases of ten aliases of … are 10^10 values from a file of a few lines."""
    bomb: Any = ["x"] * 10
    for _ in range(9):
        bomb = [bomb] * 10
    for value in (bomb, "x" * 10**6, 10**5000, -(1 << 10**6), {str(n): [bomb] for n in range(1000)}, "\n" * 1000):
        assert len(shown(value)) <= 120 and "\n" not in shown(value)
