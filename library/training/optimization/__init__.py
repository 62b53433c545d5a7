"""Optimizers, their states, learning-rate schedules, and averages of the weights."""
