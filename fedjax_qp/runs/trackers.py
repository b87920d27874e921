"""Where a run's scalars go besides its own records: TensorBoard, Weights & Biases, MLflow (`tracking` in the configuration).

The records in the run folder are the truth and trackers hold copies. So a tracker that fails, at its start or later, is
reported once and left out, while the run goes on; what it missed is sent when the run is resumed, even one that has ended.
A file in the run folder holds each tracker's own run id and the rounds it has, so that a resumed run continues the
same tracked run. Rounds that are computed again after a kill are the same bits and are not sent twice.

A server that does not answer costs seconds, once: it is asked before anything is sent, requests have short time-outs and one
retry, and a tracker that failed is not asked again, nor for a minute by the process's other runs. Where that is too little,
the libraries' variables say how much (MLFLOW_HTTP_REQUEST_TIMEOUT, MLFLOW_HTTP_REQUEST_MAX_RETRIES, WANDB_INIT_TIMEOUT …).

With the defaults nothing leaves the machine: W&B writes offline files (`wandb sync RUN/wandb/offline-run-*` uploads them),
MLflow a SQLite database beside the run folders (`mlflow ui --backend-store-uri sqlite:///runs/mlflow.db` shows it). The
libraries' own usage reports are then off, unless the environment turns them on.
"""

import contextlib
import importlib.util
import logging
import os
import re
import socket
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tensorboardX import SummaryWriter

from fedjax_qp import config as configuration
from fedjax_qp.config import Config
from fedjax_qp.files import JsonFile
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs import record_numbers
from fedjax_qp.runs.folder import RunFolder

_PACKAGES = {"wandb": "wandb", "mlflow": "mlflow"}  # by setting; TensorBoard's is always installed
_MLFLOW_BATCH = 1000  # metrics in one request, MLflow's own limit
_MLFLOW_PARAMS = 100  # parameters likewise
_MLFLOW_VALUE = 500  # characters of a parameter that every store takes
# MLflow's own would wait for minutes before the first round.
_MLFLOW_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",  # seconds
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}
_ANSWER_SECONDS = 2.0  # for a server to take a connection
_WANDB_SECONDS = 10.0  # for its server to take a run; W&B waits for 90
_SLOW_SECONDS = 1.0  # a failure that takes longer is one to spare the other runs of the process
_SPARED_SECONDS = 60.0
_spared_until: dict[tuple[str, str], float] = {}  # by tracker and destination
_STATUS = {None: "FAILED", "diverged": "FAILED", "interrupted": "KILLED"}  # all other reasons: FINISHED


class Tracker(Protocol):
    """One destination. Its methods may raise whatever its library raises; `Trackers` catches it."""

    def log(self, records: list[dict]) -> None:
        """Takes records of rounds that follow those it has."""
        ...

    def close(self, reason: str | None) -> None:
        """Args: reason: why the run ended (`run.Outcome.reason`); None for an error."""
        ...


class Continued(NamedTuple):
    """What a tracker remembers of a run between processes."""

    id: str
    to: str  # the destination: an id means nothing elsewhere
    rounds: int = 0  # that it has


def check_trackers(config: Config) -> None:
    """Refuses trackers whose library is missing.

    Raises:
      ConfigurationError: it is.
    """
    for name, package in _PACKAGES.items():
        if getattr(config.tracking, name) is not None and importlib.util.find_spec(package) is None:
            raise ConfigurationError(
                f"tracking.{name} needs the package {package}: pip install -e '.[trackers]', or set tracking.{name}=null."
            )


