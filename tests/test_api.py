"""The public interface: every name, its signature as written, and a docstring that says all of it."""

import ast
import builtins
import dis
import importlib
import inspect
import re
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest

import nso_jax

MODULES = ["gradients", "transform", "noise", "parallel", "nnx", "sharpness", "penalties", "curvature"]

# Parameters and what is returned, or fields, as the source has them.
API = {
    "NoiseStabilityState": "count: jax.Array, rng_key: jax.Array",
    "noise_stability": """
        sigma: Sigma, *, key: jax.Array, num_samples: int=1, antithetic: bool=True,
        sampler: Sampler=noise.normal, mask: PyTree=None, clean_weight: Any=0.0,
        chunk_size: int | None=None, axis_name: AxisName | None=None, independent_draws: bool=True,
        param_specs: PyTree=None -> optax.GradientTransformationExtraArgs
    """,
    "nso": """
        optimizer: optax.GradientTransformation, sigma: Sigma, *, key: jax.Array, num_samples: int=1,
        antithetic: bool=True, sampler: Sampler=noise.normal, mask: PyTree=None, clean_weight: Any=0.0,
        chunk_size: int | None=None, axis_name: AxisName | None=None, independent_draws: bool=True,
        param_specs: PyTree=None -> optax.GradientTransformationExtraArgs
    """,
    "value_and_grad": """
        fun: Callable[..., Any], *, sigma: Sigma, num_samples: int=1, antithetic: bool=True,
        sampler: Sampler=noise.normal, mask: PyTree=None, clean_weight: Any=0.0,
        argnums: int | Sequence[int]=0, has_aux: bool=False, aux: PyTree='mean',
        chunk_size: int | None=None, axis_name: AxisName | None=None, independent_draws: bool=True,
        param_specs: PyTree=None -> Callable[..., tuple[Any, PyTree]]
    """,
    "noise.Relative": """
        scale: Any, per: Per, channel_axis: int | tuple[int, ...], stack_axes: PyTree
    """,
    "noise.adaptive": "sigma: Sigma, squares: PyTree, eta: Any=1.0 -> Callable[[PyTree], PyTree]",
    "noise.cauchy": "key: jax.Array, shape: tuple[int, ...]=(), dtype: Any=jnp.float32 -> jax.Array",
    "noise.centered_binomial": """
        key: jax.Array, shape: tuple[int, ...]=(), dtype: Any=jnp.float32 -> jax.Array
    """,
    "noise.laplace": "key: jax.Array, shape: tuple[int, ...]=(), dtype: Any=jnp.float32 -> jax.Array",
    "noise.normal": "key: jax.Array, shape: tuple[int, ...]=(), dtype: Any=jnp.float32 -> jax.Array",
    "noise.perturb": "params: PyTree, noise: PyTree, sign: Any=1 -> PyTree",
    "noise.perturbation": """
        key: jax.Array, params: PyTree, sigma: Sigma, *, sampler: Sampler=normal, mask: PyTree=None,
        param_specs: PyTree=None -> PyTree
    """,
    "noise.rademacher": "key: jax.Array, shape: tuple[int, ...]=(), dtype: Any=jnp.float32 -> jax.Array",
    "noise.relative": """
        scale: Any, per: Per='weight', *, channel_axis: int | Sequence[int]=-1, stack_axes: PyTree=0
        -> Relative
    """,
    "noise.uniform": "key: jax.Array, shape: tuple[int, ...]=(), dtype: Any=jnp.float32 -> jax.Array",
    "parallel.microbatch": """
        fn: Callable[..., PyTree], num_microbatches: int, *, batch_argnums: int | Sequence[int]=(1,),
        weight: Weight | None=None, aux: PyTree='mean', axis_name: AxisName | None=None,
        independent_draws: bool=True -> Callable[..., PyTree]
    """,
    "parallel.value_and_grad": """
        fun: Callable[..., Any], *, mesh: jax.sharding.Mesh,
        method: Callable[..., Any]=gradients.value_and_grad, axis_name: AxisName='data',
        batch_argnums: int | Sequence[int]=(1,), num_microbatches: int=1, weight: Weight | None=None,
        aux: PyTree='mean', independent_draws: bool=True, **options: Any -> Callable[..., tuple[Any, PyTree]]
    """,
    "nnx.value_and_grad": """
        fun: Callable[..., Any], *, method: Callable[..., Any]=gradients.value_and_grad,
        wrt: nnx.filterlib.Filter=nnx.Param, has_aux: bool=False, aux: PyTree='mean',
        mesh: jax.sharding.Mesh | None=None, batch_argnums: int | Sequence[int]=(1,),
        num_microbatches: int=1, weight: Weight | None=None, **options: Any
        -> Callable[..., tuple[Any, nnx.State]]
    """,
    "nnx.microbatch": """
        fn: Callable[..., PyTree], num_microbatches: int, *, batch_argnums: int | Sequence[int]=(1,),
        weight: Weight | None=None, aux: PyTree='mean', axis_name: AxisName | None=None,
        independent_draws: bool=True -> Callable[..., PyTree]
    """,
    "sharpness.sam": """
        fun: Callable[..., Any], *, rho: Any, mask: PyTree=None, argnums: int | Sequence[int]=0,
        has_aux: bool=False, aux: PyTree='mean', axis_name: AxisName | None=None,
        global_ascent: bool=False, param_specs: PyTree=None -> Callable[..., tuple[Any, PyTree]]
    """,
    "sharpness.usam": """
        fun: Callable[..., Any], *, rho: Any, **options: Any -> Callable[..., tuple[Any, PyTree]]
    """,
    "sharpness.asam": """
        fun: Callable[..., Any], *, rho: Any, eta: float=0.01, **options: Any
        -> Callable[..., tuple[Any, PyTree]]
    """,
    "sharpness.rsam": """
        fun: Callable[..., Any], *, rho: Any, sigma: Sigma, gradient_weight: Any=1.0,
        sampler: Sampler=noise.normal, **options: Any -> Callable[..., tuple[Any, PyTree]]
    """,
    "sharpness.BSAMState": "count: jax.Array, rng_key: jax.Array, momentum: PyTree, precision: PyTree",
    "sharpness.bsam": """
        learning_rate: optax.ScalarOrSchedule, *, num_examples: int, key: jax.Array, rho: float=0.01,
        weight_decay: float=0.0002, damping: float=0.1, b1: float=0.9, b2: float=0.999,
        initial_precision: float=1.0, mask: PyTree=None, axis_name: AxisName | None=None
        -> optax.GradientTransformationExtraArgs
    """,
    "sharpness.IVONState": "count: jax.Array, rng_key: jax.Array, momentum: PyTree, hessian: PyTree",
    "sharpness.ivon": """
        learning_rate: optax.ScalarOrSchedule, *, num_examples: int, key: jax.Array,
        weight_decay: float=0.0002, b1: float=0.9, b2: float=0.99999, initial_hessian: float=0.5,
        num_samples: int=1, antithetic: bool=False, sampler: Sampler=noise.normal,
        axis_name: AxisName | None=None -> optax.GradientTransformationExtraArgs
    """,
    "sharpness.mrwp": """
        fun: Callable[..., Any], *, sigma: Sigma, noisy_weight: Any=0.5,
        batch_argnums: int | Sequence[int]=(1,), argnums: int | Sequence[int]=0, has_aux: bool=False,
        aux: PyTree='mean', **options: Any -> Callable[..., tuple[Any, PyTree]]
    """,
    "penalties.hessian_trace": """
        key: jax.Array, fun: Callable[..., Any], params: PyTree, *args: Any, prob: float=1.0,
        drop: Literal['weight', 'leaf']='weight', num_samples: int=1, mask: PyTree=None -> jax.Array
    """,
    "penalties.input_hessian_norm": """
        key: jax.Array, fun: Callable[..., Any], inputs: PyTree, *args: Any, num_steps: int=1,
        step_size: Any=math.inf -> jax.Array
    """,
    "penalties.input_gradient": "fun: Callable[..., Any], inputs: PyTree, *args: Any -> jax.Array",
    "penalties.jacobian": """
        key: jax.Array, fun: Callable[..., Any], inputs: PyTree, *args: Any, num_projections: int=1
        -> jax.Array
    """,
    "penalties.confidence": "logits: jax.Array -> jax.Array",
    "curvature.CurvatureMatrix": """
        fun: Callable[[Any, Any], jax.Array], params: Any, batches: Any, mask: Any, weight: Weight | None,
        chunk_size: int, flags: tuple[bool, ...], size: int, dtype: np.dtype, epsilon: float,
        programs: Programs
    """,
    "curvature.Density": """
        grid: np.ndarray, density: np.ndarray, standard_error: np.ndarray, width: float,
        nodes: np.ndarray, weights: np.ndarray, num_products: int
    """,
    "curvature.Eigenpairs": """
        values: np.ndarray, vectors: list[Any], residuals: np.ndarray, num_products: int
    """,
    "curvature.Estimate": """
        value: Any, standard_error: Any, num_products: int, per_leaf: Any, per_leaf_standard_error: Any
    """,
    "curvature.KroneckerFactors": """
        input: np.ndarray, output: np.ndarray, error: float, error_standard_error: float,
        eigenvalues: np.ndarray, vectors: list[np.ndarray], overlap: float, output_standard_error: float
    """,
    "curvature.LayerStructure": """
        eigenpairs: Eigenpairs, kronecker: KroneckerFactors | None, reason: str
    """,
    "curvature.PacBayesBound": """
        value: float, layerwise: float, max_loss: float, max_trace: float,
        max_trace_standard_error: float, distance: float, sample_size: int, per: str, leaf_traces: Any,
        leaf_distances: Any
    """,
    "curvature.SigmaSuggestion": """
        sigma: float, limit: str, gap: float, standard_error: float, loss: float, trace: Estimate,
        table: StabilityGap
    """,
    "curvature.StabilityGap": """
        sigma: np.ndarray, gap: np.ndarray, standard_error: np.ndarray, quadratic: np.ndarray,
        quadratic_standard_error: np.ndarray, loss: float, trace: Estimate
    """,
    "curvature.diagonal": """
        key: jax.Array, h: CurvatureMatrix, *, method: str='xdiag', num_products: int=100,
        rtol: float | None=None, param_labels: Any=None, callback: Callable[[int], object] | None=None
        -> Estimate
    """,
    "curvature.eigenvalues": """
        key: jax.Array, h: CurvatureMatrix, *, k: int=5, which: str='largest', tol: float=1e-06,
        max_products: int | None=None, callback: Callable[[int], object] | None=None -> Eigenpairs
    """,
    "curvature.gauss_newton": """
        model: Callable[[Any, Any], Any], loss: Callable[[Any, Any], jax.Array], params: Any,
        batches: Any, *, mask: Any=None, weight: Weight | None=None, chunk_size: int | None=None
        -> CurvatureMatrix
    """,
    "curvature.hessian": """
        fun: Callable[[Any, Any], jax.Array], params: Any, batches: Any, *, mask: Any=None,
        weight: Weight | None=None, chunk_size: int | None=None -> CurvatureMatrix
    """,
    "curvature.layer_structure": """
        key: jax.Array, h: CurvatureMatrix, *, k: int=10, tol: float=0.001, num_probes: int=20,
        weight_sharing: str='expand', callback: Callable[[int], object] | None=None
        -> dict[str, LayerStructure]
    """,
    "curvature.noise_stability_gap": """
        key: jax.Array, h: CurvatureMatrix, *, sigmas: Sequence[float], num_samples: int=16,
        num_products: int=100, method: str='xtrace', sampler: noise.Sampler=noise.normal,
        callback: Callable[[int], object] | None=None -> StabilityGap
    """,
    "curvature.pac_bayes_bound": """
        key: jax.Array, h: CurvatureMatrix, *, initial_params: Any, num_probes: int=10,
        per: str='example', callback: Callable[[int], object] | None=None -> PacBayesBound
    """,
    "curvature.spectral_density": """
        key: jax.Array, h: CurvatureMatrix, *, num_probes: int=10, num_steps: int=64,
        width: float | None=None, num_points: int=1000, callback: Callable[[int], object] | None=None
        -> Density
    """,
    "curvature.subspace_overlap": "first: Sequence[Any], second: Sequence[Any] -> float",
    "curvature.suggest_sigma": """
        key: jax.Array, h: CurvatureMatrix, *, share: float=0.2, tolerance: float=0.5,
        num_samples: int=16, num_products: int=100, method: str='xtrace',
        sampler: noise.Sampler=noise.normal -> SigmaSuggestion
    """,
    "curvature.trace": """
        key: jax.Array, h: CurvatureMatrix, *, method: str='xtrace', num_products: int=100,
        rtol: float | None=None, param_labels: Any=None, callback: Callable[[int], object] | None=None
        -> Estimate
    """,
}

