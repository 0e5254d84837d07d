"""Encoders to and from other libraries' files: safetensors, timm, Hugging Face, the published programs."""

from stopfast.export.importing import import_encoder
from stopfast.export.run import Format, export_run
from stopfast.export.safetensors import load_encoder

__all__ = ["Format", "export_run", "import_encoder", "load_encoder"]
