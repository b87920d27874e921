"""What does a local step of federated LoRA cost: many clients side by side, masks, memory, and against torch with PEFT?

    python benchmarks/lora_step.py                              SmolLM2-135M, one sequence of 128 tokens for each client
    python benchmarks/lora_step.py --path FOLDER --torch        another Hugging Face folder; beside a torch + PEFT loop

All candidates run the same model on the same tokens, in turn; ratios are taken within each turn. "M clients" is one step of
M clients in one program, to be compared with M steps of one client.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import in_turn, paired_ratio, write_rows

from fedjax_qp.algorithms.local import LocalState, local_training, mean_loss
from fedjax_qp.algorithms.sparse import masked_training
from fedjax_qp.data.text.sequences import Sequences
from fedjax_qp.federated import Batch
from fedjax_qp.models.language import gguf
from fedjax_qp.models.language.adapted import AdaptedModel, pretrained

RANK, ALPHA, LEARNING_RATE = 8, 16.0, 1e-3
TARGETS = ("q_proj", "v_proj")


def tokens_of(language: AdaptedModel, clients: int, batch: int, length: int) -> Batch:
    """Random tokens, all of which count: arrays [clients, batch, length]."""
    shape = (clients, batch, length)
    tokens = np.random.default_rng(0).integers(5, language.config.vocabulary, shape).astype(np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    sequences = Sequences(tokens, np.ones(shape, np.int32), positions, positions > 0)
    return jax.device_put(Batch(sequences, jnp.ones(shape[:2], bool)))


class Step:
    """One step of some clients side by side, compiled."""

    def __init__(self, language: AdaptedModel, clients: int, batch: int, length: int, *, masked: bool = False):
        optimizer = optax.adamw(LEARNING_RATE)
        training = masked_training(language.model, optimizer) if masked else local_training(language.model, optimizer)
        self.batches = tokens_of(language, clients, batch, length)
        params = language.model.init(jax.random.key(0))
        if masked:
            keep = jax.tree.map(lambda leaf: jax.random.bernoulli(jax.random.key(1), 0.5, leaf.shape), params.trainable)
            params = params._replace(masks=keep)
        one = training.start(params)
        self.state = jax.tree.map(lambda leaf: jnp.stack([leaf] * clients), one)
        self.held = sum(leaf.nbytes for leaf in jax.tree.leaves(one))
        self.frozen = jax.device_put(language.frozen)

        def step(frozen: dict, state: LocalState, batches: Batch) -> LocalState:
            return jax.vmap(partial(training.step, frozen), in_axes=(0, 0, None))(state, batches, None)

        self.program = jax.jit(step).lower(self.frozen, self.state, self.batches).compile()
        found = self.program.memory_analysis()
        assert found is not None
        self.temporary = found.temp_size_in_bytes
        self()

    def __call__(self) -> None:
        self.state = jax.block_until_ready(self.program(self.frozen, self.state, self.batches))

    @property
    def loss(self) -> float:
        return float(mean_loss(self.state)[0])


def torch_step(folder: Path, batch: Batch) -> Callable[[], float]:
    """The same step as the usual torch + PEFT loop takes it; returns the loss."""
    import torch  # pyright: ignore[reportMissingImports]  (an extra)
    from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    settings = LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=list(TARGETS), task_type="CAUSAL_LM")
    model = get_peft_model(base, settings).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=1e-4)
    tokens = torch.from_numpy(np.array(batch.examples.tokens[0])).long()

    def step() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, help="Hugging Face folder; default SmolLM2 from its package")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--torch", action="store_true", help="beside torch and PEFT (make test-oracles installs them)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/lora_step.jsonl"))
    arguments = parser.parse_args()
    folder = arguments.path or gguf.smollm2()
    language = pretrained(1, path=str(folder), rank=RANK, alpha=ALPHA, targets=TARGETS)
    shape = (arguments.batch, arguments.length)
    steps = {f"{clients} clients": Step(language, clients, *shape) for clients in arguments.clients}
    most = max(arguments.clients)
    steps["masked"] = Step(language, most, *shape, masked=True)
    candidates: dict[str, Callable[[], object]] = dict(steps)
    if arguments.torch:
        candidates["torch"] = torch_step(folder, tokens_of(language, 1, *shape))
    seconds = in_turn(candidates, arguments.repeats)
    one = f"{min(arguments.clients)} clients"
    rows = [
        {
            "benchmark": "lora_step",
            "model": folder.name,
            "candidate": name,
            "sequences": list(shape),
            "seconds": median(seconds[name]),
            "ratio_to_one_client": paired_ratio(seconds, name, one),
            "ratio_to_unmasked": paired_ratio(seconds, name, f"{most} clients") if name == "masked" else None,
            "bytes_held_per_client": steps[name].held if name in steps else None,
            "temporary_bytes": steps[name].temporary if name in steps else None,
        }
        for name in candidates
    ]
    write_rows(rows, arguments.output)


if __name__ == "__main__":
    main()
