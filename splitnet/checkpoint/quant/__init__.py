"""The formats of quantized checkpoints."""
