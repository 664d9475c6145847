"""Penalties: functions to be added to a loss, and differentiated with it.

`loss(params, x, y) + c * penalties.hessian_trace(key, loss, params, x, y)` is a loss for any optimizer. The
penalties of the inputs and outputs are arrays of one number per example, to be averaged like optax's losses.
All work under jit, vmap and differentiation. All but `confidence` differentiate `fun` forward as well as
backward; where a `jax.custom_vjp` in it forbids that, backward over backward, which gives the same in more
time. Label smoothing, EMA and SWA are in optax.
"""

from nso_jax.penalties.examples import confidence, input_gradient, input_hessian_norm, jacobian
from nso_jax.penalties.weights import hessian_trace

__all__ = ["confidence", "hessian_trace", "input_gradient", "input_hessian_norm", "jacobian"]
