"""What is read from compiled programs, of which all is known."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.cost import compilers

SENT = """
HloModule jit_step

%wrapped (x: f32[4]) -> f32[32] {
  %x = f32[4]{0} parameter(0)
  ROOT %gathered = f32[32]{0} all-gather(%x), dimensions={0}
}

ENTRY %main (a: f32[], b: bf16[2,3], c: pred[8], d: f32[4]) -> f32[32] {
  %a = f32[]{:T(128)} parameter(0)
  %b = bf16[2,3]{1,0:T(8,128)(2,1)} parameter(1)
  %c = pred[8]{0} parameter(2)
  %d = f32[4]{0} parameter(3)
  %reduced = (f32[]{:T(128)}, bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, /*index=2*/pred[8]{0}) all-reduce(%a, %b, %c), replica_groups={}
  %start = (f32[4]{0}, f32[32]{0}) all-gather-start(%d), dimensions={0}
  %done = f32[32]{0} all-gather-done(%start)
  %generic = ((f32[4]{0}), f32[32]{0}, s32[]) async-start(%d), calls=%wrapped
  %update = ((f32[4]{0}), f32[32]{0}, s32[]) async-update(%generic)
  %result = f32[32]{0} async-done(%update)
  ROOT %sum = f32[32]{0} add(%done, %result)
}
"""

# As libtpu prints a loop: it keeps the trip count to itself.
LOOP = """
HloModule jit_loop

%body (carry: (s32[], f32[8])) -> (s32[], f32[8]) {
  %carry = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %x = f32[8]{0:T(128)} get-tuple-element(%carry), index=1
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %summed = f32[8]{0:T(128)} all-reduce(%x), channel_id=1, replica_groups={{0,1}}
  ROOT %out = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%next, %summed)
}

%condition (state: (s32[], f32[8])) -> pred[] {
  %state = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%state), index=0
  %bound = s32[]{:T(128)} constant(7)
  ROOT %less = pred[]{:T(512)} compare(%count, %bound), direction=LT
}

ENTRY %main (start: (s32[], f32[8])) -> (s32[], f32[8]) {
  %start = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  ROOT %loop = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%start), condition=%condition, body=%body
}
"""


def test_collectives_are_counted_with_all_their_arrays_and_once_if_asynchronous():
    assert compilers.collectives(SENT) == {
        "all-reduce": (1, 3, 4 + 12 + 8),
        "all-gather": (2, 2, 2 * 128),
    }


def test_the_bound_of_a_condition_is_a_trip_count():
    assert compilers.loops(LOOP) == [("body", 7, 1)]
    assert compilers.collectives(LOOP) == {"all-reduce": (7, 7, 7 * 32)}


def test_a_collective_in_a_loop_that_data_end_cannot_be_counted():
    endless = LOOP.replace("constant(7)", "parameter(1)")
    assert compilers.loops(endless)[0].trips is None
    with pytest.raises(ValueError, match=r"all-reduce in body, which is repeated as often as data decide"):
        compilers.collectives(endless)


def test_a_cost_has_all_turns_of_its_loops():
    def repeated(x, w):
        return jax.lax.scan(
            lambda x, _: (jax.lax.scan(lambda x, _: (x @ w, None), x, None, 3)[0], None), x, None, 5
        )[0]

    def once(x, w):
        return x @ w

    x, w = jnp.ones((64, 128)), jnp.ones((128, 128))
    figures = [compilers.cost(jax.jit(fun).lower(x, w).compile()) for fun in (once, repeated)]
    product = 2 * 64 * 128 * 128
    assert figures[0].flops == product
    assert figures[1].flops == pytest.approx(15 * product, rel=1e-4)  # and two counters
    assert figures[1].bytes_accessed > 15 * figures[0].bytes_accessed


def test_memory_is_what_the_compiler_says():
    fun = jax.jit(lambda x, y: (x + y, x.sum()), donate_argnums=0)
    figures = compilers.memory(fun.lower(jnp.ones(1024), jnp.ones(1024)).compile())
    assert figures[:3] == (
        2 * 4096,
        4096 + 4 + 2 * 8,
        4096,
    )  # the outputs stand in a tuple, of a pointer each
    assert figures.temp >= 0
