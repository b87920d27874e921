"""FedGen: the server learns to generate features for each label, and clients practise their last layer on them.

Source: Zhu, Hong and Zhou 2021, "Data-Free Knowledge Distillation for Heterogeneous Federated Learning" (ICML), algorithm 1.
A generator G makes features z of a label y and noise ε. The server trains it so that the clients' last layers, their logits
averaged, recognise the label (equation 4); a client adds to its loss the cross-entropy of its own last layer on generated
features, labels drawn from p̂(y), the label counts of the last round's clients (equation 5). Clients upload their counts.

As in the published code: G has one hidden layer of ReLUs on (ε, one-hot y) and a linear output; its loss also has a diversity
term, exp(−mean over pairs of ‖ε_i − ε_j‖²·|z_i − z_j|, each a mean over entries), against equal features for all noise; it
keeps its Adam state over the rounds; clients use generated features from the second round on.

Deviations: features are always what the model's last layer sees. No batch norm in G. Equation 5's weight is constant. G's
first weights are the same in all runs. The published code itself differs from the paper: its noise is uniform in [0, 1] (ours
is normal, as in the paper, so distances in the diversity term are larger); its labels are uniform in place of p̂(y); G learns
from each client's own cross-entropy, weighted by the client's label counts, instead of from equation 4's mean logits;
equation 5's weight starts at 10 and decays, and so does G's learning rate; and clients further distil from their ensemble.
"""

from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree
from pydantic import Field

from fedjax_qp.algorithms import algorithms
from fedjax_qp.algorithms.local import (
    LocalState,
    Upload,
    Weighting,
    add,
    local_training,
    mean_update,
    parts_of,
    report,
)
from fedjax_qp.federated import Algorithm, Batch, Client, Cohort, Model, Params
from fedjax_qp.models.classifier import mean_cross_entropy

Count = Annotated[int, Field(ge=1, le=10**6)]


class Layer(NamedTuple):
    kernel: Float[Array, "inputs outputs"]
    bias: Float[Array, "outputs"]


class Generator(NamedTuple):
    hidden: Layer
    output: Layer


class Shared(NamedTuple):
    params: Params
    generator: Generator
    shares: Float[Array, "C"]  # p̂(y)
    rounds: Int[Array, ""]  # finished ones


class FedgenServer(NamedTuple):
    shared: Shared
    optimizer_state: PyTree  # the generator's


class FedgenState(NamedTuple):
    """A client in training."""

    local: LocalState
    counts: Float[Array, "C"]


class FedgenUpload(NamedTuple):
    average: Upload
    counts: Float[Array, "C"]


def first_generator(noise: int, classes: int, hidden: int, width: int) -> Generator:
    """PyTorch's initial weights for dense layers: U(±1/√inputs)."""

    def layer(key: Key[Array, ""], inputs: int, outputs: int) -> Layer:
        keys, bound = jax.random.split(key), inputs**-0.5
        shapes = ((inputs, outputs), (outputs,))
        return Layer(
            *(jax.random.uniform(k, s, minval=-bound, maxval=bound) for k, s in zip(keys, shapes, strict=True))
        )

    keys = jax.random.split(jax.random.key(0))
    return Generator(layer(keys[0], noise + classes, hidden), layer(keys[1], hidden, width))


def draw_inputs(
    key: Key[Array, ""], shares: Float[Array, "C"], count: int, noise: int
) -> tuple[Int[Array, "B"], Float[Array, "B Z"]]:
    """Labels by their shares, and normal noise."""
    of_labels, of_noise = jax.random.split(key)
    labels = jax.random.categorical(of_labels, jnp.log(shares), shape=(count,))
    return labels, jax.random.normal(of_noise, (count, noise))


def generate(
    generator: Generator, labels: Int[Array, "B"], noise: Float[Array, "B Z"], classes: int
) -> Float[Array, "B F"]:
    """Features of these labels."""
    inputs = jnp.concatenate([noise, jax.nn.one_hot(labels, classes)], axis=1)
    hidden = jax.nn.relu(inputs @ generator.hidden.kernel + generator.hidden.bias)
    return hidden @ generator.output.kernel + generator.output.bias


def diversity_loss(noise: Float[Array, "B Z"], features: Float[Array, "B F"]) -> Float[Array, ""]:
    """1 where all features are the same, towards 0 the more they differ where the noise does."""
    noises = ((noise[:, None] - noise) ** 2).mean(-1)
    return jnp.exp(-(noises * jnp.abs(features[:, None] - features).mean(-1)).mean())


