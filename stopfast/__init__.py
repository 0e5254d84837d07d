"""stopfast: exact, fast pre-training of vision transformers by location-aware masked image modelling.

The public names are loaded on first use, so that importing one kernel does not import the library.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stopfast.acceleration import accelerate
    from stopfast.encoder import VisionTransformer
    from stopfast.export import export_run, import_encoder, load_encoder
    from stopfast.masking import MaskCollator, MultiBlockMasks
    from stopfast.predictor import Predictor
    from stopfast.published import load_published
    from stopfast.published_objectives import load_published_objective

__version__ = "0.1.0"
__all__ = [
    "MaskCollator",
    "MultiBlockMasks",
    "Predictor",
    "VisionTransformer",
    "accelerate",
    "export_run",
    "import_encoder",
    "load_encoder",
    "load_published",
    "load_published_objective",
]

_HOME = {
    "MaskCollator": "stopfast.masking",
    "MultiBlockMasks": "stopfast.masking",
    "Predictor": "stopfast.predictor",
    "VisionTransformer": "stopfast.encoder",
    "accelerate": "stopfast.acceleration",
    "export_run": "stopfast.export",
    "import_encoder": "stopfast.export",
    "load_encoder": "stopfast.export",
    "load_published": "stopfast.published",
    "load_published_objective": "stopfast.published_objectives",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'stopfast' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
