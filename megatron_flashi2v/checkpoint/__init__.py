"""Sharded safetensors checkpoints, the key table, and converters."""
