"""A training that may be killed at any moment: start it again, and it ends with the same bits.

It needs `pip install 'nso-jax[flax]' safetensors scikit-learn`; run it by `python examples/resume.py FOLDER`.
"""

import hashlib
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from safetensors.flax import save_file
from sklearn.datasets import load_digits

import nso_jax

STEPS, EVERY = 2000, 50
images, labels = map(jnp.asarray, load_digits(return_X_y=True))
tx = nso_jax.nso(optax.adam(1e-3), sigma=0.02, key=jax.random.key(0))


def init():
    hidden = jax.random.normal(jax.random.key(1), (64, 128)) / 8
    params = {"hidden": hidden, "out": jnp.zeros((128, 10))}
    return {"step": jnp.int32(0), "params": params, "opt_state": tx.init(params)}


def loss(params, batch):
    logits = jax.nn.relu(images[batch] / 16 @ params["hidden"]) @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()


@jax.jit
def train_step(state):
    # The batch follows from the step, and so does the noise: there is no more state to save.
    batch = jax.random.choice(jax.random.fold_in(jax.random.key(2), state["step"]), len(labels), (100,))

    def grad_fn(params, _):
        return jax.grad(loss)(params, batch)

    params, grads = state["params"], grad_fn(state["params"], 0)
    updates, opt_state = tx.update(grads, state["opt_state"], params, grad_fn=grad_fn)
    return {"step": state["step"] + 1, "params": optax.apply_updates(params, updates), "opt_state": opt_state}


def digest(checkpoint):
    """SHA-256 of its files, for Orbax does not notice a flipped bit in an array."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    named = (str(path.relative_to(checkpoint)).encode() + path.read_bytes() for path in files)
    return hashlib.sha256(b"".join(named)).digest()


def main(folder):
    checkpoints, digests, state = folder.absolute() / "checkpoints", folder / "digests", init()
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager(checkpoints, options=options) as manager:
        digests.touch()
        for step in sorted(manager.all_steps(), reverse=True):
            if digest(checkpoints / str(step)) in digests.read_bytes():
                state = manager.restore(step, args=ocp.args.StandardRestore(state))
                break
            warnings.warn(f"{checkpoints / str(step)} is damaged or unfinished and is left out", stacklevel=1)
            manager.delete(step)
        print("from step", state["step"])
        for step in range(int(state["step"]) + 1, STEPS + 1):
            state = train_step(state)
            if step % EVERY == 0:
                manager.save(step, args=ocp.args.StandardSave(state))
                with digests.open("ab") as file:
                    file.write(digest(checkpoints / str(step)))
    save_file(state["params"], folder / "weights.safetensors")
    print("loss", loss(state["params"], jnp.arange(len(labels))))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
