"""The rivals in the same calling form: SAM and its family, and random weight perturbation.

`sam`, `usam`, `asam`, `rsam` and `mrwp` take the place of `nso_jax.value_and_grad`; the key that only some
need is there in all, so that one line changes. `bsam` and `ivon` are optimizers of their own, optax
transformations.
"""

from nso_jax.sharpness.ascent import asam, rsam, sam, usam
from nso_jax.sharpness.bsam import BSAMState, bsam
from nso_jax.sharpness.ivon import IVONState, ivon
from nso_jax.sharpness.rwp import mrwp

__all__ = ["BSAMState", "IVONState", "asam", "bsam", "ivon", "mrwp", "rsam", "sam", "usam"]
