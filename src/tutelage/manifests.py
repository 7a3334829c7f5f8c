"""How a directory says what it is: reading its `manifest.json`, with one clear line for everything wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from tutelage.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path


class ManifestRecord(BaseModel):
    """Base of what manifests hold: unknown fields are refused, values cannot be changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ManifestHead(BaseModel):
    """What any version of a manifest has; a subclass adds the fields that tell its kind from others."""

    schema_version: int


Record = TypeVar("Record", bound=ManifestRecord)


def read_manifest_file(
    directory: Path, kind: type[Record], head: type[ManifestHead], version: int, what: str, remedy: str
) -> Record:
    """Read and check `directory/manifest.json`.

    Args:
        directory: where it lies.
        kind: what it must hold.
        head: what every version of it holds.
        version: the schema version that this package reads.
        what: the directory's kind, in words: "token store".
        remedy: the command that makes one.

    Raises:
        UserError: it is missing, is no such manifest, or has another schema version.
    """
    path = directory / "manifest.json"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        missing = "has no manifest.json" if directory.is_dir() else "no such directory"
        raise UserError(f"{directory}: not a {what} ({missing}); `{remedy}` makes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    try:
        found = head.model_validate_json(text).schema_version
        if found != version:
            raise UserError(
                f"{directory}: {what} of schema version {found}, this version reads {version}; "
                f"build it again with `{remedy}`"
            )
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path}: not the manifest of a {what} ({field}: {first['msg']})") from None
