"""Full disks, missing rights, killed and interrupted processes, and too little memory."""

import contextlib
import dataclasses
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqx_cogvae as cv
from eqx_cogvae import _checks as _clips, _latents, training, video
from eqx_cogvae._cli import clips as cli

resource = pytest.importorskip("resource", reason="limits on files are of Unix")

CONFIG = cv.Config(
    block_out_channels=(2, 4), norm_num_groups=2, latent_channels=2, layers_per_block=1
)
OLD = b"old"
NOBODY = 65534


def vae(seed=0, **fields):
    return cv.VAE(dataclasses.replace(CONFIG, **fields), key=jax.random.key(seed))


def latents(seed=0):
    array = np.random.default_rng(seed).standard_normal((1, 5, 16, 16, 2)).astype(np.float32)
    return _latents.Latents(array)


def state():
    return training.Trainer(optax.adam(1e-3)).init(vae())


WRITERS = {
    "latents": ("z.safetensors", lambda path: _latents.save_latents(path, latents())),
    "mp4": ("a.mp4", lambda path: video.write(path, video.procedural_clip(9, 48, 64))),
    "mkv": ("a.mkv", lambda path: video.write(path, video.procedural_clip(9, 48, 64))),
    "film strip": (
        "a.png",
        lambda path: video.filmstrip(video.procedural_clip(3, 32, 32), path=path),
    ),
    "npy": ("a.npy", lambda path: cli.write(path, iter([np.ones((1, 2, 16, 16, 3))]), 8.0)),
    "state": ("state", lambda path: training.save_state(path, state())),
}


@contextlib.contextmanager
def full_disk(size):
    """No file can grow beyond `size` bytes; Python ignores the signal, and gets the error."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("share", [0, 0.4, 0.99])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_leaves_the_old_file(writer, share, tmp_path):
    name, write = WRITERS[writer]
    path = tmp_path / name
    write(path)
    size = int(share * path.stat().st_size)
    path.write_bytes(OLD)
    with pytest.raises(OSError, match=r"File too large|Errno 27|requested and"), full_disk(size):
        write(path)
    assert contents(tmp_path) == {name: OLD}


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("share", [0, 0.99])
def test_a_full_disk_leaves_the_old_checkpoint(share, there, tmp_path):
    cv.save_pretrained(vae(0), tmp_path / "a")
    size = max(path.stat().st_size for path in (tmp_path / "a").iterdir())
    target = tmp_path / ("a" if there else "b")
    before = contents(tmp_path)
    with pytest.raises(OSError, match="File too large"), full_disk(int(share * size)):
        cv.save_pretrained(vae(1, scaling_factor=0.5), target)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("writer", WRITERS)
def test_a_failed_rename_leaves_the_old_file(writer, tmp_path, monkeypatch):
    name, write = WRITERS[writer]
    (tmp_path / name).write_bytes(OLD)
    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(PermissionError, match="Operation not permitted"):
        write(tmp_path / name)
    assert contents(tmp_path) == {name: OLD}


def refused(*_):
    raise PermissionError(errno.EPERM, "Operation not permitted")


@pytest.fixture
def nobody(tmp_path):
    """The rights of an ordinary user, where the superuser, who may write anywhere, runs the tests.

    They are asked for by the real user: the effective one stays, for pytest to tidy up. The folder
    is there by then, as pytest would have each user's below a name of its own.
    """
    del tmp_path
    if os.geteuid():
        yield
        return
    os.setreuid(NOBODY, 0)
    yield
    os.setreuid(0, 0)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_folder_without_rights_is_named(writer, nobody, tmp_path):
    name, write = WRITERS[writer]
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=r"cannot write .* is not writable"):
        write(tmp_path / name)


def saved_with_failure_at(number, folder, model, monkeypatch):
    """Saves, with one change of names that fails; returns whether there was such a one."""
    calls, real = [], os.replace

    def replace(*paths):
        calls.append(paths)
        if len(calls) == number:
            refused()
        real(*paths)

    monkeypatch.setattr(os, "replace", replace)
    with contextlib.suppress(PermissionError):
        cv.save_pretrained(model, folder)
    monkeypatch.setattr(os, "replace", real)
    return len(calls) >= number


@pytest.mark.parametrize("fields", [{}, {"scaling_factor": 0.5}], ids=["same config", "another"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_checkpoint_is_never_a_mixture(number, fields, tmp_path, monkeypatch):
    """A new config with old weights loads without complaint, and is neither."""
    old, new = vae(0), vae(1, **fields)
    cv.save_pretrained(old, tmp_path / "a")
    failed = saved_with_failure_at(number, tmp_path / "a", new, monkeypatch)
    assert failed or not fields
    if not (tmp_path / "a" / "config.json").exists():
        with pytest.raises(FileNotFoundError, match=r"there is no config\.json"):
            cv.from_pretrained(tmp_path / "a")
        return
    loaded = cv.from_pretrained(tmp_path / "a")
    assert eqx.tree_equal(loaded, old) or eqx.tree_equal(loaded, new)


KILLED = """
import os, random, signal, sys, time, warnings
from pathlib import Path
import numpy as np, jax, optax
import eqx_cogvae as cv
from eqx_cogvae import _latents, training, video
import test_faults as faults

