"""Saving to and loading from the Hugging Face hub, strictly."""

from pathlib import Path
from typing import Any, Self

from huggingface_hub import PyTorchModelHubMixin


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

    def _remember(self, **settings: Any) -> None:  # noqa: ANN401
        """Put settings into the saved ones: what changed, or what JSON cannot hold as it was passed."""
        if isinstance(self._hub_mixin_config, dict):
            self._hub_mixin_config.update(settings)

    def _save_pretrained(self, save_directory: Path) -> None:
        config = self._hub_mixin_config
        if isinstance(config, dict) and config.get("norm_layer") is None:
            raise ValueError("expected a LayerNorm as norm_layer, the one norm that can be saved")
        super()._save_pretrained(save_directory)
