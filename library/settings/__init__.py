"""Options: collected from the components that declare them, read from TOML and the command line, checked."""
