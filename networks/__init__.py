"""Adapters: one file of maths each, attachment, targets, file key formats, and the Kohya entry points."""
