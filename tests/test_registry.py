"""Registries: what entries declare, and what is refused when they are registered."""

import pytest

from fedjax_qp.data import sources
from fedjax_qp.models import models
from fedjax_qp.registry import ConfigurationError, Registry


def test_entries_declare_their_examples():
    registry = Registry("model", declares_examples=True)

    @registry.register("images", "rows")
    def either(shape, classes, *, width: int = 8): ...

    @registry.register("rows")
    def table(shape, classes): ...

    assert registry.examples("either") == ("images", "rows")
    assert registry.names(["images"]) == ["either"]
    assert registry.names(["rows", "characters"]) == registry.names() == ["either", "table"]


def test_without_examples_it_is_refused_with_an_example():
    registry = Registry("model", declares_examples=True)
    with pytest.raises(
        ConfigurationError, match=r'a model says what its examples are: @….register\("images"\), or rows'
    ):
        registry.register(lambda shape, classes: None)
    with pytest.raises(ConfigurationError, match="unknown kind of examples 'row': did you mean rows"):
        registry.register("row")


def test_every_entry_of_the_package_declares_some():
    for registry in (sources, models):
        assert all(registry.examples(name) for name in registry.names())


def test_each_kind_of_examples_means_something_for_a_run():
    from fedjax_qp.registry import EXAMPLES
    from fedjax_qp.tasks import KINDS

    assert set(KINDS) == set(EXAMPLES)
