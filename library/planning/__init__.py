"""What a run will be, before a model is loaded: settings, data, models and network looked at together."""
