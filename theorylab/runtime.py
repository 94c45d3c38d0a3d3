"""Process-wide settings: 64-bit mode, the compilation cache, and the record of what produced a result."""

from __future__ import annotations

import functools
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("numpy", "scipy", "jax", "jaxlib", "equinox", "lineax", "optimistix", "diffrax", "pot", "matplotlib", "sympy")


def enable_x64() -> bool:
    """Switch JAX to 64-bit unless the environment variable `JAX_ENABLE_X64` asks for 32-bit; return the mode that is on."""
    if os.environ.get("JAX_ENABLE_X64", "").strip().lower() not in {"0", "false", "off", "no"}:
        jax.config.update("jax_enable_x64", True)
    return x64()


def x64() -> bool:
    """Whether 64-bit mode is on."""
    return bool(jax.config.read("jax_enable_x64"))


def cache_folder() -> Path:
    """Folder for figure results and downloaded data: `THEORYLAB_CACHE`, else the user's cache folder. It is not created here."""
    explicit = os.environ.get("THEORYLAB_CACHE")
    if explicit:
        return Path(explicit).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "theorylab"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "theorylab"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "theorylab"


def versions() -> dict[str, str]:
    """Versions of Python, theorylab and the libraries below it; packages that are absent are left out."""
    return dict(_versions())


@functools.cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "theorylab": version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def version() -> str:
    """Version of theorylab."""
    from theorylab import __version__

    return __version__


def devices() -> dict[str, Any]:
    """Backend, device kind and number of local devices. Starts the JAX backend."""
    local = jax.local_devices()
    return {"backend": jax.default_backend(), "kind": local[0].device_kind, "count": len(local)}


def provenance(**settings: Any) -> dict[str, Any]:
    """What produced a result: versions, devices, precision and `settings`. Holds no host name and no path."""
    return {"versions": versions(), "devices": devices(), "x64": x64(), "settings": settings}
