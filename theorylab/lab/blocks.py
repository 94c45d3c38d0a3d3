"""Blocks of replicates: how one is compiled and placed, what identifies it on disk, and who computes it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import itertools
import os
import re
import textwrap
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from theorylab.core import checkpoint, store
from theorylab.core.keys import run_key
from theorylab.core.progress import Progress
from theorylab.errors import ArgumentError, CheckpointMismatchError, PrecisionError, StorageError

PyTree = Any
KIND = "theorylab sweep block"
QUEUES = (("SLURM_PROCID", "SLURM_NTASKS"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"))
_FILE = re.compile(r"block(\d{5,})\.npz")
_CONFIG: Any = jax.config


class Task(NamedTuple):
    """The same run at one or several points that share their shapes. Lane j is replicate j // points at point j % points.

    Attributes:
        run: the user's function.
        fixed: parameters common to all points; all of them when there is one point.
        varied: entries that differ from point to point, stacked along a leading axis; static leaves as they are.
        stacked: for each leaf of `varied`, whether it is stacked.
        keys: one key per point.
    """

    run: Callable
    fixed: PyTree
    varied: PyTree
    stacked: PyTree
    keys: jax.Array


class Plan(NamedTuple):
    """A task cut into blocks, and the blocks that are finished."""

    task: Task
    total: int
    chunk: int
    folder: Path | None
    identity: dict[str, Any]
    finished: dict[int, dict[str, np.ndarray]]

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.total // self.chunk)

    def count(self, block: int) -> int:
        """Lanes of one block; the last may have fewer."""
        return min(self.chunk, self.total - block * self.chunk)

    def path(self, block: int) -> Path | None:
        """Its file."""
        return None if self.folder is None else self.folder / f"block{block:05d}.npz"


# ---------------------------------------------------------------------------------------------------------------- computing one block


def traced(tree: PyTree) -> PyTree:
    """Numbers and NumPy arrays become JAX arrays, Python numbers weakly typed ones; bools, strings and functions stay static."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray) and jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
            raise PrecisionError(f"params holds a {leaf.dtype} array and 64-bit mode is off: convert it, or unset the environment variable "
                                 "JAX_ENABLE_X64 before theorylab is imported")
        if isinstance(leaf, np.generic) and leaf.dtype.name in ("float64", "int64", "complex128"):      # from iterating over an array
            leaf = leaf.item()
        number = isinstance(leaf, (int, float, complex)) and not isinstance(leaf, bool)
        return jnp.asarray(leaf) if number or isinstance(leaf, (np.ndarray, np.generic)) else leaf

    return jax.tree.map(convert, tree)


@eqx.filter_jit
def _compute(task: Task, indices: jax.Array, mesh: Mesh) -> dict[str, jax.Array]:
    arrays, static = eqx.partition(task, eqx.is_array)

    def local(arrays: PyTree, indices: jax.Array) -> dict[str, jax.Array]:
        task = eqx.combine(arrays, static)
        return jax.vmap(functools.partial(_lane, task))(indices)

    # Each device runs its own loop over its own lanes: under automatic sharding all would wait for the slowest at every step.
    spread = PartitionSpec("replicates")
    return jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec(), spread), out_specs=spread, check_vma=False)(arrays, indices)


def _lane(task: Task, lane: jax.Array) -> dict[str, jax.Array]:
    points = jnp.asarray(task.keys.shape[0], lane.dtype)
    point, replicate = lane % points, lane // points
    own = jax.tree.map(lambda leaf, stacked: leaf[point] if stacked else leaf, task.varied, task.stacked)
    params = {**task.fixed, **own} if own else task.fixed
    result = task.run(params, run_key(task.keys[point], replicate.astype(jnp.uint32)), replicate)
    return _check_result(result)


def _check_result(result: Any) -> dict[str, jax.Array]:
    if not isinstance(result, Mapping) or not result:
        raise ArgumentError(f"run must return a dict of arrays, got {type(result).__name__}{'' if isinstance(result, Mapping) else f' {result!r}'}")
    columns = {}
    for name, value in result.items():
        if not isinstance(name, str):
            raise ArgumentError(f"run must return a dict with strings as names, got the name {name!r}")
        if len(jax.tree.leaves(value)) != 1 or not eqx.is_array_like(value):
            raise ArgumentError(f"run must return arrays; its entry {name!r} is a {type(value).__name__}")
        column = jnp.asarray(value)
        if jnp.issubdtype(column.dtype, jax.dtypes.prng_key):
            raise ArgumentError(f"run must return numbers; its entry {name!r} is a random key (jax.random.key_data gives its numbers)")
        columns[name] = column
    return columns


def local_mesh() -> Mesh:
    """All local devices of the default backend, or the default device if one is set."""
    chosen = _CONFIG.jax_default_device
    devices = jax.local_devices(backend=chosen if isinstance(chosen, str) else None) if not isinstance(chosen, jax.Device) else [chosen]
    return Mesh(np.array(devices), ("replicates",))


