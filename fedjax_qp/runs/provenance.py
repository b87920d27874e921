"""What a run is made of, by content: it is continued, and looked at, with nothing else.

Settings name data and weights by their place, where other ones may lie tomorrow. So a run's folder holds digests of what was
built from them: the data as the source gave them, who owns which part, the encoded training and test
examples, the frozen weights, the tokenizer and the model's configuration.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_qp.config import to_dict
from fedjax_qp.data import Instructions
from fedjax_qp.experiment import Experiment
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.settings import plugins

# What depends on these settings alone, so that runs that agree in them must have the same.
_COMMON = {"data": "data", "frozen weights": "model", "tokenizer": "model", "model configuration": "model"}
# What other versions of packages may read otherwise from the same files.
_READ_BY_PACKAGES = {"tokenizer", "model configuration"}


class Provenance(NamedTuple):
    """Digests of what an experiment is made of, and the settings that it was made from."""

    digests: dict[str, str]
    settings: dict[str, Any]

    def write(self, folder: RunFolder) -> None:
        """Leaves them in a run's folder."""
        folder.provenance.write(self._asdict())

    def check(self, folder: RunFolder, say: Callable[[str], None]) -> bool:
        """Compares them with those that a run began with.

        Args:
          say: takes a sentence for the user.

        Returns:
          Whether the folder has them; those of earlier versions have not.

        Raises:
          ConfigurationError: something differs.
        """
        before = _read(folder)
        if before is None:
            say(
                f"{folder} holds no digests of its data ({folder.provenance.path.name}): whether they are those "
                "it began with cannot be checked"
            )
            return False
        changed = [name for name, digest in before.digests.items() if self.digests.get(name, digest) != digest]
        if changed:
            by_packages = (
                f" Other versions of packages may be the reason too: {folder.environment.path} names those it "
                "began with, transformers and tokenizers among them."
            )
            read_by = "" if _READ_BY_PACKAGES.isdisjoint(changed) else by_packages
            raise ConfigurationError(
                f"{folder} was begun with other content: {', '.join(changed)} differ{'s' if len(changed) == 1 else ''} from "
                f"what {_places(self.settings, changed)} hold now. Restore what was there, or start a new run under "
                "another name."
                f"{read_by}"
            )
        return True


def check_beside(made_of: Sequence[Provenance], folders: Iterable[Path]) -> None:
    """Compares data and weights with those of the runs that these will be compared with.

    Raises:
      ConfigurationError: a run from the same settings was made of other data or weights.
    """
    for folder in folders:
        before = _read(RunFolder(folder))
        if before is None:
            continue
        for mine in dict.fromkeys((json.dumps(one.settings), json.dumps(one.digests)) for one in made_of):
            settings, digests = map(json.loads, mine)
            for name, part in _COMMON.items():
                same = before.settings.get(part) == settings[part]
                if same and before.digests.get(name) != digests.get(name):
                    raise ConfigurationError(
                        f"{name} differs from what {folder} was made of, though {_places(settings)} are named alike: "
                        "restore what was there, or choose another name for the new runs."
                    )


def provenance(experiments: Sequence[Experiment]) -> list[Provenance]:
    """Takes the digests of some experiments; what they share is read once."""
    known = _Known({}, {})
    return [Provenance(_digests(experiment, known), _settings(experiment)) for experiment in experiments]


class _Known(NamedTuple):
    """Digests by identity, which holds while the object is kept beside its digest."""

    wholes: dict[int, tuple[Any, str]]
    leaves: dict[int, tuple[Any, str]]  # images are the data and the training examples at once


def _settings(experiment: Experiment) -> dict[str, Any]:
    """As JSON reads them back. Some options of a model say how its adapters are laid out, not what its weights are."""
    values = to_dict(experiment.config)
    return json.loads(json.dumps({part: values[part] for part in ("data", "model")}, default=str))


