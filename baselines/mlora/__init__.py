"""mLoRA (LoRAPP and BatchLoRA of arXiv 2312.02515), re-implemented: its planner and its LoRA; its executor is the
streaming one. docs/reference/systems.md says what is reproduced, and why its own code is not run."""
