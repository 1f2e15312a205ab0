"""Megatron-LM through megatron-core 0.16.1, on the same model, data, loss and optimizer as every other system."""
