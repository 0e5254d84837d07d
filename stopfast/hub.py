"""Saving to and loading from the Hugging Face hub, strictly."""

from typing import Any, Self

from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from stopfast.block import norm_config


class HubMixin(
    PyTorchModelHubMixin,
    library_name="stopfast",
    license="apache-2.0",
    tags=["self-supervised-learning", "i-jepa", "stop"],
):
    """``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` of a model and its settings.

    Loads are strict: the hub's own default leaves missing weights random without a word.
    """

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **kwargs: Any) -> Self:  # noqa: ANN401
        return super()._from_pretrained(strict=strict, **kwargs)  # type: ignore[misc]

    def _remember_norm(self, norm: nn.Module) -> None:
        """Put a norm's keywords into the saved settings, which cannot hold its factory."""
        if isinstance(self._hub_mixin_config, dict):
            self._hub_mixin_config["norm_layer"] = norm_config(norm)