class Trackers:
    """The trackers of one run; never raises."""

    def __init__(self, config: Config, folder: Path, history: list[dict], report: Callable[[str], None]):
        """Opens them and sends what they miss of the past.

        Args:
          folder: the run folder, which exists.
          history: records of the rounds that the run has finished.
          report: takes a sentence for the user.
        """
        self._folder, self._report = RunFolder(folder), report
        self._open: dict[str, Tracker] = {}
        self._known = _read(self._folder.trackers)
        self._rounds: dict[str, int] = {}
        self._to: dict[str, str] = {}  # destinations
        if config.tracking.wandb:
            self._to["wandb"] = _wandb_destination(config)
        if config.tracking.mlflow:
            self._to["mlflow"] = mlflow_uri(config, folder)
        openers: dict[str, Callable[[], tuple[Tracker, int]]] = {
            "tensorboard": lambda: self._tensorboard(folder, history[-1]["round"] if history else 0),
            "wandb": lambda: self._continued("wandb", config, folder, WandbTracker),
            "mlflow": lambda: self._continued("mlflow", config, folder, MlflowTracker),
        }
        for name, opener in openers.items():
            if getattr(config.tracking, name):
                self._attempt(name, lambda name=name, opener=opener: self._start(name, opener, history))

    def write(self, records: list[dict]) -> None:
        """Sends records; those of rounds that a tracker has are not sent again."""
        for name, tracker in list(self._open.items()):
            self._attempt(name, lambda name=name, tracker=tracker: self._send(name, tracker, records))

    def close(self, reason: str | None) -> None:
        """Closes all; a second call does nothing."""
        for name, tracker in list(self._open.items()):
            self._attempt(name, lambda tracker=tracker: tracker.close(reason))
        self._open.clear()

    def _start(self, name: str, opener: Callable[[], tuple[Tracker, int]], history: list[dict]) -> None:
        self._open[name], self._rounds[name] = opener()
        self._send(name, self._open[name], history)

    def _send(self, name: str, tracker: Tracker, records: list[dict]) -> None:
        missing = [record for record in records if record["round"] > self._rounds[name]]
        if not missing:
            return
        tracker.log(missing)
        self._rounds[name] = missing[-1]["round"]
        if name in self._known:
            self._remember(name, self._known[name]._replace(rounds=self._rounds[name]), durable=False)

    def _tensorboard(self, folder: Path, done: int) -> tuple[Tracker, int]:
        """A writer that purges the rounds after the last one `done`; it also gets earlier rounds that it missed."""
        known = self._known.get("tensorboard", Continued(id="", to=""))
        held = min(known.rounds, done)
        self._remember("tensorboard", known._replace(rounds=held))
        return TensorBoardTracker(folder, held), held

    def _continued(self, name: str, config: Config, folder: Path, opener: Callable) -> tuple[Tracker, int]:
        """Opens a tracker with the id that it had, if it had one there."""
        known, to = self._known.get(name), self._to[name]
        known = known if known is not None and known.to == to else None
        tracker = opener(config, Path(folder), known.id if known else None)
        self._remember(name, known or Continued(tracker.id, to))
        return tracker, self._known[name].rounds

    def _remember(self, name: str, continued: Continued, *, durable: bool = True) -> None:
        """A tracker's id is kept at once; its rounds with the next wait for the disk, which the records have had already."""
        self._known[name] = continued
        self._folder.trackers.write({key: value._asdict() for key, value in self._known.items()}, durable=durable)

    def _attempt(self, name: str, action: Callable[[], Any]) -> None:
        began, there = time.monotonic(), (name, self._to.get(name, ""))
        try:
            if began < _spared_until.get(there, began):
                raise ConnectionError("it has just failed slowly for another run")
            action()
        except Exception as error:  # whatever a tracker's library raises, the run is worth more
            self._open.pop(name, None)
            if (now := time.monotonic()) - began > _SLOW_SECONDS:
                _spared_until[there] = now + _SPARED_SECONDS
            self._report(
                f"tracking.{name} failed and is left out from here on ({type(error).__name__}: {error}). The run goes on and "
                f"its records are complete; `fedjax-qp resume {self._folder}` sends {name} what it misses."
            )


def _read(file: JsonFile) -> dict[str, Continued]:
    """What earlier processes left; a damaged file counts as none."""
    with contextlib.suppress(TypeError, ValueError):
        known = {name: Continued(**entry) for name, entry in (file.read() or {}).items()}
        return {name: one._replace(rounds=int(one.rounds)) for name, one in known.items()}
    return {}


# --- TensorBoard ------------------------------------------------------------------------------------------------------


class TensorBoardTracker:
    """Event files in a folder of their own."""

    def __init__(self, folder: Path, done: int):
        """Args: done: rounds whose events stay valid; later ones in earlier files are purged."""
        # Event files are named by the second; the suffix keeps a quick resume from overwriting the file before it.
        self._board = SummaryWriter(
            str(RunFolder(folder).tensorboard),
            purge_step=done + 1,
            max_queue=0,  # unbounded: a slow disk does not hold up the run
            flush_secs=10,
            filename_suffix=f".after{done}",
        )

    def log(self, records: list[dict]) -> None:
        """See `Tracker`."""
        for record in records:
            for name, value in record_numbers.scalars(record):
                self._board.add_scalar(name, value, record["round"])

    def close(self, reason: str | None) -> None:
        """See `Tracker`."""
        self._board.close()


# --- Weights & Biases -------------------------------------------------------------------------------------------------


def _wandb_destination(config: Config) -> str:
    settings = config.tracking.wandb
    assert settings is not None
    return f"{settings.mode}: {settings.entity or ''}/{settings.project}"


class WandbTracker:
    """A run of Weights & Biases, in the group of its name (so seeds stand together).

    An offline run that was resumed has several folders in `folder/wandb` with one id; `wandb sync` joins them.
    """

    def __init__(self, config: Config, folder: Path, id: str | None):
        """Args: id: of the run to continue; None begins a new one."""
        settings = config.tracking.wandb
        assert settings is not None
        if settings.mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its usage reports would go out even so
        import wandb

        self.id = id or uuid.uuid4().hex[:12]
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            mode=settings.mode,
            dir=str(folder),
            id=self.id,
            resume="allow",
            allow_val_change=True,  # a resumed run shows the settings that it goes on with
            reinit="create_new",  # several runs may be open in one process
            name=folder.name,
            group=config.name,
            config=_described(config, folder),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False, **_wandb_patience()),
        )

    def log(self, records: list[dict]) -> None:
        """See `Tracker`."""
        for record in records:
            self._run.log(dict(record_numbers.scalars(record)), step=record["round"])

    def close(self, reason: str | None) -> None:
        """See `Tracker`."""
        self._run.summary["ended"] = reason or "error"
        self._run.finish(exit_code=int(_STATUS.get(reason) == "FAILED"))


