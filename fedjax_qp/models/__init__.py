"""Models: a registered function takes the facts about the data and the options, and returns what builds the network.

    build = models.build("lenet", (32, 32, 3), 10, normalisation="none")     # (nnx.Rngs) -> network
    model = classifier(build, mean=0.5, std=0.5, classes=10)                 # the `Model` that algorithms train

A language model is one function of its options that returns an `AdaptedModel`: base, adapters and tokenizer.

A network is called as `network(inputs [B, H, W, C], mask [B], train=bool)` and returns logits [B, classes], which its layer
`last` makes of its `features`.
One of `character_models` takes inputs [B, T], and may return logits of every position in training, [B, T, classes].
"""

from fedjax_qp.models import cnn, lenet, mlp, recurrent, resnet, vgg  # noqa: F401  (they register themselves)
from fedjax_qp.models.classifier import classifier
from fedjax_qp.models.language import adapted  # noqa: F401
from fedjax_qp.models.registry import character_models, language_models, models

__all__ = ["character_models", "classifier", "language_models", "models"]
