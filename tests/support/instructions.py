"""A tiny Llama with its own tokenizer, and three files of records for it: whole runs of instruction tuning in seconds."""

import json
from pathlib import Path

import jax
import numpy as np
import tokenizers

from fedjax_qp.models.language.llama import LlamaConfig, initial_weights
from fedjax_qp.models.language.pretrained import save_weights

WORDS = "name,say,count,colour,animal,number,red,green,blue,cat,dog,owl,one,two,three,please,a,the,of,and".split(",")  # noqa: SIM905
SMALL = LlamaConfig(
    vocabulary=64,
    width=16,
    layers=2,
    heads=2,
    key_value_heads=1,
    head_size=8,
    hidden=32,
    rope_theta=10000.0,
    rope_scaling=None,
    norm_epsilon=1e-5,
    tied=True,
)


def write_instructions(folder: Path) -> Path:
    """Fills a folder with the model, its tokenizer and the files."""
    save_weights(folder / "model", SMALL, initial_weights(SMALL, jax.random.key(0)))
    vocabulary = {word: index for index, word in enumerate(["<unk>", "</s>", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    generator = np.random.default_rng(0)
    for client in range(3):
        lines = [
            {
                "instruction": " ".join(generator.choice(WORDS, 4)),
                "output": " ".join(generator.choice(WORDS[6 + 3 * client : 9 + 3 * client], 5)),
            }
            for _ in range(12 + 4 * client)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"client_{client}.jsonl").write_text(text)
    return folder


def instruction_settings(place: Path, **changes) -> dict:
    """Two rounds of PerFIT on what such a folder holds."""
    return {
        "name": "tiny",
        "rounds": 2,
        "folder": str(place / "runs"),
        "data": {"name": "records", "files": str(place / "client_*.jsonl")},
        "partition": "natural",
        "model": {"name": "pretrained", "path": str(place / "model"), "rank": 2, "alpha": 4},
        "algorithm": {"name": "perfit", "warm_up": 1, "prunings": 2, "score_batches": 1},
        "text": {"template": "short", "cut_off": 24, "test_records": 4},
        "local": {"optimizer": "adamw", "learning_rate": 0.01, "epochs": 1, "batch_size": 2},
        "participation": {"cohort": 3},
        "engine": {"lanes": 2, "rounds_per_chunk": 1},
        "evaluation": {"batch_size": 4},
        **changes,
    }
