"""The systems that LoRAFusion is measured against. Importable from the checkout; not part of the wheel."""
