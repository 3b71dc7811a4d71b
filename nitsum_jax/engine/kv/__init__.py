"""The KV cache: blocks and who has them, prefixes that are shared, copies between devices, memory."""
