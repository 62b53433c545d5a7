"""Everything the trainer is made of; see the file tree in README.md."""
