"""Checkpoints: configs, tensors and tokenizers from folders, files, the hub, or peers."""
