"""The rivals in the same calling form: SAM and its family.

`sam`, `usam`, `asam` and `rsam` take the place of `nso_jax.value_and_grad`; the key that only `rsam` needs
is there in all, so that one line changes. `bsam` is an optimizer of its own, an optax transformation.
"""

from nso_jax.sharpness.ascent import asam, rsam, sam, usam
from nso_jax.sharpness.bsam import BSAMState, bsam

__all__ = ["BSAMState", "asam", "bsam", "rsam", "sam", "usam"]
