"""Configurations are strict: what is wrong is named, with what would be right, before any compute."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.runs import REPOSITORY, SMALL, write

from fedjax_qp import config
from fedjax_qp.experiment import build, resolve
from fedjax_qp.registry import ConfigurationError


def test_round_trip_through_yaml(tmp_path):
    loaded = resolve(config.load(write(tmp_path)))
    config.save(loaded, tmp_path / "saved.yaml")
    assert resolve(config.load(tmp_path / "saved.yaml")) == loaded
    text = yaml.safe_load((tmp_path / "saved.yaml").read_text())
    assert text["algorithm"]["mutation_rounds"] == 50  # defaults are written out
    assert text["local"]["momentum"] == 0.9


def test_overrides_reach_every_level(tmp_path):
    loaded = config.load(
        write(tmp_path),
        ["rounds=7", "algorithm.alpha=3", "engine.lanes=auto", "data.x=1", "evaluation.target_accuracy=0.5"],
    )
    assert (loaded.rounds, loaded.engine.lanes) == (7, "auto")
    assert loaded.algorithm.options == {"alpha": 3, "form": "nearest"}
    assert (loaded.data.options, loaded.evaluation.target_accuracy) == ({"x": 1}, 0.5)


def test_another_algorithm_drops_the_options_of_the_first(tmp_path):
    for override in ("algorithm=fedavg", "algorithm.name=fedavg"):
        loaded = config.load(write(tmp_path), [override, "algorithm.weighting=uniform"])
        assert loaded.algorithm == config.Part("fedavg", {"weighting": "uniform"})


CHANGES = ("algorithm=fedmut", "algorithm.alpha=2", "local={epochs: 3}", "local.momentum=0.5", "tracking.wandb={}")


@given(st.permutations([*CHANGES, "tracking.wandb.project=mine", "data.folder=x"]))
def test_the_order_of_overrides_means_nothing(tmp_path_factory, overrides):
    loaded = config.load(write(tmp_path_factory.getbasetemp()), overrides)
    assert loaded.algorithm == config.Part("fedmut", {"alpha": 2})
    assert loaded.local == config.Local(epochs=3, momentum=0.5)  # learning rate and batch size are the defaults again
    assert loaded.tracking.wandb == config.Wandb(project="mine")
    assert loaded.data == config.Part("digits", {"folder": "x"})


def test_options_outlive_their_part_s_name_in_either_spelling(tmp_path):
    for overrides in (
        ["algorithm.alpha=2", "algorithm={name: fedmut, beta0: 0.1}"],
        ["algorithm={alpha: 2, beta0: 0.1}", "algorithm=fedmut"],
        ["algorithm={name: fedmut, beta0: 0.1}", "algorithm.name=fedmut", "algorithm.alpha=2", "algorithm.alpha=2.0"],
    ):
        assert config.load(write(tmp_path), overrides).algorithm == config.Part("fedmut", {"alpha": 2, "beta0": 0.1})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rounds=1", "rounds=2"], "rounds is given twice, as 1 and 2"),
        (["rounds=1", "rounds=true"], "rounds is given twice, as 1 and True"),
        (["algorithm=fedavg", "algorithm.name=fedmut"], "is given twice, as 'fedavg' and 'fedmut'"),
        (["algorithm.alpha=3", "algorithm={name: fedmut, alpha: 2}"], "algorithm.alpha = 3 contradicts algorithm = "),
        (["algorithm=fedavg", "algorithm={name: fedmut}"], "algorithm.name = 'fedavg' contradicts algorithm = "),
        (["local.epochs=5", "local={epochs: 3}"], "local.epochs = 5 contradicts local = "),
        (["tracking.wandb.project=x", "tracking.wandb=null"], "project = 'x' contradicts tracking.wandb = None"),
        (["tracking.wandb.project=x", "tracking={wandb: {project: y}}"], "contradicts tracking = "),
    ],
)
def test_overrides_that_contradict_each_other_are_refused(tmp_path, overrides, message):
    for given_order in (overrides, overrides[::-1]):
        with pytest.raises(ConfigurationError, match="given twice|contradicts"):
            config.load(write(tmp_path), given_order)
    with pytest.raises(ConfigurationError, match=message):
        config.load(write(tmp_path), overrides)


def test_a_change_never_reaches_the_value_it_was_made_with():
    group = {"epochs": 3}
    values = dict(SMALL)
    config.change(values, [("local", group), ("local.momentum", 0.5)])
    assert group == {"epochs": 3} and values["local"] == {"epochs": 3, "momentum": 0.5}


@given(st.sampled_from(["rounds", "seed", "local.epochs", "engine.rounds_per_chunk"]), st.integers(-3, 5))
def test_numbers_are_kept_or_refused_by_name(key, value):
    outer, _, inner = key.partition(".")
    values = {**SMALL, outer: {inner: value} if inner else value}
    smallest = 0 if key == "seed" else 1
    if value >= smallest:
        loaded = config.from_dict(values)
        found = getattr(getattr(loaded, outer), inner) if inner else getattr(loaded, outer)
        assert found == value
    else:
        with pytest.raises(ConfigurationError, match=rf"{key} = {value}.*greater than or equal to {smallest}"):
            config.from_dict(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["algorithm=fedmutt"], "unknown algorithm 'fedmutt': did you mean fedmut"),
        (["data=cifar11"], "unknown data source 'cifar11': did you mean cifar10"),
        (["model=lennet"], "unknown model 'lennet': did you mean lenet"),
        (["partition=dirichlett"], "unknown partition 'dirichlett': did you mean dirichlet"),
        (["algorithm.alfa=1"], "unknown option of algorithm 'fedqp' 'alfa': did you mean alpha"),
        (["local.learning_rat=1"], "unknown setting 'local.learning_rat': did you mean local.learning_rate"),
        (["roundz=3"], "unknown setting 'roundz': did you mean rounds"),
        (["rounds"], "not of the form key=value"),
        (["rounds.x=3"], "single value"),
        (["local=3"], "local = 3 must be a mapping"),
        (["local.learning_rate=-1"], "local.learning_rate = -1.*greater than 0"),
        (["local.optimizer=sdg"], "local.optimizer = 'sdg'.*'sgd'"),
        (["participation.cohort=13"], "participation.cohort = 13 is more than the 12 clients.*1 to 12"),
        (["participation.dropout=1"], "participation.dropout = 1.*less than 1"),
        (["partition.beta=0"], "beta = 0.* must be above 0"),
        (["partition.beta=-0.5"], "beta = -0.5.*must be above 0"),
        (["partition.minimum=1000"], "minimum = 1000 must be between 1 and 120"),
        (["algorithm.alpha=["], r"override 'algorithm.alpha=\['.*not valid YAML"),
        (["local.learning_rate=.inf"], "local.learning_rate = inf.*finite"),
        (["algorithm.alpha=-1"], "alpha = -1.*greater than or equal to 0"),
        (["algorithm.alpha=big"], "alpha = 'big' must be a number, such as 0.1"),
        (["rounds=1e2"], "rounds = '1e2' must be a whole number, such as 10"),
        (["engine.lanes=x"], "engine.lanes = 'x' must be a whole number, such as 10, or must be 'auto'"),
        (["evaluation.stop_at_target=3"], "stop_at_target = 3 must be true or false"),
        (["algorithm.margin=1"], "margin = 1"),
        (["algorithm.margin=-0.1"], "margin = -0.1"),
        (["algorithm.form=joint", "algorithm.drift=1.5"], r"drift = 1.5 is not in \[0, 1\]"),
        (["algorithm.form=joint", "algorithm.drift=0.2", "algorithm.margin=0.5"], r"drift = 0.2 is not in \[0.5, 1\]"),
        (["algorithm=perfit"], "algorithm = 'perfit' tunes the LoRA adapters.*model = 'mlp' has none.*pretrained"),
        (["algorithm=fedit"], "algorithm = 'fedit' tunes the LoRA adapters.*model = 'mlp' has none"),
        (["evaluation.stop_at_target=true"], "there is no target: set evaluation.target_accuracy"),
        (["algorithm.form=joint", "algorithm.max_drift=0.5"], "max_drift = 0.5 works with form nearest or box"),
        (["rounds=yes"], "rounds = True must be a number .YAML reads yes"),
        (["seed=true"], "seed = True must be a number"),
        (["text.pack=1"], "text.pack = 1 must be true or false"),
        (["rounds=1:30"], "rounds = '1:30' must be a whole number"),
        (["rounds=1000000000000000000000000000000"], "rounds = 10+ must be less than or equal to 1000000000"),
        (["local.batch_size=1000000000000"], "local.batch_size = 1000000000000 must be less than"),
        (["model.hidden=[1000000000000]"], r"hidden = \[1000000000000\] must be less than"),
        (["partition.attempts=1000000000"], "attempts = 1000000000 must be less than or equal to 10000"),
        (
            ["model.hidden=[40000, 40000]", "algorithm=ditto", "partition={name: iid, clients: 1000}"],
            "takes .* GiB on the server .* for each of 1000 clients.*choose a smaller model",
        ),
        (["model.hidden=[1000000, 1000000]"], "the model has .* weights .*at most 2147483648"),
        (["engine.rounds_per_chunk=1000000000"], "the plan of a chunk takes .* GiB.*lower engine.rounds_per_chunk"),
        (["local.epochs=1000000000"], "the plan of a chunk takes .* GiB.*local.epochs = 1000000000"),
        (["name=../../x"], r"name = '../../x' must be one name, without /"),
        (["name=''"], "name = '' must be a name, not empty"),
        (["folder=''"], "folder = '' must be a path, not empty"),
        (["folder=~nobody-of-that-name/x"], "folder = .* there is no such home folder"),
        (["lr=1"], r"unknown setting 'lr': did you mean local.learning_rate\?"),
        (["local.lr=1"], r"unknown setting 'local.lr': did you mean local.learning_rate\?"),
        (["local.bs=1"], r"did you mean local.batch_size or evaluation.batch_size\?"),
        (["epochs=1"], r"did you mean local.epochs\?"),
        (["momentum=0"], r"did you mean local.momentum\?"),
        (["mu=0.1"], r"did you mean algorithm.proximal\?"),
        (["algorithm=fedprox", "algorithm.mu=0.1"], r"did you mean proximal\?"),
        (["cohort=1"], r"did you mean participation.cohort\?"),
        (["algorithm=zzz"], r"unknown algorithm 'zzz': Valid: .*, … \(23 in all\)"),
        (["engine.lanes=5"], "engine.lanes = 5 is more than the 4 clients"),
        (["engine.devices=1000"], "engine.devices = 1000, but 8"),
        (["engine.devices=2", "engine.parallel=vmap"], "engine.devices = 2 with engine.parallel = 'vmap'"),
        (["engine.devices=4", "engine.parallel=pmap"], "engine.lanes = 2 must be a multiple of engine.devices = 4"),
    ],
)
def test_bad_settings_are_named_with_the_remedy(tmp_path, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        build(config.load(write(tmp_path), changes))


def test_missing_files_and_broken_yaml(tmp_path):
    with pytest.raises(ConfigurationError, match="unknown configuration file.*did you mean .*small.yaml"):
        config.load(write(tmp_path).with_name("smal.yaml"))
    with pytest.raises(ConfigurationError, match="is a sweep: use `fedjax-qp sweep"):
        config.load(REPOSITORY / "configs/sweep_mnist_5k.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: [")
    with pytest.raises(ConfigurationError, match="not valid YAML"):
        config.load(broken)
    broken.write_text("rounds: 1\nname: x\nrounds: 7\n")
    with pytest.raises(ConfigurationError, match=r"broken.yaml, line 3 .* 'rounds' stands twice, in lines 1 and 3"):
        config.load(broken)
    for content in ("name: Größe".encode("latin-1"), "name: x".encode("utf-16"), b"\x89PNG\r\n\x1a\n\0\0"):
        broken.write_bytes(content)
        with pytest.raises(ConfigurationError, match="broken.yaml is not a UTF-8"):
            config.load(broken)
    broken.write_text("[" * 5000)
    with pytest.raises(ConfigurationError, match=r"broken.yaml is nested too deeply"):
        config.load(broken)
    for path in ("x" * 5000, "a\0b", "~nobody-of-that-name/x", "", str(tmp_path)):
        with pytest.raises(ConfigurationError, match="unknown configuration file"):
            config.load(path)
    broken.write_text("- 1")
    with pytest.raises(ConfigurationError, match="not a mapping"):
        config.load(broken)


def test_a_missing_data_folder_says_how_to_get_the_data(tmp_path):
    file = write(tmp_path, data={"name": "cifar10", "folder": str(tmp_path / "nowhere")})
    with pytest.raises(ConfigurationError, match="nowhere.*(?s:.*)prepare"):
        build(config.load(file))


RUNS = sorted(file for file in (REPOSITORY / "configs").glob("*.yaml") if not file.name.startswith("sweep_"))


@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.stem)
def test_every_config_file_is_valid_and_opens_with_its_command(file):
    resolve(config.load(file))
    head = file.read_text().split("\nname:")[0]
    assert f"fedjax-qp run configs/{file.name}" in head
    assert "# Time: " in head and "# Expect: " in head


def test_a_folder_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    loaded = config.load(write(tmp_path), ["folder=~/fedruns"])
    assert loaded.run_folder == tmp_path / "fedruns" / "small-seed0"
    assert config.to_dict(loaded)["folder"] == "~/fedruns"  # as it was written: the home may be another one later
    assert config.load("~/small.yaml") == config.load(tmp_path / "small.yaml")


def test_a_value_of_ten_to_the_tenth_parts_is_not_written_out(tmp_path):
    aliases = "".join(f"  - &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]\n" for n in range(1, 10))
    file = tmp_path / "bomb.yaml"
    file.write_text(f"name: x\nrounds:\n  - &l0 [x, x, x]\n{aliases}data: digits\n")
    with pytest.raises(ConfigurationError) as error:
        config.from_dict({**SMALL, **config.read_mapping(file)})
    assert len(str(error.value)) < 500


def test_differences_name_the_settings():
    first = config.to_dict(config.from_dict(SMALL))
    second = config.to_dict(config.from_dict({**SMALL, "rounds": 9, "participation": {"cohort": 3}}))
    assert config.differences(first, second) == ["participation.cohort: 4 → 3", "rounds: 4 → 9"]