def placed(task: Task, mesh: Mesh) -> Task:
    """The task with its arrays on every device of the mesh, moved once and not once per block."""
    arrays, static = eqx.partition(task, eqx.is_array)
    return eqx.combine(jax.device_put(arrays, NamedSharding(mesh, PartitionSpec())), static)


def compute(task: Task, mesh: Mesh, first: int, count: int, width: int) -> dict[str, np.ndarray]:
    """Lanes `first` to `first + count` of a placed task. `width` lanes are run, so that all blocks share one compilation."""
    lanes = -(-width // mesh.size) * mesh.size
    indices = np.minimum(first + np.arange(lanes), first + count - 1).astype(np.int32)      # padding repeats the last lane
    try:
        columns = _compute(task, jax.device_put(indices, NamedSharding(mesh, PartitionSpec("replicates"))), mesh)
    except TypeError as error:
        if "concrete" in str(error) or isinstance(error, jax.errors.ConcretizationTypeError):
            error.add_note("Inside a sweep the numbers in params are traced. Name the entries that shape arrays: shapes=('n',)")
        raise
    return {name: np.asarray(column)[:count] for name, column in columns.items()}


def column_shapes(task: Task) -> dict[str, np.ndarray]:
    """The columns with no replicate in them."""
    shapes = eqx.filter_eval_shape(_lane, task, jnp.zeros((), jnp.int32))
    return {name: np.zeros((0, *column.shape), column.dtype) for name, column in shapes.items()}


# ---------------------------------------------------------------------------------------------------------------- identity and files


def identify(task: Task, chunk: int) -> dict[str, Any]:
    """What must agree for a block on disk to be one of this task. The number of replicates is not part of it, so a sweep can grow."""
    name, digest = _function(task.run)
    key = {"key": hashlib.sha256(np.asarray(jax.random.key_data(task.keys)).tobytes()).hexdigest()[:16] + f"/{jax.random.key_impl(task.keys)}"}
    params = checkpoint.fingerprint(task.fixed, task.varied, task.stacked)[:16]
    return {"run": name, "source of run": digest, "params": params, **key, "chunk": chunk, "points": int(task.keys.shape[0]),
            "64-bit mode": bool(_CONFIG.jax_enable_x64)}


def _function(run: Any) -> tuple[str, str]:
    """Name of a callable, and a hash of its source with all that is bound to it. What it calls is not looked into."""
    if isinstance(run, functools.partial):
        name, digest = _function(run.func)
        return f"partial({name})", _digest(digest, checkpoint.fingerprint((run.args, run.keywords)))
    bound = getattr(run, "__self__", None)
    function = inspect.unwrap(getattr(run, "__func__", run))
    if not inspect.isfunction(function):            # an object that can be called
        bound, function = run, type(run)
    held = [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if _filled(cell)]
    data = [value for value in (*held, bound) if not inspect.ismodule(value)]                # a module's text holds a path
    bindings = checkpoint.fingerprint(data, getattr(function, "__defaults__", None))
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):                    # typed at a prompt, or compiled: the byte code stands for it
        code = getattr(function, "__code__", None)
        source = repr(function) if code is None else f"{code.co_code.hex()} {code.co_names} {[c for c in code.co_consts if not inspect.iscode(c)]}"
    module = "" if function.__module__ == "__main__" else f"{function.__module__}."
    return module + function.__qualname__, _digest(source, bindings)


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def open_plan(task: Task, total: int, chunk: int, folder: Path | None) -> Plan:
    """The plan of a task, with what its folder holds already. Every file is read and checked here, before anything is computed."""
    plan = Plan(task, total, chunk, folder, identify(task, chunk), {})
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"out: {folder} cannot be used as a folder: {error.strerror or error}") from error
        refresh(plan)
    return plan


def refresh(plan: Plan) -> None:
    """Take in the blocks that have appeared in the folder.

    Raises:
        CheckpointMismatchError: a file is damaged or belongs to another sweep. No file is changed.
    """
    assert plan.folder is not None
    for path in sorted(plan.folder.iterdir()):
        match = _FILE.fullmatch(path.name)
        if match and int(match[1]) not in plan.finished:
            columns = _read_block(path, int(match[1]), plan)
            if int(match[1]) < plan.blocks and len(next(iter(columns.values()))) >= plan.count(int(match[1])):
                plan.finished[int(match[1])] = {name: column[: plan.count(int(match[1]))] for name, column in columns.items()}


