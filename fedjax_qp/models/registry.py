"""The registry of models, apart from the models themselves so that they can import it."""

from fedjax_qp.registry import ConfigurationError, Registry

models = Registry("model", declares_examples=True)
"""Models, by name; each declares the kinds of examples that it takes."""


def require_size(model: str, input_shape: tuple[int, ...], smallest: int, remedy: str) -> None:
    """Checks that inputs are images, and large enough for a model.

    Args:
      input_shape: height, width, channels.
      smallest: least height and width.
      remedy: what to do otherwise.

    Raises:
      ConfigurationError: the inputs are no images, or too small.
    """
    if len(input_shape) != 3:
        raise ConfigurationError(
            f"model {model!r} takes images of the shape (height, width, channels), but an input here has the shape "
            f"{input_shape}; use the model 'mlp', which takes any shape, or give images."
        )
    if min(input_shape[:2]) < smallest:
        raise ConfigurationError(
            f"model {model!r} needs images of at least {smallest}×{smallest}, but these are "
            f"{input_shape[0]}×{input_shape[1]}; {remedy}."
        )
