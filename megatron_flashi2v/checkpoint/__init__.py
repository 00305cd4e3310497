"""Our sharded safetensors checkpoints, the key table, and the state of models and optimizers."""
