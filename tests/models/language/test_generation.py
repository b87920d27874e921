"""Cached decoding against running the whole text again for every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.llama import changed, run, some_adapters, some_masks

from fedjax_qp.federated import Params
from fedjax_qp.models.language.generation import generate
from fedjax_qp.models.language.llama import empty_cache, forward_cached, initial_weights, logits
from fedjax_qp.registry import ConfigurationError

CONFIGS = {"plain": changed(tied=False), "window": changed(tied=False, sliding_window=3)}
PROMPT = np.array([5, 9, 33, 2, 17])


def weights(config):
    return initial_weights(config, jax.random.key(4))


def whole_text(config, frozen, params, prompt, number, scale=1.0):
    """The likeliest continuation, everything computed anew for each token."""
    text = list(prompt)
    for _ in range(number):
        rows = np.zeros((3, 1, 12), np.int32)  # of one length, so that it is compiled once
        rows[:, 0, : len(text)] = [text, range(len(text)), [1] * len(text)]
        hidden = run(config, frozen, params.trainable, params.masks, *rows, scale=scale)
        text.append(int(logits(config, frozen, hidden[0, len(text) - 1]).argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_cached_hidden_states_are_those_of_the_whole_text(config):
    frozen = weights(config)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 8)))
    positions, ones = jnp.broadcast_to(jnp.arange(8), (2, 8)), jnp.ones((2, 8), int)
    expected = run(config, frozen, (), (), tokens, positions, ones)
    cache, found = empty_cache(config, 2, 10, jnp.float32), []
    for begin, end in ((0, 4), (4, 5), (5, 8)):
        part = slice(begin, end)
        hidden, cache = forward_cached(
            config, frozen, (), (), tokens[:, part], positions[:, part], ones[:, part], cache, begin
        )
        found.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), expected, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_greedy_text_is_that_of_the_whole_model(config):
    frozen, adapters = weights(config), some_adapters()
    params = Params(adapters, (), some_masks(adapters))
    found = generate(config, frozen, params, PROMPT[None], new_tokens=6, stop=None, scale=1.5)
    assert found[0].tolist() == whole_text(config, frozen, params, PROMPT, 6, scale=1.5)
    assert found[0].tolist() != whole_text(config, frozen, Params((), ()), PROMPT, 6)


def test_a_padded_batch_writes_what_each_prompt_writes_alone():
    config = CONFIGS["window"]
    frozen, none = weights(config), Params((), ())
    prompts = [PROMPT, PROMPT[:2], PROMPT[1:4]]
    padded = np.full((3, 5), 60)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    found = generate(config, frozen, none, padded, new_tokens=5, stop=None, lengths=np.array([5, 2, 3]))
    assert found.tolist() == [whole_text(config, frozen, none, prompt, 5) for prompt in prompts]


def test_it_stops():
    config = CONFIGS["plain"]
    frozen, none = weights(config), Params((), ())
    text = whole_text(config, frozen, none, PROMPT, 6)
    other = whole_text(config, frozen, none, PROMPT[::-1], 6)
    end = next(token for token in text[1:5] if token not in other)
    length = text.index(end) + 1
    found = generate(config, frozen, none, PROMPT[None], new_tokens=6, stop=end)
    assert found[0].tolist() == text[:length] + [end] * (6 - length)
    # One text of a batch goes on after the other has stopped; several tokens can stop.
    both = generate(config, frozen, none, np.stack([PROMPT, PROMPT[::-1]]), new_tokens=6, stop=[end, 64])
    assert both.tolist() == [found[0].tolist(), other]


def test_temperature_draws_from_the_softmax():
    config = CONFIGS["plain"]
    frozen, none = weights(config), Params((), ())
    prompts = np.repeat(PROMPT[None], 4000, axis=0)
    found = np.asarray(
        generate(config, frozen, none, prompts, new_tokens=1, stop=None, temperature=0.7, key=jax.random.key(0))
    )
    tokens, positions = PROMPT[None], np.arange(5)[None]
    scores = logits(config, frozen, run(config, frozen, (), (), tokens, positions, np.ones_like(tokens)))[0, -1]
    shares = np.bincount(found[:, 0], minlength=64) / 4000
    expected = np.asarray(jax.nn.softmax(scores / 0.7))
    # Total variation of 4000 draws from 64 outcomes: at most ½ · √(64 / 4000) ≈ 0.063 in the mean.
    assert np.abs(shares - expected).sum() / 2 < 0.08
    assert expected.max() < 0.9
    cold = generate(
        config, frozen, none, PROMPT[None], new_tokens=4, stop=None, temperature=1e-4, key=jax.random.key(1)
    )
    assert cold[0].tolist() == whole_text(config, frozen, none, PROMPT, 4)


def test_wrong_settings_are_refused():
    config = CONFIGS["plain"]
    frozen = weights(config)
    for options, message in (
        ({"new_tokens": 0}, "new_tokens = 0"),
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"temperature": 1.0}, "needs a key"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"lengths": [0]}, "must have 1 to 5"),
        ({"lengths": [6]}, "must have 1 to 5"),
        ({"new_tokens": 2**16}, "at most 65536 are supported"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            generate(config, frozen, Params((), ()), PROMPT[None], **{"new_tokens": 2, "stop": None, **options})
    with pytest.raises(ConfigurationError, match="prompt is empty"):
        generate(config, frozen, Params((), ()), np.zeros((1, 0), int), new_tokens=2, stop=None)
    for wrong in (64, -1, 2**32 + 1):
        tokens = np.array([[1, wrong, 3]])
        with pytest.raises(ConfigurationError, match=r"must be 0 to 63, the rows of the embedding"):
            generate(config, frozen, Params((), ()), tokens, new_tokens=2, stop=None)