ORDER = ["Summary", "Args", "Returns", "Warns", "Raises", "Example", "References"]

# Functions that come from no publication.
WITHOUT_SOURCE = {
    *(f"noise.{name}" for name in ("cauchy", "centered_binomial", "laplace", "rademacher", "uniform")),
    *("noise.perturb", "noise.perturbation"),
    *("parallel.microbatch", "parallel.value_and_grad", "nnx.microbatch"),
}


def names_of(module):
    """What `__all__` says, or else the functions and classes that the module defines, but for underscores."""
    defined = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    return getattr(module, "__all__", defined)


def public():
    """Every public function and class by its shortest name: `value_and_grad`, `noise.normal`."""
    found = {}
    for prefix in ("", *MODULES):
        module = importlib.import_module(f"nso_jax.{prefix}".rstrip("."))
        for name in names_of(module):
            value = getattr(module, name)
            if (inspect.isfunction(value) or inspect.isclass(value)) and value not in found.values():
                found[f"{prefix}.{name}".lstrip(".")] = value
    return found


PUBLIC = public()
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}


def as_written(value):
    """A function's parameters and what it returns, or a class's fields, as they stand in the source."""
    node = ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]
    if isinstance(node, ast.FunctionDef):
        return f"{ast.unparse(node.args)} -> {ast.unparse(node.returns)}"
    return ", ".join(
        ast.unparse(field).split("  #")[0] for field in node.body if isinstance(field, ast.AnnAssign)
    )


