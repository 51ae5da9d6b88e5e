"""PyTorch's own database of operators through every backend: ``python -m tests.opinfo.run``."""
