"""The compiled step: kernels that serve tensors of any shape, and the paths of the optimizer built on them."""
