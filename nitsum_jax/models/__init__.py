"""Decoder models: configs, cutting rules, checkpoints, tokenizer and chat template."""
