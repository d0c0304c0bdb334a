"""distft's sweeper and launcher, made known to Hydra."""

from __future__ import annotations

import importlib

from hydra.core.plugins import Plugins

from distft.config.sweep_words import PLUGINS


def register() -> None:
    """Let Hydra instantiate what `hydra/sweeper=optuna` and `hydra/launcher=side_by_side` choose.

    Its own scan of `hydra_plugins` misses what an editable installation maps there.
    """
    plugins = Plugins.instance()
    package = importlib.import_module(PLUGINS)
    for name in ("OptunaSweeper", "SideBySide"):
        plugins.register(getattr(package, name))