def _read_block(path: Path, number: int, plan: Plan) -> dict[str, np.ndarray]:
    try:
        columns, header = store.read(path)
    except CheckpointMismatchError as error:
        raise CheckpointMismatchError(f"{error}. If you delete this one file, sweep computes its block again and keeps all others") from error
    found = header.get("identity", {})
    if header.get("kind") != KIND or header.get("block") != number:
        raise CheckpointMismatchError(f"{path} is not block {number} of a sweep ({header.get('kind')!r}, block {header.get('block')!r}); "
                                      "it was left as it is. Move it away, or use another folder out")
    other = [f"{name} (here {value!r}, in the file {found.get(name)!r})" for name, value in plan.identity.items() if found.get(name) != value]
    if other:
        raise CheckpointMismatchError(f"{path} belongs to another sweep: different {', '.join(other)}. It was left as it is; "
                                      "use another folder out, or repeat the call that wrote it")
    return columns


def _keep(plan: Plan, block: int, columns: dict[str, np.ndarray]) -> None:
    path = plan.path(block)
    if path is not None:
        store.write(path, columns, {"kind": KIND, "block": block, "identity": plan.identity})
    plan.finished[block] = columns


# ---------------------------------------------------------------------------------------------------------------- who computes what


def ranks(rank: int | None, world: int | None, meet: bool) -> tuple[int, int, str]:
    """Rank, number of ranks, and where they came from.

    `meet` says whether ranks without `jax.distributed` could put their results together; if not, the queue's variables do not count and
    each process does everything.
    """
    if (rank is None) != (world is None):
        raise ArgumentError(f"rank and world go together, got rank={rank!r}, world={world!r}")
    if rank is not None and world is not None:
        if any(isinstance(v, bool) or not isinstance(v, (int, np.integer)) for v in (rank, world)) or not 0 <= rank < world:
            raise ArgumentError(f"rank must be a whole number from 0 to world - 1, got rank={rank!r}, world={world!r}")
        return int(rank), int(world), "given"
    if jax.distributed.is_initialized():
        return jax.process_index(), jax.process_count(), "jax.distributed"
    for name, size in QUEUES:
        if meet and name in os.environ and size in os.environ:
            try:
                place, many = int(os.environ[name]), int(os.environ[size])
            except ValueError:
                raise ArgumentError(f"{name}={os.environ[name]!r} and {size}={os.environ[size]!r} are not whole numbers; "
                                    "pass rank and world") from None
            return *ranks(place, many, meet)[:2], name
    return 0, 1, "one process"


def execute(plans: Sequence[Plan], rank: int, world: int, client: Any, progress: Progress) -> bool:
    """Compute the blocks of this rank that are not finished; block b of all plans, counted through, belongs to rank b % world.

    Returns:
        False if Ctrl-C came before the end. Finished blocks are kept in any case.
    """
    jobs = [(plan, block) for plan in plans for block in range(plan.blocks)]
    todo = [(plan, block) for place, (plan, block) in enumerate(jobs) if place % world == rank and block not in plan.finished]
    done = sum(plan.count(block) for plan, block in jobs if block in plan.finished)
    progress.start("sweep", sum(plan.total for plan in plans))
    progress.update(done)
    try:
        with contextlib.closing(_local(todo) if client is None else _remote(todo, client)) as results:
            for plan, block, columns in results:
                _keep(plan, block, columns)
                done += plan.count(block)
                progress.update(done)
    except KeyboardInterrupt:
        return False
    finally:
        progress.close()
    return True


Jobs = Sequence[tuple[Plan, int]]
Finished = Generator[tuple[Plan, int, dict[str, np.ndarray]], None, None]


def _local(todo: Jobs) -> Finished:
    mesh = local_mesh()
    for _, group in itertools.groupby(todo, key=lambda job: id(job[0])):
        jobs = list(group)
        plan, task = jobs[0][0], placed(jobs[0][0].task, mesh)
        for _, block in jobs:
            yield plan, block, compute(task, mesh, block * plan.chunk, plan.count(block), min(plan.chunk, plan.total))


def _remote(todo: Jobs, client: Any) -> Finished:
    """Blocks from the workers of a Dask client, as they come."""
    import cloudpickle
    from distributed import as_completed

    futures, payloads = {}, {}
    for plan, block in todo:
        if id(plan) not in payloads:
            payloads[id(plan)] = client.scatter(cloudpickle.dumps((plan.task, _CONFIG.jax_enable_x64)), hash=False)
        width = min(plan.chunk, plan.total)
        future = client.submit(_on_worker, payloads[id(plan)], block * plan.chunk, plan.count(block), width, pure=False)
        futures[future] = (plan, block)
    try:
        for future, columns in as_completed(list(futures), with_results=True):
            yield *futures[future], columns
    finally:
        client.cancel(list(futures))


def _on_worker(payload: bytes, first: int, count: int, width: int) -> dict[str, np.ndarray]:
    task, mesh = _unpack(payload)
    return compute(task, mesh, first, count, width)


@functools.lru_cache(maxsize=4)
def _unpack(payload: bytes) -> tuple[Task, Mesh]:
    """One task object per worker, so that a function sent by value is compiled once and not once per block."""
    import cloudpickle

    task, wide = cloudpickle.loads(payload)
    jax.config.update("jax_enable_x64", wide)
    mesh = local_mesh()
    return placed(task, mesh), mesh