def _wandb_patience() -> dict[str, Any]:
    """How long W&B waits for its server, unless the environment says it."""
    wanted = {"init_timeout": _WANDB_SECONDS, "login_timeout": _WANDB_SECONDS}
    return {name: seconds for name, seconds in wanted.items() if f"WANDB_{name.upper()}" not in os.environ}


# --- MLflow -----------------------------------------------------------------------------------------------------------


def mlflow_uri(config: Config, folder: Path) -> str:
    """The store that a run is tracked in: the setting, or a database beside the run folders."""
    settings = config.tracking.mlflow
    assert settings is not None
    return settings.uri or f"sqlite:///{(Path(folder).resolve().parent / 'mlflow.db').as_posix()}"


class MlflowTracker:
    """A run of MLflow. Written through a client object, so several runs may be open in one process."""

    def __init__(self, config: Config, folder: Path, id: str | None):
        """Args: id: of the run to continue; None begins a new one."""
        for name, value in {"MLFLOW_DISABLE_TELEMETRY": "true", **_MLFLOW_PATIENCE}.items():
            os.environ.setdefault(name, value)  # read when the library is imported
        uri = mlflow_uri(config, folder)
        _check_answer(uri)
        from mlflow import MlflowClient

        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a warning for each retry
        settings = config.tracking.mlflow
        assert settings is not None
        self._client = MlflowClient(tracking_uri=uri)
        described = configuration.flat(_described(config, folder))
        values = {_mlflow_name(name): str(value)[:_MLFLOW_VALUE] for name, value in described.items()}
        if id is not None:
            self.id = id
            self._client.update_run(id, status="RUNNING")
            self._tag_changes(values)
            return
        experiment = self._client.get_experiment_by_name(settings.experiment)
        number = experiment.experiment_id if experiment else self._client.create_experiment(settings.experiment)
        run = self._client.create_run(number, run_name=folder.name, tags={"group": config.name})
        self.id = run.info.run_id
        self._log_params(values)

    def _log_params(self, values: dict[str, str]) -> None:
        from mlflow.entities import Param

        for batch in _batches([Param(name, value) for name, value in values.items()], _MLFLOW_PARAMS):
            self._client.log_batch(self.id, params=batch)

    def _tag_changes(self, values: dict[str, str]) -> None:
        """Shows what a resumed run goes on with: MLflow's parameters never change, so new values are tags of that name."""
        from mlflow.entities import RunTag

        found = self._client.get_run(self.id).data
        tags = [
            RunTag(name, value)
            for name, value in values.items()
            if name in found.params and found.tags.get(name, found.params[name]) != value
        ]
        for batch in _batches(tags, _MLFLOW_PARAMS):
            self._client.log_batch(self.id, tags=batch)
        self._log_params({name: value for name, value in values.items() if name not in found.params})

    def log(self, records: list[dict]) -> None:
        """See `Tracker`."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [
            Metric(_mlflow_name(name), value, now, record["round"])
            for record in records
            for name, value in record_numbers.scalars(record)
        ]
        for batch in _batches(metrics, _MLFLOW_BATCH):
            self._client.log_batch(self.id, metrics=batch)

    def close(self, reason: str | None) -> None:
        """See `Tracker`."""
        self._client.set_tag(self.id, "ended", reason or "error")
        self._client.set_terminated(self.id, status=_STATUS.get(reason, "FINISHED"))


def _check_answer(uri: str) -> None:
    """Raises ConnectionError where nobody takes a connection at a server's address; a proxy is left to the library."""
    server = urllib.parse.urlsplit(uri)
    if server.scheme not in ("http", "https") or server.hostname is None:
        return
    if server.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(server.hostname):
        return
    try:
        port = server.port or (443 if server.scheme == "https" else 80)
        socket.create_connection((server.hostname, port), timeout=_ANSWER_SECONDS).close()
    except OSError as error:
        raise ConnectionError(f"nobody answers at {server.hostname}:{port}: {error}") from None


def _mlflow_name(name: str) -> str:
    """A name that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def _batches(items: list, size: int) -> Iterable[list]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _described(config: Config, folder: Path) -> dict[str, Any]:
    """The settings of a run, and where and with which versions it was computed."""
    values = configuration.to_dict(config)
    found = RunFolder(folder).environment.read()
    return values if found is None else {**values, "environment": found}
