"""What lets a run take less of a card: weights of 8 bits or elsewhere, activations parked, and how much it all is."""
