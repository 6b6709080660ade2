"""Kernels in Triton for what a step does between its products, as operators of `torch.library`."""