def _digests(experiment: Experiment, known: _Known) -> dict[str, str]:
    task = experiment.task
    # By name: an object that experiments share, and what of it counts.
    found: dict[str, tuple[Any, Callable[[], Any]]] = {
        "partition": (task.parts, lambda: (task.parts, np.asarray(task.sizes), task.counts)),
        "training examples": (task.train, lambda: task.train),
        # What an evaluation's batches pad is no content; the size of batches may change.
        "test examples": (task.test, lambda: _present(task.test.examples, task.test.mask)),
    }
    if task.dataset is not None:
        found["data"] = (task.dataset, lambda: _source(task.dataset))
    if (personal := task.personal) is not None:
        mask = np.asarray(personal.mask)
        counts = mask.reshape(len(mask), -1).sum(1)
        found["clients' test examples"] = (personal, lambda: (_present(personal.examples, mask), counts))
    if jax.tree.leaves(task.frozen):
        found["frozen weights"] = (task.frozen, lambda: task.frozen)
    if (language := task.language) is not None:
        found["model configuration"] = (language.config, lambda: repr(language.config))
        found["tokenizer"] = (language.tokenizer, lambda: _tokenizer(language.tokenizer))
    for thing, content in found.values():
        if id(thing) not in known.wholes:
            known.wholes[id(thing)] = thing, _digest(content(), known.leaves)
    of_plugins = {f"plug-in {name}": digest for name, digest in plugins.digests(experiment.config.plugins).items()}
    return {name: known.wholes[id(thing)][1] for name, (thing, _) in found.items()} | of_plugins


def _present(tree: Any, mask: Any) -> Any:
    mask = np.asarray(mask)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[mask], tree)


def _source(dataset: Any) -> Any:
    """What a source gave, without the names of its files."""
    if isinstance(dataset, Instructions):
        return [json.dumps([record[:4] for record in part.records]) for part in (dataset.train, dataset.test)]
    return dataset.train, dataset.test, dataset.client_ids, dataset.mean, dataset.std


def _tokenizer(tokenizer: Any) -> str:
    """All that decides which tokens a text becomes."""
    facts = [
        getattr(tokenizer, name, None) for name in ("eos_token_id", "bos_token_id", "pad_token_id", "chat_template")
    ]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return json.dumps([*facts, backend.to_str() if backend is not None else repr(tokenizer)], default=str)


def _digest(content: Any, known: dict[int, tuple[Any, str]]) -> str:
    """Of a tree of arrays and texts: its leaves by name, type, shape and bytes."""
    leaves = jax.tree_util.tree_leaves_with_path(content)
    new = [leaf for _, leaf in leaves if id(leaf) not in known]
    with ThreadPoolExecutor() as pool:  # hashing lets Python's other threads run
        known |= {id(leaf): (leaf, digest) for leaf, digest in zip(new, pool.map(_leaf_digest, new), strict=True)}
    whole = hashlib.blake2b(digest_size=16)
    for path, leaf in leaves:
        whole.update(f"{jax.tree_util.keystr(path)} {known[id(leaf)][1]}\n".encode())
    return whole.hexdigest()


def _leaf_digest(leaf: Any) -> str:
    array = np.ascontiguousarray(np.frombuffer(leaf.encode(), np.uint8) if isinstance(leaf, str) else np.asarray(leaf))
    found = hashlib.blake2b(f"{array.dtype.name}{array.shape}".encode(), digest_size=16)
    found.update(array.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def _places(settings: dict[str, Any], changed: Iterable[str] = ()) -> str:
    """The data and the model of a run as its configuration names them, and the plug-ins if one of these has changed."""
    named = ["its plug-ins"] if any(name.startswith("plug-in ") for name in changed) else []
    for part in ("data", "model"):
        value = settings[part]
        place = next((str(value[key]) for key in ("path", "files", "folder", "file") if value.get(key)), value["name"])
        named.append(f"{part} {place}")
    return " and ".join(named)


def _read(folder: RunFolder) -> Provenance | None:
    found = folder.provenance.read()
    if found is None or not all(isinstance(found.get(name), dict) for name in Provenance._fields):
        return None
    return Provenance(found["digests"], found["settings"])
