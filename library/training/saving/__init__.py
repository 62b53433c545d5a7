"""What a run leaves to go on from or to use: states, adapter files, what they say, and where they go."""
