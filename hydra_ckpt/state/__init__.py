"""Live objects to named tensors and plain data, and back."""
