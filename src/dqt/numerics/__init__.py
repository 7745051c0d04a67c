"""Number formats, packing, random numbers, rounding and scale rules: plain tensors, no `torch.nn`."""
