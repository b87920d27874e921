"""Language models against transformers and PEFT on the same files, and against what text is worth to real weights."""

import dataclasses
import random
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_qp.federated import Params
from fedjax_qp.models.language import gguf, lora
from fedjax_qp.models.language.generation import generate
from fedjax_qp.models.language.llama import forward, logits
from fedjax_qp.models.language.peft import export_adapter, import_adapter
from fedjax_qp.models.language.pretrained import load_weights, read_config
from fedjax_qp.models.language.tokenizer import load_tokenizer
from fedjax_qp.registry import ConfigurationError

transformers = pytest.importorskip("transformers")
oracle = pytest.mark.oracle
# Deprecations inside transformers and PEFT are not ours.
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]

TOKENS = np.random.default_rng(0).integers(3, 90, (2, 48)).astype(np.int32)
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Architecture, its settings, and what our configuration must lose for the logits to change: else nothing was compared.
MODELS = {
    "mistral": ("Mistral", {"sliding_window": 8}, {"sliding_window": None}),
    "qwen2": ("Qwen2", {}, None),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
        {"sliding_window": None},
    ),
    "llama-biases": ("Llama", {"attention_bias": True}, None),
    "llama3-scaling": ("Llama", {"rope_parameters": LLAMA3}, {"rope_scaling": None}),
    "linear-scaling": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}},
        {"rope_scaling": None},
    ),
    "untied": ("Llama", {"tie_word_embeddings": False}, None),
    "tied": ("Llama", {"tie_word_embeddings": True}, None),
}
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big "
    "dog. The dog was very sad because he could not find his ball. Lily wanted to help the dog. She looked under the tree "
    "and found the ball. The dog was so happy. He wagged his tail and ran to Lily. They played together all day. Lily and "
    "the dog became best friends."
)
ENGLISH = (
    "The water cycle describes how water moves on, above, and below the surface of the Earth. When the sun heats the "
    "oceans, lakes, and rivers, some of the water evaporates and turns into water vapor. The water vapor rises into the "
    "air, where it cools and condenses into tiny droplets. These droplets come together to form clouds. When the droplets "
    "become too heavy, they fall back to the ground as rain or snow. This process is called precipitation. Some of the "
    "water flows into rivers and streams, and some of it soaks into the soil, where it is taken up by the roots of plants. "
    "Eventually, the water returns to the oceans, and the cycle begins again."
)


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@partial(jax.jit, static_argnums=0, static_argnames="scale")
def our_logits(config, frozen, tokens, adapters=(), masks=(), *, scale=1.0):
    """Every row is one record from position 0."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments = jnp.ones_like(positions)
    hidden = forward(config, frozen, adapters, masks, tokens, positions, segments, scale=scale)
    return logits(config, frozen, hidden)


def their_logits(torch, model, tokens) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens), dtype=torch.long)).logits.float().numpy()


def random_model(torch, folder, kind: str, settings: dict):
    """A transformers model whose every array is random (also biases and norms), saved to `folder`."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, array in model.named_parameters():
            if "norm" in name:
                array.uniform_(0.5, 1.5)
            else:
                # Large enough for attention to be sharp, so that positions and windows matter to the logits.
                array.normal_(std=0.3)
    model.save_pretrained(folder)
    return model


def perplexity(folder, text: str) -> float:
    config = read_config(folder)
    tokens = np.asarray(load_tokenizer(folder)(text)["input_ids"], np.int32)
    scores = jax.nn.log_softmax(our_logits(config, load_weights(folder, config), tokens[None])[0, :-1])
    return float(np.exp(-np.mean(np.asarray(scores)[np.arange(len(tokens) - 1), tokens[1:]])))


def shuffled(text: str) -> str:
    words = text.split()
    random.Random(0).shuffle(words)
    return " ".join(words)


@oracle
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(torch, tmp_path, name):
    kind, settings, without = MODELS[name]
    theirs = their_logits(torch, random_model(torch, tmp_path, kind, settings), TOKENS)
    config = read_config(tmp_path)
    frozen = load_weights(tmp_path, config)
    ours = np.asarray(our_logits(config, frozen, TOKENS))
    print(f"{name}: largest difference {abs(ours - theirs).max():.1e}, largest logit {abs(theirs).max():.1f}")
    np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=0)
    if without:
        plain = np.asarray(our_logits(dataclasses.replace(config, **without), frozen, TOKENS))
        assert abs(plain - theirs).max() > 0.1


