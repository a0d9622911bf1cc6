"""Whose paths they are: a run's stored local paths are followed only where the run is the user's own.

`adapter.json` names folders: data, backbone, other adapters. In an adapter that came from somebody else they would
have `iapt-eval` read whatever the sender chose. So a run seals its paths with a key that lies in the user's cache
folder; what is not sealed with it is shown and has to be given again by whoever runs the command.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from pathlib import Path

from iapt.config.schema import Config


def key_file() -> Path:
    """Where the user's key lies: `iapt/key` in `$XDG_CACHE_HOME`, by default `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "iapt" / "key"


def paths_of(config: Config) -> dict[str, str]:
    """The settings of `config` that name a folder, or what may be one, and what they name."""
    named = {
        "data_dir": config.data_dir,
        "backbone.path": config.backbone.path,
        "task.source.path": config.task.source.path,
        **{f"method.{key}": path for key, path in config.method.adapters().items()},
    }
    return {key: path for key, path in named.items() if path}


def is_local(key: str, path: str) -> bool:
    """Whether a setting of `paths_of` names something on this machine, and not on the hub."""
    may_be_hub_id = key in ("backbone.path", "task.source.path")
    return not may_be_hub_id or path.startswith(("/", "~", ".")) or Path(path).exists()


def seal(paths: dict[str, str]) -> str | None:
    """Return what shows this user that `paths` are from a run of theirs; None where no key can be kept."""
    key = _key()
    content = json.dumps(paths, sort_keys=True).encode()
    return None if key is None else hmac.new(key, content, hashlib.sha256).hexdigest()


def is_own(paths: dict[str, str], sealed: object) -> bool:
    """Whether `sealed` is this user's seal of `paths`."""
    expected = seal(paths)
    return expected is not None and isinstance(sealed, str) and hmac.compare_digest(expected.encode(), sealed.encode())


def _key() -> bytes | None:
    file = key_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        whole = file.with_name(f"key.{os.getpid()}")
        if not file.exists():
            with os.fdopen(os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as new:
                new.write(secrets.token_bytes(32))
            try:
                os.link(whole, file)  # of several processes the first one's stays
            except FileExistsError:
                pass
            finally:
                whole.unlink()
        return file.read_bytes() or None
    except OSError:
        return None
