"""What the model computes beside its products, each as one pass over memory: plain formulas, and Triton kernels."""
