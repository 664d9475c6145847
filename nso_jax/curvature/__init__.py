"""Measuring how curved a loss is: Hessian-vector products, the trace of the Hessian, its eigenvalues."""

from nso_jax.curvature.eigenvalues import Eigenpairs, eigenvalues
from nso_jax.curvature.operators import hvp
from nso_jax.curvature.trace import Estimate, trace

__all__ = ["Eigenpairs", "Estimate", "eigenvalues", "hvp", "trace"]
