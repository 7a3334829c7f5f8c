"""Change manifests on disk as their writers would have written them, seal and all."""

from __future__ import annotations

import hashlib
import json


def change_manifest(directory, **changes):
    """Set fields of `directory/manifest.json`."""
    file = directory / "manifest.json"
    fields = json.loads(file.read_text()) | changes
    fields.pop("seal", None)
    seal = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(fields | {"seal": seal}, indent=2) + "\n")
