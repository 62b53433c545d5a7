"""Options: collected from the components that declare them, read from TOML and the command line, checked."""

from library.settings.collect import read_settings, settings_and_problems
from library.settings.groups import Settings, settings_as_flat_dict, shareable_settings

__all__ = ["Settings", "read_settings", "settings_and_problems", "settings_as_flat_dict", "shareable_settings"]
