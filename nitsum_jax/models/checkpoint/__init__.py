"""Checkpoint formats: GGUF, safetensors and Orbax, each as a source of tensors under Hugging Face names."""