@oracle
def test_logits_of_stories260k_are_those_of_transformers(torch, shared_folder):
    folder = shared_folder / "models" / "stories260k"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    tokens = np.asarray([load_tokenizer(folder)(STORY)["input_ids"]], np.int32)
    config = read_config(folder)
    ours = np.asarray(our_logits(config, load_weights(folder, config), tokens))
    theirs = their_logits(torch, model, tokens)
    print(f"stories260k: largest difference {abs(ours - theirs).max():.1e}, largest logit {abs(theirs).max():.1f}")
    np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=0)


@oracle
def test_peft_loads_what_we_export(torch, tmp_path):
    peft = pytest.importorskip("peft")
    model = random_model(torch, tmp_path / "base", "Llama", {})
    config = read_config(tmp_path / "base")
    frozen = load_weights(tmp_path / "base", config)
    targets, generator = ("q_proj", "v_proj", "o_proj", "down_proj"), np.random.default_rng(1)
    shapes = lora.adapter_shapes(config, 4, targets)
    adapters, masks = {}, {}
    for name, pair in shapes.items():
        adapters[name] = {m: generator.normal(size=shape, scale=0.3).astype(np.float32) for m, shape in pair.items()}
        masks[name] = {m: generator.random(shape) < 0.5 for m, shape in pair.items()}
    base = their_logits(torch, model, TOKENS)
    for case, mask in (("dense", ()), ("masked", masks)):
        export_adapter(
            tmp_path / case,
            adapters,
            config=config,
            rank=4,
            alpha=6.0,
            targets=targets,
            base_model_name=str(tmp_path / "base"),
            masks=mask,
        )
        adapted = peft.PeftModel.from_pretrained(model, str(tmp_path / case)).eval()
        theirs = their_logits(torch, adapted, TOKENS)
        adapted.unload()
        ours = np.asarray(our_logits(config, frozen, TOKENS, adapters, mask, scale=1.5))
        print(f"PEFT, {case}: largest difference {abs(ours - theirs).max():.1e}")
        np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=0)
        assert abs(theirs - base).max() > 1


@oracle
def test_we_load_what_peft_exports(torch, tmp_path):
    peft = pytest.importorskip("peft")
    model = random_model(torch, tmp_path / "base", "Qwen2", {})
    settings = {"r": 3, "lora_alpha": 7, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", **settings)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    config = read_config(tmp_path / "base")
    adapters, rank, alpha = import_adapter(tmp_path / "adapter", config)
    assert (set(adapters), rank, alpha) == (set(config.projections()), 3, 7.0)
    frozen = load_weights(tmp_path / "base", config)
    ours = np.asarray(our_logits(config, frozen, TOKENS, adapters, scale=alpha / rank))
    np.testing.assert_allclose(ours, their_logits(torch, adapted, TOKENS), atol=1e-3, rtol=0)
    assert abs(ours - np.asarray(our_logits(config, frozen, TOKENS))).max() > 0.1


def test_stories260k_knows_stories(shared_folder):
    folder = shared_folder / "models" / "stories260k"
    assert 1.5 < perplexity(folder, STORY) < 3  # measured: 2.2
    assert perplexity(folder, shuffled(STORY)) > 100  # measured: 4.1


@pytest.fixture(scope="session")
def smollm2_folder():
    pytest.importorskip("gguf")
    try:
        gguf.find_smollm2()
    except ConfigurationError as error:
        pytest.skip(str(error))
    return gguf.smollm2()


@pytest.mark.slow
def test_smollm2_knows_english(smollm2_folder):
    assert perplexity(smollm2_folder, ENGLISH) < 6  # measured: 4.1
    assert perplexity(smollm2_folder, shuffled(ENGLISH)) > 100


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(smollm2_folder):
    config, tokenizer = read_config(smollm2_folder), load_tokenizer(smollm2_folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
    frozen: dict = load_weights(smollm2_folder, config)
    frozen = jax.tree.map(jnp.asarray, frozen)
    stop = tokenizer.eos_token_id
    written = generate(config, frozen, Params((), ()), jnp.asarray([prompt]), new_tokens=16, stop=stop)
    answer = tokenizer.decode(np.asarray(written)[0], skip_special_tokens=True)
    print(answer)
    assert "Paris" in answer