warnings.simplefilter("ignore")  # JAX's, of forks: the children only write
folder = Path(sys.argv[1])
models = [faults.vae(0), faults.vae(1), faults.vae(2, scaling_factor=0.5)]
for model in models:
    jax.block_until_ready(jax.tree.leaves(model))
clips = [np.full((1, 9, 32, 32, 3), level) for level in (-0.5, 0.5)]
WRITES = {
    "checkpoint": lambda i: cv.save_pretrained(models[i % 3], folder / "vae"),
    "latents": lambda i: _latents.save_latents(folder / "z.safetensors", faults.latents(i % 2)),
    "mp4": lambda i: video.write(folder / "a.mp4", clips[i % 2]),
}
LOADS = {
    "checkpoint": lambda: cv.from_pretrained(folder / "vae"),
    "latents": lambda: _latents.load_latents(folder / "z.safetensors", channels=2, layout="BTHWC"),
    "mp4": lambda: video.read(folder / "a.mp4"),
}
rng, outcomes = random.Random(0), {}
for kind, write in WRITES.items():
    write(0)
    for _ in range(int(sys.argv[2])):
        child = os.fork()
        if not child:
            for i in range(10**6):
                write(i)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        try:
            loaded = LOADS[kind]()
        except FileNotFoundError as error:
            assert kind == "checkpoint" and "there is no config.json" in str(error), error
            write(0)
            continue
        if kind == "checkpoint":
            import equinox as eqx
            assert any(eqx.tree_equal(loaded, model) for model in models)
        elif kind == "latents":
            arrays = [faults.latents(i).array for i in range(2)]
            assert any((loaded.array == array).all() for array in arrays)
        else:
            assert loaded.shape == clips[0].shape
        outcomes[kind] = outcomes.get(kind, 0) + 1
print(outcomes, flush=True)
os._exit(0)
"""


def test_a_killed_process_leaves_a_whole_file(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path, "12"],
        cwd=Path(__file__).parent,
        env=os.environ | COMPILED | {"PYTHONPATH": os.pathsep.join(map(str, IMPORTS))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "'checkpoint'" in done.stdout and "'mp4': 12" in done.stdout


IMPORTS = (Path(cv.__file__).parents[1], Path(__file__).parent)
# The programs of this process serve the other.
COMPILED = {
    "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).resolve().parents[1] / ".jax_cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


# Ctrl-C.


@pytest.fixture
def heard():
    """SIGINT as at a terminal: a shell lets the processes that it starts with `&` ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def counting(x, cache):
    start = 0 if cache is None else cache
    return start + jnp.cumsum(x, axis=1), start + jnp.sum(x, axis=1, keepdims=True)


def interrupting(calls, at):
    """A step whose compiled call is interrupted while it runs, at call `at`."""

    def interrupt(x):
        calls.append(1)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)
        return x

    return interrupt


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_interrupted_stream_is_resumable(at, heard, monkeypatch):
    """Signalled within a step, after which the old cache is gone."""
    x, calls = jnp.arange(9.0).reshape(1, 9, 1, 1, 1), []
    due = np.asarray(cv.framewise(counting, 2)(x))
    real, interrupt = cv._transforms.streamed.jitted_step, interrupting(calls, at)
    monkeypatch.setattr(cv._transforms.streamed, "jitted_step", lambda *a: interrupt(real(*a)))
    stream, done = cv.streamed(counting, 2)(x), []
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        done.extend(np.asarray(piece) for piece in stream)
    assert stream.frame == sum(piece.shape[1] for piece in done) == 2 * at + 1
    rest = cv.streamed(counting, 2)(x[:, stream.frame :], cache=stream.cache)
    done.extend(np.asarray(piece) for piece in rest)
    np.testing.assert_array_equal(np.concatenate(done, axis=1), due)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_is_not_held_back(heard, monkeypatch):
    def step(*_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(cv._transforms.streamed, "jitted_step", step)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        next(cv.streamed(counting, 2)(jnp.ones((1, 3, 1, 1, 1))))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# Memory.


def test_an_error_for_want_of_memory_has_advice():
    """By the allocator's own error, of an array larger than any machine."""
    huge = jax.ShapeDtypeStruct((2**46,), jnp.float32)
    allocate = jax.jit(lambda: jnp.zeros(huge.shape, huge.dtype)).lower().compile()
    exhausted = pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED")
    with exhausted as caught, _clips.memory_advice((1, 9, 8, 8, 3)):
        allocate()
    assert "`cv.plan(vae, video.shape)` lists" in caught.value.__notes__[0]


@pytest.mark.parametrize("call", ["encode", "decode"])
def test_encode_and_decode_have_it(call, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(cv._autoencoder, "framewise", lambda *_: fail)
    clip = jnp.zeros((1, 9, 8, 8, 3 if call == "encode" else 2))
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED") as caught:
        getattr(vae(), call)(clip)
    assert "(1, 9, 8, 8" in caught.value.__notes__[0]
