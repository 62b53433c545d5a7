"""Pictures, captions, buckets, latent caches, and the order in which an epoch goes through them."""
