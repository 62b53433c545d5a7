"""What training makes small: noise, timesteps, targets and losses of flow matching."""
