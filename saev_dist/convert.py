"""`saev-dist convert`: an SAE of any known format as one safetensors file. `sae.plain` says what is in it."""

import json
import os

from saev_dist.config import Convert
from saev_dist.errors import ConfigError
from saev_dist.files import writing
from saev_dist.output import table
from saev_dist.sae import plain
from saev_dist.sae.load import Overrides, file_names, load_sae


def run(cfg: Convert) -> None:
    """Read and write.

    Raises:
        SaevDistError: the source cannot be read, or the target is there already, is a directory or cannot be written.
    """
    if os.path.isdir(cfg.target):
        raise ConfigError(f"{cfg.target} is a directory; name a file in it, such as {cfg.target / 'converted.safetensors'}.")
    if os.path.lexists(cfg.target) and not os.path.isfile(cfg.target):
        raise ConfigError(f"{cfg.target} is there and no regular file; choose another name.")
    if os.path.lexists(cfg.target) and not cfg.force:
        raise ConfigError(f"{cfg.target} is there already; choose another name, or replace it with --force.")
    if os.path.exists(cfg.source) and os.path.exists(cfg.target) and os.path.samefile(cfg.source, cfg.target):
        raise ConfigError(
            f"{cfg.target} is the SAE itself, and what was made with it would not know it again; choose another name."
        )
    if (
        cfg.target.name in file_names()
        and os.path.isdir(cfg.source)
        and os.path.isdir(cfg.target.parent)
        and os.path.samefile(cfg.source, cfg.target.parent)
    ):
        raise ConfigError(
            f"{cfg.target} would be one of the SAE's own files, and its directory no longer what it was; choose another name, "
            "such as converted.safetensors."
        )
    loaded = load_sae(cfg.source, Overrides.of(cfg))
    with writing(cfg.target):
        plain.save(cfg.target, loaded.sae)
    rules = ", ".join(f"{name} {json.dumps(value)}" for name, value in loaded.sae.rules().items())
    print(table({"SAE": loaded.sae.source, "rules": rules, "written": str(cfg.target)}))
