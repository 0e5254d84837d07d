"""Settings as what JSON can hold, and back."""

from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_type_hints

from stopfast.config.checks import require

T = TypeVar("T")


def to_document(config: object) -> dict[str, Any]:
    """Return settings as what JSON can hold."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, tuple):
            return [plain(inner) for inner in value]
        return str(value) if isinstance(value, Path) else value

    return {key: plain(value) for key, value in asdict(config).items()}  # type: ignore[call-overload]


def from_document(cls: type[T], document: dict[str, Any]) -> T:
    """Undo :func:`to_document` for the settings class ``cls``.

    Raises:
        ValueError: a setting that this version does not know, or a value that it refuses.
    """
    hints = get_type_hints(cls)
    unknown = document.keys() - hints.keys()
    require(not unknown, f"expected settings of {cls.__name__}, got also {sorted(unknown)}")
    values = {}
    for entry in fields(cls):  # type: ignore[arg-type]
        if entry.name not in document:
            continue
        value, hint = document[entry.name], hints[entry.name]
        if isinstance(hint, UnionType) and is_dataclass(get_args(hint)[0]):
            hint = _member(get_args(hint), value)
        if is_dataclass(hint):
            value = from_document(hint, value)  # type: ignore[arg-type]
        elif isinstance(value, list):
            value = tuple(value)
        elif value is not None and hint == Path | None:
            value = Path(value)
        values[entry.name] = value
    return cls(**values)


def _member(classes: tuple[type, ...], document: dict[str, Any]) -> type:
    """The class among several that the document names."""
    by_name = {each().name: each for each in classes}
    name = document.get("name")
    require(name in by_name, f"expected a name of {sorted(by_name)}, got {name!r}")
    return by_name[name]
