"""The process and its machine: device, launcher, distributed set-up, logging, keyed randomness, safe files."""
