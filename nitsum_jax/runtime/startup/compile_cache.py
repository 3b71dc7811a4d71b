"""JAX's persistent compilation cache: on by default, so that only the first start ever compiles."""

import os
from pathlib import Path

from nitsum_jax.errors import InvalidInputError

OFF = "off"


def default_folder() -> Path:
    """The cache folder in use when none is named: under XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nitsum-jax" / "xla"


def enable(folder: str | None) -> Path | None:
    """Makes JAX keep its executables in a folder; call it before anything compiles.

    Args:
      folder: where; None takes JAX_COMPILATION_CACHE_DIR or else `default_folder()`, and "off" keeps nothing.

    Returns:
      The folder in use, None if off.

    Raises:
      InvalidInputError: the folder cannot be made or written.
    """
    import jax  # here, because the flags of the launcher need this module long before anything needs JAX

    if folder == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    path = Path(folder or os.environ.get("JAX_COMPILATION_CACHE_DIR") or default_folder()).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError("not writable")
    except OSError as error:
        reason = error.strerror or error
        raise InvalidInputError(f"--cache_dir={path} cannot be used ({reason}): name another, or {OFF}") from None
    jax.config.update("jax_compilation_cache_dir", str(path))
    # Everything is worth keeping: a start compiles dozens of executables, of which even the small ones add up.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path