def sections(value):
    """A docstring's summary, and the text of each of its sections."""
    summary, *parts = re.split(r"^([A-Z][a-z]+):\n", inspect.getdoc(value) + "\n", flags=re.MULTILINE)
    return {"Summary": summary} | dict(zip(parts[::2], parts[1::2], strict=True))


def entries(section):
    """The names that a section describes, alone or several together."""
    found = re.findall(r"^  (\*{0,2}\w+(?:, \*{0,2}\w+)*): ", section, re.MULTILINE)
    return [name for names in found for name in names.split(", ")]


def callees(function):
    """The functions of this library that a function may call, to be on the safe side."""
    codes = [function.__code__]
    for code in codes:
        codes.extend(constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    names = {name for code in codes for name in code.co_names}
    modules = [value for name in names if inspect.ismodule(value := function.__globals__.get(name))]
    spaces = [function.__globals__, *(vars(module) for module in modules if is_ours(module.__name__))]
    for value in (inspect.unwrap(space[name]) for space in spaces for name in names & space.keys()):
        members = vars(value).values() if inspect.isclass(value) else [value]
        yield from (member for member in members if inspect.isfunction(member) and is_ours(member.__module__))


def is_ours(module_name):
    return module_name.split(".")[0] == "nso_jax"


def raises(function):
    """Whether a function, or one that it may call, has a `raise`."""
    seen = [function]
    for one in seen:
        seen.extend(callee for callee in callees(one) if callee not in seen)
    return any(step.opname == "RAISE_VARARGS" for one in seen for step in dis.get_instructions(one))


def test_the_public_interface_is_as_pinned():
    actual = {name: as_written(value) for name, value in PUBLIC.items()}
    pinned = {name: " ".join(text.split()) for name, text in API.items()}
    changes = [
        f"{name}\n  pinned: {pinned.get(name, 'nothing')}\n  now:    {actual.get(name, 'gone')}"
        for name in sorted(actual.keys() | pinned.keys())
        if actual.get(name) != pinned.get(name)
    ]
    assert not changes, "\n".join(
        [*changes, "If that is meant, change API in tests/test_api.py and say so in CHANGELOG.md."]
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_functions_docstring_says_all_of_it(name):
    function = FUNCTIONS[name]
    parts = sections(function)
    first, *rest = parts["Summary"].splitlines()
    assert first.endswith((".", "]")), "one line that ends with a full stop, or with a formula, comes first"
    assert not rest[0], "an empty line follows the summary"
    kinds = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = inspect.signature(function).parameters.values()
    described = entries(parts["Args"])
    assert sorted(described) == sorted(kinds.get(p.kind, "") + p.name for p in parameters)
    assert parts["Returns"].strip()
    assert ("Raises" in parts) == raises(function)
    for error in entries(parts.get("Raises", "")):
        assert issubclass(getattr(builtins, error), Exception)
    assert ("References" in parts) == (name not in WITHOUT_SOURCE)
    assert list(parts) == [section for section in ORDER if section in parts], "sections in this order"


@pytest.mark.parametrize("name", PUBLIC)
def test_references_end_with_a_year_that_the_arxiv_id_allows(name):
    """`Authors, Title, arXiv id, year.`, or a journal or book in its place."""
    references = " ".join(sections(PUBLIC[name]).get("References", "").split())
    if references:
        assert re.search(r"\w, .+, (19|20)\d\d( \(.+\))?\.$", references)
    for id_year, year in re.findall(r"arXiv (\d\d)\d\d\.\d{4,5}, (\d{4})", references):
        assert 0 <= int(year) - 2000 - int(id_year) <= 1  # in print at most a year later
    assert len(re.findall(r"arXiv \d{4}\.\d{4,5}, \d{4}", references)) == references.count("arXiv")


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_an_example_that_runs(name):
    """All examples run as doctests. Classes that hold results name their fields instead."""
    parts = sections(PUBLIC[name])
    if name in CLASSES:
        fields = list(PUBLIC[name].__annotations__)
        assert entries(parts["Attributes"]) == fields
    if name in FUNCTIONS:
        assert re.search(r"^ *>>> .*\n(?! *\.\.\.)", parts["Example"], re.MULTILINE)


def test_importing_it_imports_nothing_that_is_not_needed():
    """Flax, SciPy and matplotlib take seconds; the benchmarks are no part of the library."""
    program = """if True:
        import sys
        import nso_jax
        print(*sorted({name.split(".")[0] for name in sys.modules} & set(sys.argv[1:])))
        nso_jax.curvature.trace
    """
    unwanted = ["flax", "scipy", "matplotlib", "benchmarks", "sklearn", "torch"]
    run = subprocess.run(  # noqa: S603
        [sys.executable, "-c", program, *unwanted],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(nso_jax.__file__).parents[1],
    )
    assert run.stdout.split() == []
