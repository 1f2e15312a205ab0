"""The ground: checked data, files, configuration, workloads and plans. Everything above builds on it."""
