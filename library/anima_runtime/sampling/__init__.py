"""Pictures by prompts: what is asked for, samplers, and the model between them."""
