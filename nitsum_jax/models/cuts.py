"""How one model is cut into K equal vshards: which heads, MLP columns and vocabulary rows each of them owns.

Pure arithmetic.  A vshard owns whole KV heads with the query heads that read them, so attention never crosses a
vshard.  Where the model does not divide, all-zero heads (None here) fill up; they never change an output, because their
rows of the output projection are zero as well.
"""

import dataclasses

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.config import ModelConfig

HeadMap = tuple[tuple[int | None, ...], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class ModelCut:
    """One config cut into K vshards of the same shape.

    Attributes:
      config: the model that is cut.
      num_vshards: K, a power of two.
      q_heads: query heads per vshard, padding included.
      kv_heads: KV heads per vshard, padding and replicas included; divides q_heads.
      d_mlp: MLP columns per vshard, padding included.
      vocab: vocabulary rows per vshard, padding included.
      q_head_of: [K][q_heads] source query head, or None for a zero head.
      kv_head_of: [K][kv_heads] source KV head, or None for a zero head.  Within a vshard, query head i reads KV head
        i // (q_heads // kv_heads).
    """

    config: ModelConfig
    num_vshards: int
    q_heads: int
    kv_heads: int
    d_mlp: int
    vocab: int
    q_head_of: HeadMap
    kv_head_of: HeadMap

    @classmethod
    def of(cls, config: ModelConfig, num_vshards: int) -> "ModelCut":
        """Cuts `config` into `num_vshards` vshards.

        Raises:
          InvalidInputError: `num_vshards` is not a power of two.
        """
        if num_vshards < 1 or num_vshards & (num_vshards - 1):
            raise InvalidInputError(f"vshards={num_vshards} is not a power of two: give 1, 2, 4, 8, ...")
        ratio = config.num_heads // config.num_kv_heads
        if num_vshards <= config.num_kv_heads:
            q_head_of, kv_head_of = _split_groups(config.num_kv_heads, ratio, num_vshards)
        else:
            q_head_of, kv_head_of = _replicate_groups(config.num_kv_heads, ratio, num_vshards)
        return cls(
            config=config,
            num_vshards=num_vshards,
            q_heads=len(q_head_of[0]),
            kv_heads=len(kv_head_of[0]),
            d_mlp=_ceil_div(config.d_mlp, num_vshards),
            vocab=_ceil_div(config.vocab_size, num_vshards),
            q_head_of=q_head_of,
            kv_head_of=kv_head_of,
        )

    def mlp_range(self, vshard: int) -> tuple[int, int]:
        """Source MLP columns [start, stop) of a vshard; fewer than `d_mlp` (maybe none) where padded."""
        return _range(vshard, self.d_mlp, self.config.d_mlp)

    def vocab_range(self, vshard: int) -> tuple[int, int]:
        """Source vocabulary rows [start, stop) of a vshard; fewer than `vocab` (maybe none) where padded."""
        return _range(vshard, self.vocab, self.config.vocab_size)

    @property
    def padded_heads(self) -> int:
        """H with padding: query heads of all vshards together."""
        return self.num_vshards * self.q_heads

    @property
    def padded_kv_heads(self) -> int:
        """G with padding and replicas: KV heads of all vshards together."""
        return self.num_vshards * self.kv_heads

    @property
    def padded_fraction(self) -> float:
        """Share of the cut layers' weights that is zero padding or a replica (0 if the model divides evenly)."""
        config = self.config
        real = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim + 3 * config.d_mlp
        padded = 2 * (self.padded_heads + self.padded_kv_heads) * config.head_dim + 3 * self.num_vshards * self.d_mlp
        return 1.0 - real / padded

    def describe(self) -> str:
        """One line for the log: the cut, and what padding and replication cost."""
        config, k = self.config, self.num_vshards
        parts = [
            _grown("query heads", config.num_heads, self.padded_heads),
            _grown("KV heads", config.num_kv_heads, self.padded_kv_heads),
            _grown("MLP", config.d_mlp, k * self.d_mlp),
            _grown("vocabulary", config.vocab_size, k * self.vocab),
        ]
        return f"{k} vshards: {', '.join(parts)}; {self.padded_fraction:.1%} of the layer weights is padding"


def _split_groups(num_kv_heads: int, ratio: int, num_vshards: int) -> tuple[HeadMap, HeadMap]:
    """At least as many KV heads as vshards: each vshard gets the same number of whole groups, the last ones zeros."""
    per_vshard = _ceil_div(num_kv_heads, num_vshards)
    kv_head_of = tuple(
        tuple(g if g < num_kv_heads else None for g in range(k * per_vshard, (k + 1) * per_vshard))
        for k in range(num_vshards)
    )
    q_head_of = tuple(
        tuple(None if g is None else g * ratio + i for g in groups for i in range(ratio)) for groups in kv_head_of
    )
    return q_head_of, kv_head_of


def _replicate_groups(num_kv_heads: int, ratio: int, num_vshards: int) -> tuple[HeadMap, HeadMap]:
    """More vshards than KV heads: one KV head per vshard, its query heads dealt out over its replicas.

    With K % G == 0 this is K/G replicas each.  Otherwise there are K // G replicas, and the vshards left over are zero:
    as many KV heads per vshard as padding G up to K would give, and never more query heads.
    """
    replicas = num_vshards // num_kv_heads
    per_vshard = _ceil_div(ratio, replicas)
    q_head_of: list[tuple[int | None, ...]] = []
    kv_head_of: list[tuple[int | None, ...]] = []
    for g in range(num_kv_heads):
        for replica in range(replicas):
            members = range(replica * per_vshard, (replica + 1) * per_vshard)
            heads = tuple(g * ratio + i if i < ratio else None for i in members)
            q_head_of.append(heads)
            kv_head_of.append((g if heads[0] is not None else None,))
    for _ in range(num_vshards - len(q_head_of)):
        q_head_of.append((None,) * per_vshard)
        kv_head_of.append((None,))
    return tuple(q_head_of), tuple(kv_head_of)


def _range(vshard: int, size: int, total: int) -> tuple[int, int]:
    return min(vshard * size, total), min((vshard + 1) * size, total)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _grown(what: str, real: int, padded: int) -> str:
    return f"{what} {real}" if real == padded else f"{what} {real} -> {padded}"
