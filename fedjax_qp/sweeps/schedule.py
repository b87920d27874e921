"""Tasks on Dask: the embedded cluster or an existing one, retries, and what happens when a worker dies.

The embedded cluster is a scheduler in this process and worker processes beside it, all of them listening on the loopback
interface only, without dashboard. It knows no passwords, so whoever has an account on this machine could reach it while it
runs; where that matters, start a Dask cluster with TLS and give its address. Each worker has one thread (JAX in several
threads of a process would have them wait for each other) and its share of the cores, or a GPU of its own.

An existing cluster is given by the address of its scheduler, however it was started (`dask scheduler`, dask-jobqueue on
Slurm, dask-kubernetes). Its workers need this package, one thread each, the sweep's folder under the same path, and data by
absolute paths. Where a worker dies, Dask gives its task to another one, which continues from the checkpoints.
"""

import contextlib
import itertools
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import dask.config
from distributed import Client, Future, LocalCluster, Worker, WorkerPlugin, wait

from fedjax_qp.engine.devices import cores
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.sweeps.space import Sweep
from fedjax_qp.sweeps.worker import Task, execute, split

_CORES_PER_WORKER = 2
_GPU_SHARE = 0.75  # of its memory that JAX takes when a process starts, for all workers on a GPU together
_CONNECT_SECONDS = 30


class Machine(NamedTuple):
    """What the embedded cluster may use."""

    cores: int
    gpus: tuple[str, ...]  # as in CUDA_VISIBLE_DEVICES


class Setup(WorkerPlugin):
    """Prepares an embedded worker before it starts JAX; Dask also applies it to a worker that it restarts."""

    name = "fedjax_qp-setup"

    def __init__(self, environments: Sequence[dict[str, str]]):
        self._environments = environments

    def setup(self, worker: Worker) -> None:
        """Ctrl-C reaches all processes of a terminal, and so does its end; only the sweep is to act on them."""
        with contextlib.suppress(ValueError):  # not the main thread
            for name in ("SIGINT", "SIGHUP"):
                if hasattr(signal, name):
                    signal.signal(getattr(signal, name), signal.SIG_IGN)
        os.environ.update(self._environments[int(worker.name) % len(self._environments)])


def machine(platforms: str) -> Machine:
    """The cores and GPUs of this machine, found without starting JAX.

    Args:
      platforms: the workers' JAX_PLATFORMS; empty for JAX's own choice.
    """
    if platforms and not any(name in platforms for name in ("cuda", "gpu")):
        return Machine(cores(), ())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        # As in CUDA, entries after an invalid one are ignored.
        names = itertools.takewhile(lambda name: name and not name.startswith("-"), visible.split(","))
        return Machine(cores(), tuple(names))
    try:
        found = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return Machine(cores(), ())
    return Machine(cores(), tuple(str(number) for number in range(len(found.stdout.splitlines()))))


def default_workers(here: Machine) -> int:
    """One for each GPU; without any, one for every two cores, since one worker's program uses several."""
    return len(here.gpus) or max(1, here.cores // _CORES_PER_WORKER)


def worker_environments(here: Machine, workers: int) -> list[dict[str, str]]:
    """Variables for each worker: its share of the cores, its GPU, and its share of that GPU's memory."""
    environments = []
    for number in range(workers):
        environment = {"PJRT_NPROC": str(max(1, here.cores // workers))}  # the threads of XLA on the CPU
        if here.gpus:
            sharing = -(-workers // len(here.gpus))
            environment["CUDA_VISIBLE_DEVICES"] = here.gpus[number % len(here.gpus)]
            environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{_GPU_SHARE / sharing:.3f}"
        environments.append(environment)
    return environments


@contextlib.contextmanager
def connect(sweep: Sweep, log: Path, platforms: str) -> Iterator[Client]:
    """A client of the embedded cluster, or of the one at `sweep.cluster`.

    Args:
      log: file for what Dask has to say.
      platforms: JAX_PLATFORMS of the embedded workers.

    Raises:
      ConfigurationError: nobody answers at the address.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_logging_to(log))
        if sweep.cluster is not None:
            yield stack.enter_context(_existing(sweep.cluster))
            return
        here = machine(platforms)
        workers = default_workers(here) if sweep.workers == "auto" else sweep.workers
        # How often a task may take its worker down with it before it counts as failed.
        stack.enter_context(dask.config.set({"distributed.scheduler.allowed-failures": sweep.retries}))
        cluster = LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",  # Dask asks for one also where there is no dashboard
            scheduler_kwargs={"dashboard": False},
            memory_limit=0,  # Dask would kill a worker that fills its share; JAX decides what it needs
            env={"JAX_PLATFORMS": platforms},
        )
        client = stack.enter_context(Client(stack.enter_context(cluster), set_as_default=False))
        client.register_plugin(Setup(worker_environments(here, workers)))
        yield client


def _existing(address: str) -> Client:
    try:
        return Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"cluster = {address!r} does not answer ({error}): give the address that `dask scheduler` prints, or leave it "
            "out for an embedded cluster."
        ) from None


def workers_of(client: Client) -> int:
    """How many workers there are now, at least 1: an adaptive cluster starts them when there is work."""
    return max(1, len(client.scheduler_info(n_workers=-1)["workers"]))


def run_tasks(
    client: Client,
    tasks: Sequence[Task],
    retries: int,
    watch: Callable[[], None],
    failed: Callable[[Task, str], None],
    interval: float = 1.0,
) -> None:
    """Executes tasks until each of them has ended.

    A task that fails for good is taken apart: its halves are tried anew, and so on down to single runs, so that one run
    that cannot work, or too many runs for one device's memory, do not take the others with them.

    Args:
      watch: called about every `interval` seconds, for display and interruption.
      failed: called with the task of a single run that fails, and why.

    Raises:
      RuntimeError: the cluster has gone.
    """
    waiting = {_submit(client, task, retries): task for task in tasks}
    while waiting:
        with contextlib.suppress(TimeoutError), client.as_current():
            wait(list(waiting), timeout=interval, return_when="FIRST_COMPLETED")
        for future in [future for future in waiting if future.status != "pending"]:
            task = waiting.pop(future)
            if future.status == "error":
                parts = split(task)
                if parts is None:
                    failed(task, str(future.exception()).strip() or "no reason given")
                for part in parts or ():
                    waiting[_submit(client, part, retries)] = part
            elif future.status != "finished":  # "cancelled" or "lost"
                raise RuntimeError(f"the cluster has gone ({future.status}): run the same command again to continue.")
        watch()


def _submit(client: Client, task: Task, retries: int) -> Future:
    return client.submit(execute, task, key=f"{task.attempt}-{task.key}", retries=retries, pure=False)


@contextlib.contextmanager
def _logging_to(path: Path) -> Iterator[Any]:
    """Keeps what Dask logs out of the table on the screen."""
    logger, handler = logging.getLogger("distributed"), logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    before, propagate = logger.handlers[:], logger.propagate
    logger.handlers, logger.propagate = [handler], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before, propagate
        handler.close()
