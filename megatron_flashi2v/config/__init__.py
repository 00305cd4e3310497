"""Frozen configuration, YAML recipes, flags, and the rules between them."""
