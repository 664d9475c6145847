"""Random signs."""

import numpy as np
from problems import KEY

from nso_jax.curvature._probes import random_signs


def test_probes_do_not_depend_on_their_number():
    signs = random_signs(KEY, 0, 400, 45)
    np.testing.assert_array_equal(signs[3:5], random_signs(KEY, 3, 2, 45))
    np.testing.assert_array_equal(abs(signs), 1)
    assert abs(signs.mean()) <= 5 / np.sqrt(signs.size)
    correlations = signs.T @ signs / 400 - np.eye(45)
    assert abs(correlations).max() <= 5 / np.sqrt(400)
