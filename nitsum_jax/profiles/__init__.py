"""Step-time profiles: those that come with the package, and how profiles are derived from tables of kernel times.

`load_profile("llama-3.1-8b-h100")` reads one; docs/simulator/profiles.md says what they hold and where they come from.
"""

from nitsum_jax.profiles.library import load_profile, profile_names

__all__ = ["load_profile", "profile_names"]
