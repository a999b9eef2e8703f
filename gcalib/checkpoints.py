"""Files of runs under way: written whole or not at all, and set aside if they cannot be used."""

from __future__ import annotations

import logging
import os
import secrets
import zipfile
from pathlib import Path
from typing import Any

import torch

from gcalib.config import RunConfig

log = logging.getLogger("gcalib")


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint under another name and rename it, so that a reader finds the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}")
    try:
        torch.save(content, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError for a full disk
        log.warning("%s could not be written (%s): the run goes on without it.", path, error)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path, names: set[str]) -> dict[str, Any] | None:
    """A checkpoint that holds these names; None without one. A damaged one, or of another version, is set aside."""
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself does not look at the checksums that it writes
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} has another checksum than when it was written")
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if content.keys() != names:
            raise ValueError("it is of another version of gcalib")
        return {**content, "config": RunConfig(**content["config"])}
    except Exception as error:  # noqa: BLE001 - a damaged file can fail in any way
        aside = path.with_suffix(".damaged")
        os.replace(path, aside)
        log.warning("The checkpoint could not be read and is now %s; the run starts anew (%s).", aside, error)
        return None
