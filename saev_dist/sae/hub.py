"""SAEs on the Hugging Face Hub: `hf://owner/repo[/path][@revision]`, through huggingface_hub and its cache."""

import re
from collections.abc import Collection
from pathlib import Path

from saev_dist.errors import ConfigError

SCHEME = "hf:"
PATTERN = re.compile(r"hf:/(?P<repo>[\w.-]+/[\w.-]+)(?P<path>(?:/[\w.-]+)*)(?:@(?P<revision>[\w./-]+))?")


def is_hub_name(name: Path) -> bool:
    """Whether `--sae` names a repository. (A Path makes one slash of the two.)"""
    return name.parts[:1] == (SCHEME,)


def fetch(name: Path, file_names: Collection[str]) -> Path:
    """Download what the cache lacks; return the file or directory there.

    Args:
        name: what `is_hub_name` accepts.
        file_names: files of a directory that may be part of an SAE; of the rest of a repository nothing is downloaded.

    Raises:
        ConfigError: the name is malformed, huggingface_hub is not installed, or the Hub cannot be reached.
    """
    match = PATTERN.fullmatch(name.as_posix())
    if match is None or ".." in name.parts:
        raise ConfigError(f"{name}: expected hf://owner/repo, and if need be /path and @revision.")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise ConfigError(f"{name} needs huggingface_hub: pip install 'saev-dist[hub]', or give a local path.") from None
    inner = match["path"].strip("/")
    wanted = [inner, *(f"{inner}/{file}" for file in file_names)] if inner else list(file_names)
    try:
        root = snapshot_download(match["repo"], revision=match["revision"], allow_patterns=wanted)
    except (LocalEntryNotFoundError, OSError, HfHubHTTPError, HFValidationError) as err:
        first = (str(err).splitlines() or [type(err).__name__])[0]
        raise ConfigError(
            f"{name} is not in the cache and cannot be downloaded ({first[:200]}). "
            "Download it where there is a network, or give a local path."
        ) from None
    path = Path(root) / inner
    if not path.exists():
        raise ConfigError(f"{name}: the repository holds no {inner} at this revision, or the cache has not got it.")
    return path