def label_loss(logits: Float[Array, "B C"], labels: Int[Array, "B"]) -> Float[Array, ""]:
    """Mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@algorithms.register
def fedgen(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    distillation: Annotated[float, Field(ge=0)] = 1.0,
    diversity: Annotated[float, Field(ge=0)] = 1.0,
    generator_learning_rate: Annotated[float, Field(gt=0)] = 3e-4,
    generator_steps: Annotated[int, Field(ge=0, le=10**6)] = 50,
    generated: Count = 32,
    noise: Count = 32,
    hidden: Count = 256,
    weighting: Weighting = "uniform",
) -> Algorithm:
    """A generator on the server, made from the clients' classifiers, teaches them features of all classes (FedGen).

    Args:
      distillation: weight of the loss on generated features in a client's; 0 is FedAvg.
      diversity: weight of the diversity term in the generator's loss.
      generator_learning_rate: of Adam.
      generator_steps: in a round.
      generated: features in a batch, the client's and the generator's.
      noise: size of ε.
      hidden: units of the generator.
    """
    training = local_training(model, optimizer)
    generator_optimizer = optax.adam(generator_learning_rate)

    def init_server(params: Params, clients: int) -> FedgenServer:
        parts = parts_of(model, "fedgen")
        generator = first_generator(noise, parts.classes, hidden, parts.width)
        shares = jnp.full(parts.classes, 1 / parts.classes, jnp.float32)
        return FedgenServer(
            Shared(params, generator, shares, jnp.zeros((), jnp.int32)), generator_optimizer.init(generator)
        )

    def dispatch(server: FedgenServer, cohort: Cohort, key: Any) -> tuple[Shared, tuple, dict]:
        return server.shared, (), {}

    def start(shared: Shared, own: tuple, memory: tuple, key: Any) -> FedgenState:
        return FedgenState(training.start(shared.params), jnp.zeros_like(shared.shares))

    def step(frozen: PyTree, shared: Shared, carry: FedgenState, batch: Batch, key: Any) -> FedgenState:
        parts = parts_of(model, "fedgen")
        weight = jnp.where(shared.rounds > 0, distillation, 0.0)
        labels, noises = draw_inputs(key, shared.shares, generated, noise)
        made = generate(shared.generator, labels, noises, parts.classes)

        def loss(frozen: PyTree, params: Params, batch: Batch, key: Any) -> tuple[Float[Array, ""], PyTree]:
            features, statistics = parts.features(params, batch, train=True)
            supervised = mean_cross_entropy(parts.classify(params, features), batch)
            return supervised + weight * label_loss(parts.classify(params, made), labels), statistics

        local = local_training(model._replace(loss=loss), optimizer).step(frozen, carry.local, batch, key)
        return FedgenState(local, carry.counts + batch.mask @ jax.nn.one_hot(batch.examples.labels, parts.classes))

    def finish(shared: Shared, carry: FedgenState, client: Client) -> tuple:
        average, metrics = report(carry.local, shared.params.trainable, shared.params, client, weighting)
        return FedgenUpload(average, carry.counts), (), metrics

    def generator_loss(
        generator: Generator,
        models: Params,
        reported: Float[Array, "M"],
        shares: Float[Array, "C"],
        key: Key[Array, ""],
    ) -> Float[Array, ""]:
        parts = parts_of(model, "fedgen")
        labels, noises = draw_inputs(key, shares, generated, noise)
        features = generate(generator, labels, noises, parts.classes)
        logits = jax.vmap(parts.classify, (0, None))(models, features)
        mean = jnp.tensordot(reported / jnp.maximum(reported.sum(), 1), logits, axes=1)
        return label_loss(mean, labels) + diversity * diversity_loss(noises, features)

    def combine_each(
        server: FedgenServer, uploads: FedgenUpload, cohort: Cohort, key: Key[Array, ""]
    ) -> tuple[FedgenServer, dict[str, Array]]:
        shared, reported = server.shared, uploads.average.reporters
        mean, metrics = mean_update(jax.tree.map(lambda leaf: leaf.sum(0), uploads.average))
        weights = jnp.where(reported > 0, uploads.average.weight, 1)
        models = jax.vmap(lambda weight, update: jax.tree.map(lambda w, u: w + u / weight, shared.params, update))(
            weights, uploads.average.update
        )
        counts = uploads.counts.sum(0)
        shares = counts / jnp.maximum(counts.sum(), 1)

        def improve(carry: tuple, key: Key[Array, ""]) -> tuple[tuple, Float[Array, ""]]:
            generator, state = carry
            value, gradient = jax.value_and_grad(generator_loss)(generator, models, reported, shares, key)
            updates, state = generator_optimizer.update(gradient, state, generator)
            return (optax.apply_updates(generator, updates), state), value

        begun = (shared.generator, server.optimizer_state)
        (generator, state), losses = jax.lax.scan(improve, begun, jax.random.split(key, generator_steps))
        metrics |= {"generator/loss": losses.mean() if generator_steps > 0 else jnp.zeros(())}
        params = add(shared.params, mean)
        return FedgenServer(Shared(params, generator, shares, shared.rounds + 1), state), metrics

    return Algorithm(
        init_server=init_server,
        dispatch=dispatch,
        start=start,
        step=step,
        finish=finish,
        combine_each=combine_each,
        serve=lambda server, memory: server.shared.params,
    )
