"""Programs for TPUs and GPUs, compiled on a machine without either, and what stands in a compiled program.

Nothing is run, so that no time is measured: these are figures that compilers give. The compilers are in the
extra `compilers` (`make .venv-compilers/ready`); reading needs JAX alone.
"""

import collections
import functools
import math
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

# No chip and no metadata server is asked: the topology's name says all. No chip is held, so that several
# processes may load the compiler.
_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
_GPU = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}

# XLA's own description of an NVIDIA H100 SXM (xla/backends/gpu/target_config/specs/h100_sxm.txtpb).
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>\S+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>\S+) = (?P<shape>.*?) (?P<opcode>[a-z][\w-]*)\(")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|true_computation|false_computation|branch_computations|called_computations)="
    r"(?:%?(?P<one>[\w.-]+)|\{(?P<several>[^}]*)\})"
)
_CONDITION = re.compile(r"\bcondition=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BOUND = re.compile(r" = [su]\d+\[\]\S* constant\((\d+)\)")
_SHAPE = re.compile(r"\b(?:pred|[a-z]+(?P<bits>\d+)\w*)\[(?P<sizes>[\d,]*)\]")


class Sent(NamedTuple):
    """What operations of one kind send.

    Attributes:
      operations: how many there are; an operation on a tuple of arrays is one.
      arrays: how many arrays are their results.
      bytes: the size of those results, on one device.
    """

    operations: int
    arrays: int
    bytes: int


class Memory(NamedTuple):
    """Bytes on one device.

    Attributes:
      arguments: what the program is given.
      outputs: what it returns.
      aliased: the outputs that take the place of donated arguments.
      temp: all else that is alive at once.
    """

    arguments: int
    outputs: int
    aliased: int
    temp: int


class Cost(NamedTuple):
    """What one device does.

    Attributes:
      flops: floating-point operations.
      bytes_accessed: bytes read from memory and written to it.
    """

    flops: float
    bytes_accessed: float


class Loop(NamedTuple):
    """A loop in a compiled program.

    Attributes:
      body: the computation that is repeated.
      trips: how often, each time that the loop is run, or None where the program does not say.
      runs: how often the loop is run.
    """

    body: str
    trips: int | None
    runs: int


class _Instruction(NamedTuple):
    text: str
    shape: str
    opcode: str
    called: tuple[str, ...]


def tpu(topology: str = "v5e:2x4") -> list[Any]:
    """The chips of a TPU slice, to make a mesh of and to compile for.

    Args:
      topology: its name, as `v5e:2x4`, `v5p:8x8x16` or `v6e:16x16`.

    Returns:
      Its devices. Their compiler is libtpu.
    """
    os.environ.update(_TPU)
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def gpu(num_devices: int = 8) -> list[Any]:
    """The GPUs of one host of NVIDIA H100s, to make a mesh of and to compile for.

    Args:
      num_devices: how many it has.

    Returns:
      Its devices.
    """
    os.environ.update(_GPU)
    name = f"1x1x{num_devices}"
    described = topologies.get_topology_desc(name, platform="cuda", topology=name, target_config=_H100)
    return list(described.devices)


def collectives(program: Any) -> dict[str, Sent]:
    """What one device sends in one run of a compiled program, by kind of operation.

    An operation in a loop counts as often as the loop repeats it, one that takes two instructions, a start
    and an end, once, and one in a branch as if the branch were taken.

    Args:
      program: a compiled function, or the text of its HLO.

    Returns:
      The kinds that occur, each with its operations, arrays and bytes.

    Raises:
      ValueError: an operation stands in a loop of which the program does not say how often it is repeated.
    """
    computations = _computations(program)
    sent: dict[str, Sent] = {}
    for name, runs in _runs(computations).items():
        for instruction in computations[name]:
            kind = instruction.opcode.removesuffix("-done")
            if kind not in KINDS:
                continue
            if math.isnan(runs):
                raise ValueError(f"program: {kind} in {name}, which is repeated as often as data decide.")
            shapes = list(_SHAPE.finditer(instruction.shape))
            this = (runs, runs * len(shapes), runs * sum(map(_num_bytes, shapes)))
            sent[kind] = Sent(*(int(a + b) for a, b in zip(sent.get(kind, (0, 0, 0)), this, strict=True)))
    return sent


def loops(program: Any) -> list[Loop]:
    """The loops in a compiled program.

    The trip count is the compiler's where it states it, and else the bound of the condition: JAX's `scan`
    counts from 0 in steps of 1. A loop that waits for a flag is one of nso_jax's barriers, which run 0 times.

    Args:
      program: a compiled function, or the text of its HLO.
    """
    computations = _computations(program)
    runs = _runs(computations)
    return [
        Loop(instruction.called[0], None if math.isnan(trips) else int(trips), int(runs[name]))
        for name, instructions in computations.items()
        for instruction in instructions
        if instruction.opcode == "while" and runs[name] > 0
        for trips in [_trips(instruction, computations)]
    ]


def count(program: Any, *opcodes: str) -> int:
    """How many instructions of some kinds stand in a compiled program, those in a loop once.

    Args:
      program: a compiled function, or the text of its HLO.
      opcodes: HLO's names, such as `dot` or `while`.
    """
    computations = _computations(program).values()
    return sum(instruction.opcode in opcodes for instructions in computations for instruction in instructions)


def memory(compiled: Any) -> Memory:
    """The memory that a compiled function needs on each device, in bytes."""
    stats = compiled.memory_analysis()
    return Memory(
        stats.argument_size_in_bytes,
        stats.output_size_in_bytes,
        stats.alias_size_in_bytes,
        stats.temp_size_in_bytes,
    )


def cost(program: Any) -> Cost:
    """What one device does in one run of a compiled program, by XLA's account.

    XLA counts a loop's body once, whatever its trip count, on TPU, too, and its compiler for GPUs tells
    nothing. Here XLA's analysis is run on the optimized program and on the body of each of its loops, and the
    body's cost is added as often as it is repeated. Where there is no loop, that is what TPU's compiler says,
    but for bytes that pad small arrays to the chip's tiles.

    Args:
      program: a compiled function, or the text of its HLO.

    Raises:
      ValueError: the program does not say how often a loop is repeated.
    """
    text = _text(program)
    total = _once(text, next(reversed(_computations(text))))
    for loop in loops(text):
        if loop.trips is None:
            raise ValueError(f"program: {loop.body} is repeated as often as data decide.")
        body, more = _once(text, loop.body), loop.runs * (loop.trips - 1)
        total = Cost(*(whole + more * part for whole, part in zip(total, body, strict=True)))
    return total


def _once(text: str, entry: str) -> Cost:
    """The cost of the computation `entry`, with the bodies of loops counted once."""
    from jaxlib import _hlo, _jax  # type: ignore[attr-defined]  # noqa: PLC0415  (elsewhere in older versions)

    lines = [
        re.sub(rf"^(?:ENTRY )?(%?{re.escape(entry)} \()", r"ENTRY \1", line.removeprefix("ENTRY "))
        for line in text.splitlines()[1:]  # the first describes the arguments of the old entry
    ]
    module = _hlo.hlo_module_from_text("\n".join(["HloModule part", *lines]))
    properties = _jax.hlo_module_cost_analysis(jax.local_devices(backend="cpu")[0].client, module)
    return Cost(properties["flops"], properties["bytes accessed"])


def _text(program: Any) -> str:
    return program if isinstance(program, str) else program.as_text()


def _computations(program: Any) -> dict[str, list[_Instruction]]:
    """The instructions of each computation, the entry's last."""
    return _read(_text(program))


@functools.lru_cache(maxsize=8)
def _read(text: str) -> dict[str, list[_Instruction]]:
    computations: dict[str, list[_Instruction]] = {}
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            computations[found["name"]] = instructions = []
        elif found := _INSTRUCTION.match(line):
            called = [
                name.strip().lstrip("%")
                for call in _CALLED.finditer(line)
                for name in (call["one"] or call["several"]).split(",")
            ]
            instructions.append(_Instruction(line, found["shape"], found["opcode"], tuple(called)))
    return computations


def _runs(computations: dict[str, list[_Instruction]]) -> dict[str, float]:
    """How often each computation is run: NaN if in a loop whose trip count is unknown."""
    runs = collections.defaultdict[str, float](int, {next(reversed(computations)): 1})
    for name in reversed(computations):  # a computation stands before those that call it
        for instruction in computations[name]:
            times = _trips(instruction, computations) if instruction.opcode == "while" else 1
            for called in instruction.called if runs[name] else ():
                runs[called] += runs[name] * times
    return {name: runs[name] for name in computations}


def _trips(loop: _Instruction, computations: dict[str, list[_Instruction]]) -> float:
    if known := _TRIPS.search(loop.text):
        return int(known[1])
    condition = _CONDITION.search(loop.text)
    inside = list(computations[condition[1]]) if condition else []
    inside += [part for call in inside for name in call.called for part in computations[name]]
    bounds = [int(found[1]) for part in inside if (found := _BOUND.search(part.text))]
    compares = [part.text for part in inside if part.opcode == "compare"]
    if condition and not compares:
        return 0  # what nso_jax has on CPU in place of barriers: a flag that is never set
    return bounds[0] if len(bounds) == len(compares) == 1 and "direction=LT" in compares[0] else math.nan


def _num_bytes(shape: re.Match[str]) -> int:
    entries = math.prod(int(size) for size in shape["sizes"].split(",") if size)
    return entries * int(shape["bits"] or 8) // 8
