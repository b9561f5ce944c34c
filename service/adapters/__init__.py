"""LoRA adapters in PEFT's format: read by their headers, fitted to a checkpoint's tensors by name, and written."""
