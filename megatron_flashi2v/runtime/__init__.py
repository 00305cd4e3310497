"""What this process runs on: device, launcher, distributed set-up, logging, keyed randomness, safe files."""
