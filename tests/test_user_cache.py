"""Programs are kept from process to process, unless the user's variables say otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedjax_qp.files import cache_folder, keep_programs

# The command line must not load JAX before it has set the variables; a script has loaded it by then.
BEFORE = "import sys, fedjax_qp.cli; assert 'jax' not in sys.modules; fedjax_qp.cli.keep_programs()"
AFTER = "import jax; from fedjax_qp.files import keep_programs; keep_programs()"
COMPILE = """
import jax
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("compilation_cache/cache_hits")))
jax.jit(lambda x: x * 3 + 1)(jax.numpy.arange(7)).block_until_ready()
print(sum(hits) > 0)
"""
VARIABLES = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE", "JAX_COMPILATION_CACHE_MAX_SIZE")


@pytest.fixture
def clean(monkeypatch, tmp_path) -> Path:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FEDJAX_QP_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_a_second_process_finds_the_programs_of_the_first(clean):
    found = []
    for entry in (BEFORE, AFTER):
        code = f"{entry}\n{COMPILE}"
        found.append(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert found == ["False\n", "True\n"]
    assert any((clean / "cache" / "programs").iterdir())


@pytest.mark.parametrize(("name", "value"), [(VARIABLES[0], "elsewhere"), (VARIABLES[1], "false")])
def test_variables_that_are_set_decide(clean, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    before = dict(os.environ)
    keep_programs()
    assert dict(os.environ) == before and not (clean / "cache").exists()


def test_a_folder_that_cannot_be_written_is_no_error(clean, monkeypatch):
    (clean / "file").touch()
    monkeypatch.setenv("FEDJAX_QP_CACHE", str(clean / "file"))
    with pytest.warns(UserWarning, match="cannot be written .* set FEDJAX_QP_CACHE"):
        keep_programs()
    assert VARIABLES[0] not in os.environ


def test_the_cache_folder_is_the_users(clean, monkeypatch):
    assert cache_folder() == clean / "cache"
    monkeypatch.delenv("FEDJAX_QP_CACHE")
    assert cache_folder().name == "fedjax_qp" and cache_folder().is_absolute()
