"""Adapters (LoRA): one neutral form, the files that others keep them in, and their sum with a base model."""
