"""From a plan and a stage to training: microbatches as tensors, the streaming executor, the worker, the launcher."""
