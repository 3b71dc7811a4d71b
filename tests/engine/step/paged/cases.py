"""Attention by the kernels, interpreted."""

import numpy as np

from nitsum_jax.engine.step.paged.kernels import paged_attention
from tests.engine.step.attention_cases import AttentionCase

LAYER = 1


class Case(AttentionCase):
    """One attention."""

    def run(self, kernel: str) -> np.ndarray:
        """By a kernel, interpreted."""
        q, k, v, pool, page_table, context = self.arrays
        return np.asarray(
            paged_attention(
                q,
                k,
                v,
                pool,
                LAYER,
                page_table,
                context,
                self.shape,
                self.variant,
                kernel=kernel,
                interpret=True,
            )
        )


make_case = Case.draw
