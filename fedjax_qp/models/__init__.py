"""Models: a registered function takes the facts about the data and the options, and returns what builds the network.

    build = models.build("lenet", (32, 32, 3), 10, normalisation="none")     # (nnx.Rngs) -> network
    model = classifier(build, mean=0.5, std=0.5, classes=10)                 # the `Model` that algorithms train

A language model is one function of its options that returns an `AdaptedModel`: base, adapters and tokenizer.

A network is called as `network(inputs [B, H, W, C], mask [B], train=bool)` and returns logits [B, classes], which its layer
`last` makes of its `features`.
One of windows of characters takes inputs [B, T], and may return logits of every position in training, [B, T, classes].

A model declares the kinds of examples that it takes: `@models.register("images", "rows")`. Every file of this folder is
imported: to add a model, write one that registers it.
"""

from fedjax_qp.models.classifier import classifier
from fedjax_qp.models.registry import models
from fedjax_qp.registry import import_modules

__all__ = ["classifier", "models"]

import_modules(__name__, __path__)
