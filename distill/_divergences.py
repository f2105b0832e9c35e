"""The names of the divergences, for settings that are checked without torch."""

from typing import Literal

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_rkl", "alpha_beta", "tv"]
