"""Layer-wise model parallelism for PyTorch Lightning: unchanged model, exact result."""
