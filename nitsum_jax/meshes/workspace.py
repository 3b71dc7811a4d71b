"""Temporary memory of the largest step of a device, by arithmetic: for memory plans and for profiles of step times."""

# In how many parts a GPU may take the old tokens of a row that decodes, and rows of a part, padding included.
MOST_PARTS, LEAST_GPU_ROWS = 16, 16
_LIBRARIES = {"gpu": 1 << 26, "tpu": 1 << 25}


def workspace_bytes(
    *,
    width: int,
    mlp: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    vocab: int,
    batch: int,
    chunk: int,
    platform: str = "cpu",
    fused: bool = False,
) -> int:
    """Bytes of float32 activations of a chunk or a batch, of logits and of their sampling.

    For accelerators it is an upper bound of what their compilers say (tests/accelerator): they sample all rows at once,
    and their libraries want memory of their own.

    Args:
      width: of the model.
      mlp: F of the layers' parts on the device.
      q_heads: query heads on the device.
      kv_heads: KV heads on the device.
      head_dim: A.
      vocab: of the whole model: every device samples from all of it.
      batch: sequences of the largest decode step.
      chunk: tokens of the largest prefill step.
      platform: "cpu", "gpu" or "tpu".
      fused: whether one step can hold both.
    """
    rows = batch + chunk if fused else max(batch, chunk)
    attention = q_heads * chunk * (chunk + 128)
    sampled = 4 if platform == "cpu" else 8
    if platform == "gpu":  # what the parts of a decode step come to, see engine/step/paged/triton.py
        per_group = 1 << (q_heads // kv_heads - 1).bit_length()
        parts = batch * kv_heads * MOST_PARTS * max(LEAST_GPU_ROWS, per_group) * (head_dim + 2)
        attention = attention + parts if fused else max(attention, parts)
    widest = mlp * 2 + (q_heads + 2 * kv_heads) * head_dim
    numbers = sampled * (batch + fused) * vocab + rows * (8 * width + widest) + 2 * attention
    return _LIBRARIES.get(platform, 0) + 4 * numbers
