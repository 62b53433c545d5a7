"""What Anima is: checkpoint reading, transformer, text encoding, VAE, flow matching, sampling."""
