"""SAEs on the Hugging Face Hub: `hf://owner/repo[/path][@revision]`, through huggingface_hub and its cache."""

import re
from collections.abc import Collection
from pathlib import Path

from saev_dist.errors import ConfigError

SCHEME = "hf:"
PATTERN = re.compile(r"hf:/(?P<repo>[\w.-]+/[\w.-]+)(?P<path>(?:/[^/@*?[\]]+)*)(?:@(?P<revision>[\w./-]+))?")


def is_hub_name(name: Path) -> bool:
    """Whether `--sae` names a repository. (A Path makes one slash of the two.)"""
    return name.parts[:1] == (SCHEME,)


def refuse_link(name: Path) -> None:
    """Raise ConfigError where a link to a page stands for a path."""
    if name.parts[:1] in (("https:",), ("http:",)):
        link = name.as_posix().replace(":/", "://", 1)
        raise ConfigError(f"{link} is no path; an SAE on the Hub is hf://owner/repo, and if need be /path and @revision.")


def absolute(path: Path) -> Path:
    """A path that means the same from elsewhere; a repository's name does already."""
    return path if is_hub_name(path) else path.absolute()


def fetch(name: Path, file_names: Collection[str]) -> Path:
    """Download what the cache lacks; return the file or directory there.

    Args:
        name: what `is_hub_name` accepts.
        file_names: files of a directory that may be part of an SAE; of the rest of a repository nothing is downloaded.

    Raises:
        ConfigError: the name is malformed, huggingface_hub is not installed, or the Hub cannot be reached.
    """
    match, shown = PATTERN.fullmatch(name.as_posix()), name.as_posix().replace("hf:/", "hf://", 1)
    if match is None or ".." in name.parts:
        raise ConfigError(f"{shown}: expected hf://owner/repo, and if need be /path and @revision.")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(f"{shown} needs huggingface_hub: pip install huggingface_hub, or give a local path.") from None
    inner = match["path"].strip("/")
    wanted = [inner, *(f"{inner}/{file}" for file in file_names)] if inner else list(file_names)
    try:
        root = snapshot_download(match["repo"], revision=match["revision"], allow_patterns=wanted)
    except Exception as err:  # noqa: BLE001  errors of the HTTP library beneath come through, and that is another in each version
        first = (str(err).splitlines() or [type(err).__name__])[0]
        raise ConfigError(
            f"{shown} is not in the cache and cannot be downloaded ({first[:200]}). "
            "Download it where there is a network, or give a local path."
        ) from None
    path = Path(root) / inner
    if not path.exists():
        raise ConfigError(f"{shown}: the repository holds no {inner} at this revision, or the cache has not got it.")
    return path
