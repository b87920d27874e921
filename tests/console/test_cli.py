"""The command line: usual slips, one-line errors, and no JAX where none is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import SMALL, write

from fedjax_qp import cli, config
from fedjax_qp.console.listing import listing
from fedjax_qp.engine.devices import cores
from fedjax_qp.experiment import REGISTRIES, check, resolve
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.settings import catalogue

REPOSITORY = Path(__file__).resolve().parents[2]


def told(capsys, *arguments: str) -> str:
    """What the command line says of arguments that it refuses, before anything is run."""
    with pytest.raises(SystemExit) as left:
        cli.main(list(arguments))
    said = capsys.readouterr()
    assert left.value.code == 2 and said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu", "x"], "unknown command 'rnu': did you mean run?"),
        (["run", "x.yaml", "--rounds", "10"], "has no option --rounds. Did you mean rounds=10"),
        (["run", "x.yaml", "--rounds=10"], "Did you mean rounds=10"),
        (["run", "x.yaml", "--seed", "3"], "Did you mean seed=3 or --seeds"),
        (["run", "x.yaml", "--lr", "0.1"], "Did you mean local.learning_rate=0.1"),
        (["run", "x.yaml", "--batch-size", "8"], "Did you mean local.batch_size=8"),
        (["compare", "x", "--outptu", "y"], "Did you mean --output?"),
        (["run", "x.yaml", "--seeds", "1", "1"], "give each seed once"),
        (["run", "x.yaml", "--seeds"], "give each seed once, for example --seeds 0 1 2"),
        (["run", "x.yaml", "seed=1", "--seeds=0,2"], "seed=… beside --seeds"),
        (["run", "x.yaml", "--seeds", "0", "--seeds", "1"], "--seeds is given twice: keep one"),
        (["run", "x.yaml", "--seeds=0", "--cluster", "--seeds=1"], "--seeds is given twice: keep one"),
        (["compare", "x", "--last", "3", "--last=4"], "--last is given twice: keep one"),
        (["sweep", "x.yaml", "--check", "--no-check"], "--no-check is given twice: keep one"),
        (["run", "x.yaml"], "unknown configuration file 'x.yaml'"),
        (["compare"], "no run is named"),
        (["report"], "no run is named"),
        (["inspect"], "no run is named"),
        (["compare", "x", "--last", "0"], "--last 0 must be at least 1"),
        (["compare", "x", "--target", "nan"], "--target nan must be above 0"),
        (["answer", "x"], "no question is asked"),
        (["answer", "x", "y", "--new-tokens", "0"], "--new-tokens 0 must be at least 1"),
        (["list", "idi"], "unknown part 'idi': did you mean iid"),
        (["sweep", "x.yaml"], "unknown configuration file 'x.yaml'"),
        (["resume", "x"], "holds no run"),
    ],
)
def test_slips_are_understood(capsys, arguments, message):
    assert message in told(capsys, *arguments)


@pytest.mark.parametrize(
    "seeds", [["--seeds=0,1"], ["--seeds", "0,1"], ["--seeds", "0", "1"], ["--seeds", "0", "rounds=2", "1"]]
)
def test_seeds_may_be_separated_by_commas_and_followed_by_settings(tmp_path, monkeypatch, seeds):
    import fedjax_qp.runs.run as running

    started = []
    monkeypatch.setattr(running, "run_all", lambda configs, console: started.extend(configs) or [])
    with pytest.raises(SystemExit) as left:
        cli.main(["run", str(write(tmp_path)), *seeds])
    assert left.value.code == 0
    assert [one.seed for one in started] == [0, 1]
    assert {one.rounds for one in started} == {2 if "rounds=2" in seeds else 4}


@pytest.mark.parametrize(
    ("change", "number"), [("devices=1000000000", 10**9), ("devices=1025", 1025), ("model_devices=2000", 2000)]
)
def test_memory_is_counted_for_a_sane_number_of_devices(tmp_path, capsys, monkeypatch, change, number):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    message = told(capsys, "memory", str(write(tmp_path)), f"engine.{change}")
    assert f"= {number} is more than the 1024 devices" in message
    assert "XLA_FLAGS" not in os.environ


def test_options_that_all_partitions_have_are_set_on_the_command_line(tmp_path, monkeypatch, capsys):
    started = []

    def start(one, *_):
        started.append(one.partition.options)
        raise SystemExit

    monkeypatch.setattr("fedjax_qp.runs.run.run", start)
    with pytest.raises(SystemExit):
        cli.main(["run", str(write(tmp_path)), "partition.test=matched", "partition.test_share=0.3", "algorithm=ditto"])
    assert started[0]["test"] == "matched" and started[0]["test_share"] == 0.3
    assert "did you mean test?" in told(capsys, "run", str(write(tmp_path)), "partition.tst=own")
    assert "test='common', test_share=0.2" in listing("iid")[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm=fedavgg", "did you mean fedavg"),
        ("model=resnet", "did you mean resnet18"),
        ("algorithm.margin=2", "margin"),
    ],
)
def test_a_typo_is_named_also_where_the_folder_holds_a_run(tmp_path, capsys, override, message):
    file = write(tmp_path)
    folder = config.load(file).run_folder
    folder.mkdir(parents=True)
    config.save(config.load(file), RunFolder(folder).config_file)
    assert message in told(capsys, "run", str(file), override)
    assert "already holds a run" in told(capsys, "run", str(file))


@pytest.mark.parametrize("command", ["compare", "report"])
def test_an_output_that_cannot_be_written_is_one_line(tmp_path, capsys, monkeypatch, command):
    (tmp_path / "file").write_text("")
    from fedjax_qp.reports import compare as comparison
    from fedjax_qp.reports import rendering

    if command == "compare":
        monkeypatch.setattr(comparison, "load_runs", lambda runs: [])
        monkeypatch.setattr(comparison, "summary", lambda *_, **__: [])
        monkeypatch.setattr(rendering, "table", lambda rows: "")
    with pytest.raises(SystemExit) as left:
        cli.main([command, str(tmp_path), "--output", str(tmp_path / "file" / "x")])
    assert left.value.code == 2
    assert "x cannot be written" in capsys.readouterr().err


def test_a_wrong_number_of_threads_is_one_line(monkeypatch):
    monkeypatch.setenv("PJRT_NPROC", "abc")
    with pytest.raises(ConfigurationError, match="PJRT_NPROC = 'abc' must be a whole number"):
        cores()


def test_the_version(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0 and capsys.readouterr().out.startswith("fedjax-qp 0.")


def test_help_names_what_is_asked_for(capsys):
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        said = capsys.readouterr().out
        assert "{None}" not in said and "[[" not in said and "(default: )" not in said and "None" not in said
        assert "several options" not in said


LIGHT = [
    (["--help"], 0),
    (["--version"], 0),
    (["run", "--help"], 0),
    (["list"], 0),
    (["list", "iid"], 0),
    (["list", "fedqp"], 0),
    (["list", "engine"], 0),
    (["run", "nowhere.yaml"], 2),
    (["run", "configs/mnist5k.yaml", "local.lr=1"], 2),
    (["run", "configs/mnist5k.yaml", "algorithm=fedavgg"], 2),
    (["run", "configs/mnist5k.yaml", "algorithm.alfa=2"], 2),
    (["sweep", "configs/sweep_mnist_5k.yaml", "worker=2"], 2),
]
SCRIPT = """
import sys
from fedjax_qp.cli import main
try:
    main({arguments})
