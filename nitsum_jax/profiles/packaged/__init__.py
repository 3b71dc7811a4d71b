"""The profiles that come with the package, one file for each model and kind of device."""
