"""What runs on the host: choose how a kernel is launched, and launch it."""