except SystemExit as left:
    heavy = [name for name in ("jax", "matplotlib", "scipy", "numpy", "flax") if name in sys.modules]
    sys.exit(f"loaded {{heavy}}" if heavy else left.code)
"""


@pytest.mark.parametrize(
    ("arguments", "status"), LIGHT, ids=lambda value: " ".join(value) if isinstance(value, list) else None
)
def test_neither_jax_nor_matplotlib_nor_scipy_is_loaded_in_vain(arguments, status):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(arguments=arguments)], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == status, done.stderr


def test_comparing_loads_no_jax():
    script = "import sys; from fedjax_qp.reports import compare, personal, plots; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY).returncode == 0


# --- the catalogue ----------------------------------------------------------------------------------------------------


def test_the_catalogue_is_what_is_registered():
    kinds = {kind.title: key for key, kind in catalogue.KINDS.items()}
    registered = {
        (kinds[registry.kind], name, option, "" if parameter.default is parameter.empty else repr(parameter.default))
        for registry in REGISTRIES.values()
        for name in registry.names()
        for option, parameter in [*registry.options(name).items(), ("", registry.options)]
        if not callable(parameter)
    }
    written = {
        (entry.registry, entry.name, option, default or "")
        for entry in catalogue.entries()
        for option, default in entry.options.items()
    }
    assert written == registered
    names = {(kinds[registry.kind], name) for registry in REGISTRIES.values() for name in registry.names()}
    assert {(entry.registry, entry.name) for entry in catalogue.entries()} == names


@pytest.mark.parametrize(
    "changes",
    [["algorithm=fedavgg"], ["data=cifar11"], ["model=x"], ["partition=iidd"], ["algorithm.alfa=1"], ["model.hiden=1"]],
)
def test_names_are_refused_in_the_same_words_with_and_without_the_registries(tmp_path, changes):
    loaded = config.load(write(tmp_path), changes)
    with pytest.raises(ConfigurationError) as light:
        catalogue.check_names(loaded)
    with pytest.raises(ConfigurationError) as full:
        resolve(loaded)
    assert str(light.value) == str(full.value)


def test_what_an_algorithm_is_for_is_what_it_says_of_itself():
    of_language = {"data": {"name": "records", "files": "x"}, "model": {"name": "pretrained", "path": "x"}}
    for entry in catalogue.entries():
        if entry.registry == "algorithms":
            built = check(
                resolve(
                    config.from_dict(
                        {**SMALL, **of_language, "algorithm": entry.name, "engine": {"rounds_per_chunk": 1}}
                    )
                )
            )
            assert built.tunes_adapters == (entry.suits == ("instructions",)), entry.name
            assert built.rank_factor == int(entry.options.get("expansion") or 1), entry.name


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_listing_cuts_no_value(width):
    text = "\n".join(listing("all", width))
    words = text.split()
    for entry in catalogue.entries():
        assert entry.name in words
        assert all(option in text for option in entry.shown_options())
        assert entry.idea.rstrip(".").lower() != entry.name.replace("_", "")  # it says more than the name


def test_an_entry_of_a_user_s_own_is_listed(monkeypatch):
    from fedjax_qp.data import partitions

    def halves(dataset, rng, *, share: float = 0.5) -> list:
        """Two clients."""
        return []

    monkeypatch.setitem(partitions._functions, "halves", halves)
    assert "Two clients." in listing("halves")[0] and "share=0.5" in listing("halves")[0]
    catalogue.check_names(config.from_dict({**SMALL, "partition": {"name": "halves", "share": 0.1}}))
