"""`dataset.json`: the configuration that a dataset was begun with, which all of its writers share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shards.atomic import write_once
from shards.errors import ConfigMismatch, ManifestError, ShardError
from shards.manifest import MANIFEST, check_version, identity_of
from shards.records import differences, short
from shards.schema import FORMAT_VERSION, Kind
from shards.untrusted import parse

DATASET = "dataset.json"


def agree(out: Path, kind: Kind, config: dict[str, Any], *, take_over: Sequence[str] = ()) -> dict[str, Any]:
    """The configuration of the dataset in a folder, which is `config` where the folder is new.

    Args:
        take_over: settings, as `compute.threads`, of which the folder's value is taken whatever `config` has.

    Raises:
        ConfigMismatch: another setting differs (names each).
        ManifestError, VersionError: what the folder holds cannot be used.
        ShardError: it holds a copy that cannot be continued. OSError: it cannot be read or written.
    """
    path = out / DATASET
    if not path.exists():
        copied = (out / MANIFEST).exists() or any(out.glob("*.arrow"))
        if copied and not path.exists():  # else another writer has just begun
            raise ShardError(
                f"{out} holds shards but no {DATASET} (a copy of a finished dataset?), so it cannot be "
                "continued: choose another --out"
            )
        mine = {
            "format_version": FORMAT_VERSION,
            "kind": kind,
            "identity": identity_of(config),
            "config": config,
        }
        if write_once(path, json.dumps(mine, indent=1).encode()):
            return config
    theirs = _read(path)
    agreed: dict[str, Any] = json.loads(json.dumps(config))
    for name in take_over:
        *above, last = name.split(".")
        found, own = _inside(theirs.get("config"), above), _inside(agreed, above)
        if last in found and last in own:
            own[last] = found[last]
    differs = list(differences(theirs.get("config"), agreed))
    if theirs.get("kind") != kind:
        differs.insert(0, f"kind: {short(theirs.get('kind'))} -> {short(kind)}")
    if differs:
        raise ConfigMismatch(
            f"{out} was made with other settings ({'; '.join(differs)}): choose another --out, or repeat the "
            "options it was made with"
        )
    return agreed


def recorded_config(out: Path) -> dict[str, Any] | None:
    """The configuration of the dataset in a folder; None where there is none to go on with.

    Raises: ManifestError, VersionError: it is there but cannot be used.
    """
    path = Path(out) / DATASET
    if not path.is_file():
        return None
    config = _read(path).get("config")
    return config if isinstance(config, dict) else None


def _read(path: Path) -> dict[str, Any]:
    found = parse(path.read_bytes(), str(path))
    check_version(found, str(path))
    if identity_of(found.get("config") or {}) != found.get("identity"):
        raise ManifestError(
            f"{path} was changed: its identity is not that of its config; choose another --out"
        )
    return found


def _inside(config: Any, path: Sequence[str]) -> dict[str, Any]:
    """The dict at a path of keys; an empty one where there is none."""
    for key in path:
        config = config.get(key) if isinstance(config, dict) else None
    return config if isinstance(config, dict) else {}
