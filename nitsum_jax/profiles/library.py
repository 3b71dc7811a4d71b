"""The profiles that come with the package."""

import importlib.resources

from nitsum_jax.control.model.profile import Profile, parse_profile, read_profile
from nitsum_jax.errors import InvalidInputError

_SUFFIX = ".json"
_FOLDER = "nitsum_jax.profiles.packaged"


def profile_names() -> tuple[str, ...]:
    """Names that load_profile knows, in alphabetical order."""
    files = importlib.resources.files(_FOLDER).iterdir()
    return tuple(sorted(file.name.removesuffix(_SUFFIX) for file in files if file.name.endswith(_SUFFIX)))


def load_profile(name: str) -> Profile:
    """Reads a profile by name, or from a file if the name ends in `.json`.

    Raises:
      InvalidInputError: there is no such profile or file, or it is not sound.
    """
    if name.endswith(_SUFFIX):
        return read_profile(name)
    if name not in profile_names():
        known = ", ".join(profile_names())
        raise InvalidInputError(f"no profile is called {name!r}: use {known}, or the path of a .json file")
    file = importlib.resources.files(_FOLDER).joinpath(name + _SUFFIX)
    return parse_profile(file.read_text(encoding="utf-8"), name + _SUFFIX)
