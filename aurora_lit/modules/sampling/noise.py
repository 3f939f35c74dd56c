"""Random numbers without state: Gumbel noise of a key, an output index and a token.

With Gumbel noise a sampled request is decoded like a greedy one: its token is the argmax of logit / temperature plus
noise (the Gumbel-max trick). The noise is a hash of the request's key, the token's index in the output and the token
id, so it is the same whatever is proposed, and nothing has to be restored when proposals are rejected. csrc/noise.hpp
computes the same noise natively.

Leaves out who draws with it: the target (modules/sampling/choice.py) and the draft
(serve/speculation/sources/drafter.py).

Shapes: N draws, V tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 2**32 - 1
_GOLDEN = -7046029254386353131
"""0x9E3779B97F4A7C15 as int64, by which SplitMix64's state advances."""


def gumbel(key_N: Tensor, position_N: Tensor, token_id: Tensor) -> Tensor:
    """Noise of the standard Gumbel distribution for each token of each draw, the reference of csrc/noise.hpp.

    The argmax of logit / temperature + noise has the distribution softmax(logit / temperature) (Gumbel 1954; Maddison,
    Tarlow, Minka 2014, arXiv 1411.0030). The noise is -log(E) with E = -log1p(-v) from the exponential distribution and
    v = (h + 0.5) / 2^32 for the bits h of `noise_bits`, in fp32. The largest v is 1 - 2^-24, the smallest 2^-33, so
    noise lies between -2.9 and 22.9; its upper end, which decides, has the finest steps.

    Args:
        key_N: int64, the requests' keys.
        position_N: int64, index in the output of the token to draw.
        token_id: int64 [V] or [N, V], 0 … 2^32 - 1.

    Returns:
        Noise [N, V], fp32.
    """
    v_NV = (noise_bits(key_N, position_N, token_id).float() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-v_NV.clamp_max_(1 - 2.0**-24)))


def noise_bits(key_N: Tensor, position_N: Tensor, token_id: Tensor) -> Tensor:
    """32 uniform bits for each token of each draw, int64 [N, V]; arguments as in `gumbel`.

    SplitMix64 (Steele, Lea, Flood 2014), started at the mixed key and advanced to the position, gives each draw two
    words of 32 bits. Tokens are hashed with both by MurmurHash3's fmix32 (Appleby 2011).
    """
    word_N1 = _mix64(_mix64(key_N) + (position_N + 1) * _GOLDEN)[:, None]
    return _fmix32((_fmix32(token_id ^ (word_N1 & _LOW)) + ((word_N1 >> 32) & _LOW)) & _LOW)


def _fmix32(h: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser, on 0 … 2^32 - 1 in int64; products wrap around and keep their low bits."""
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _LOW
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _LOW
    return h ^ (h >> 16)


def _mix64(x: Tensor) -> Tensor:
    """SplitMix64's bit mixer on int64, whose products wrap around; the masks make the right shifts logical."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ ((x >> 31) & (2**33 - 1))
