"""Files named by a path or a URL; files at URLs are downloaded once per machine."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch

from util.distributed import barrier, is_first_of_node, is_main_process
from util.errors import InputError
from util.files import download

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def local_path(source: str) -> Path:
    """Return the path of a file; a file at a URL is downloaded to torch.hub's folder unless it is already there.

    Raises:
        InputError: if a URL is not https, file or of this machine, or if the download fails.
    """
    url = urlsplit(source)
    if "://" not in source:
        return Path(source)
    if url.scheme == "file":
        return Path(url2pathname(url.path))
    if url.scheme != "https" and not (url.scheme == "http" and url.hostname in LOOPBACK):
        raise InputError(f"{source}: not loaded over {url.scheme}; use https or a file")
    key = hashlib.sha256(source.encode()).hexdigest()[:8]  # many checkpoints are named checkpoint.pth
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{key}-{Path(url.path).name}"
    if is_first_of_node() and not path.exists():
        try:
            download(source, path, sha256_of(path.stem), progress=is_main_process())
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"{source}: could not be downloaded ({error}); place the file at {path} or name another by its path"
            ) from error
    barrier()
    return path


def sha256_of(stem: str) -> str | None:
    """Return the first digits of a file's SHA-256 if its name ends with them, as in torch.hub, else None."""
    digits = re.search(r"-([0-9a-f]{8})$", stem)
    return digits[1] if digits else None
