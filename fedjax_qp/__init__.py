"""fedjax_qp: a JAX simulator for federated learning.

Data flows one way: config → data → plan → round (jit) → run loop → records → plots. Start reading at `federated`.

    from fedjax_qp import config, experiment
    from fedjax_qp.runs.loop import simulate

    made = experiment.build(config.load("configs/mnist5k.yaml"))
    for chunk in simulate(made):
        print(chunk.records[-1]["test_accuracy"])
"""

__version__ = "0.1.0"
