"""What `fq.sweep` and `fq.inspect` return: the numbers of the same runs by other ways."""

import numpy as np
import pytest
from support.sweeps import write_sweep

import fedjax_qp as fq
from fedjax_qp.registry import ConfigurationError


@pytest.mark.filterwarnings("default")  # Dask's own
def test_a_sweep_returns_its_runs_with_the_numbers_that_they_have_alone(tmp_path):
    file = write_sweep(tmp_path, seeds=[0, 1], overrides={"algorithm": "fedmut"}, space={"algorithm.alpha": [1.0, 2.0]})
    found = fq.sweep(file, "rounds=2", "workers=1")
    assert len(found) == 4 and {folder.parent for folder in found.folders} == {tmp_path / "runs" / "small" / "runs"}
    alone = fq.run(
        data=fq.digits(),
        partition=fq.dirichlet(clients=12, beta=0.5, minimum=5),
        model=fq.mlp(hidden=[16]),
        methods={"trial-000": fq.fedmut(alpha=1.0), "trial-001": fq.fedmut(alpha=2.0)},
        local=fq.Local(learning_rate=0.05, epochs=1, batch_size=16),
        participation=fq.Participation(cohort=4),
        engine=fq.Engine(lanes=2, rounds_per_chunk=2),
        evaluation=fq.Evaluation(every=1, batch_size=100),
        rounds=2,
        seeds=[0, 1],
    )
    columns = ["method", "seed", "round", "train_loss", "test_accuracy"]
    swept, expected = (runs.frame()[columns].sort_values(columns[:3]) for runs in (found, alone))
    assert swept[columns[:3]].to_numpy().tolist() == expected[columns[:3]].to_numpy().tolist()
    np.testing.assert_allclose(swept[columns[3:]].to_numpy(float), expected[columns[3:]].to_numpy(float), rtol=1e-5)
    again = fq.sweep(file, "rounds=2", "workers=1")  # nothing is left to do
    assert again.frame().equals(found.frame())


def test_a_sweep_that_cannot_work_is_one_line(tmp_path):
    with pytest.raises(ConfigurationError, match="did you mean workers"):
        fq.sweep(write_sweep(tmp_path), "worker=2")


def test_an_inspection_has_the_numbers_of_the_records(tmp_path):
    """How a model serves the clients in their own mixtures of classes stands in the records too."""
    runs = fq.run(
        data=fq.digits(),
        partition=fq.dirichlet(clients=12, beta=0.5, minimum=5),
        model=fq.mlp(hidden=[16]),
        methods={"FedAvg": fq.fedavg()},
        participation=fq.Participation(cohort=4),
        engine=fq.Engine(lanes=2, rounds_per_chunk=2),
        rounds=2,
        folder=tmp_path,
        seeds=[0, 1],
    )
    found = fq.inspect(runs, what=["fairness"])
    assert list(found.columns) == ["run", "round", "instrument", "quantity", "value"]
    assert set(found["instrument"]) == {"fairness"} and set(found["round"]) == {2}
    assert set(found["run"]) == {"FedAvg-seed0", "FedAvg-seed1"}
    values = {(row["run"], row["quantity"]): row["value"] for row in found.to_dict("records")}
    for record in runs.frame().query("round == 2").to_dict("records"):
        for name in ("mean", "q10"):
            seen = values[f"FedAvg-seed{record['seed']}", f"client accuracy, mixture, {name}"]
            assert seen == pytest.approx(record[f"client_accuracy/{name}"])
    assert all((folder / "inspect").is_dir() for folder in runs.folders)


def test_an_unknown_instrument_is_named_with_the_nearest(tmp_path):
    runs = fq.run(
        data=fq.digits(), partition=fq.iid(clients=10), model=fq.mlp(hidden=[8]), methods=fq.fedavg(), rounds=1,
        folder=tmp_path, engine=fq.Engine(lanes=1),
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match="did you mean fairness"):
        fq.inspect(runs, what=["fairnes"])  # pyright: ignore[reportArgumentType]
