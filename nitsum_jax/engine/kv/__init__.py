"""The KV cache: blocks and their owners, shared prefixes, copies between devices, memory."""
