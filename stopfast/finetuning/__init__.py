"""End-to-end classification from a pre-trained encoder, by the published recipes and timm's parts."""

from stopfast.finetuning.recipes import RECIPES, finetune_settings
from stopfast.finetuning.run import finetune
from stopfast.finetuning.settings import FinetuneSettings, Recipe, RecipeName

__all__ = [
    "RECIPES",
    "FinetuneSettings",
    "Recipe",
    "RecipeName",
    "finetune",
    "finetune_settings",
]
