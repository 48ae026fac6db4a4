"""Files that were tampered with: each loads right, or is refused in one line that names it.

    python tests/hostile.py --mutations 20000

Real files of a very small model are spoilt at random, one at a time, by the tables below. A
mutation fails when it raises something undocumented, in several lines or without the file's name;
when what was loaded is not what safetensors' own reader makes of the same bytes; when a
file outside of the checkpoint's folder is opened, or anything is executed; when it takes longer
than a moment, or more memory than the file has bytes, and some for the model.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy

import eqx_cogvae as cv
from eqx_cogvae import _latents, video

CONFIG = cv.Config(
    block_out_channels=(2, 4), norm_num_groups=2, latent_channels=2, layers_per_block=1
)
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SECONDS = 20
# Beyond the bytes of the file: the model, its skeleton, and JAX's own.
KILOBYTES = 64 * 1024
GUARD = 2 << 30
REFUSALS = (ValueError, OSError)
EXECUTES = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.", "socket.")
NUMBERS = (0, -1, 1, 2, 7, 2**31, 2**63, 2**64, 10**30, 10**400, 0.5, -0.0, 1e308, 1e-320)
ODDITIES = (
    *NUMBERS,
    *(float("nan"), float("inf"), -float("inf")),
    *(None, True, False, "", "x", "1", "false", "\ud800", "\0", "a\nb", "../x", [], [[]], {}),
    *([1], [None], ["x"], [-1, 4], [2, 2**63], [float("nan")] * 2, ["x", "y"], {"a": 1}),
    *([2] * 20_000, "x" * 100_000, 10**9),
)


class Case(NamedTuple):
    """A kind of checkpoint: its files, how it is loaded, and what else reads it."""

    files: dict[str, bytes]
    load: Any
    oracle: Any


# Bytes.


def cut(rng, data):
    return data[: rng.randrange(len(data) + 1)]


def flip(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def overwrite(rng, data):
    i, n = rng.randrange(len(data) + 1), rng.choice((1, 4, 8, 64))
    fill = rng.choice((bytes(n), b"\xff" * n, rng.randbytes(n)))
    return data[:i] + fill + data[i + n :]


def insert(rng, data):
    i = rng.randrange(len(data) + 1)
    j = rng.randrange(i, min(len(data), i + 256) + 1)
    return data[:i] + rng.choice((data[i:j], rng.randbytes(8), b"\0")) + data[i:]


def remove(rng, data):
    i = rng.randrange(len(data) + 1)
    return data[:i] + data[i + rng.choice((1, 2, 8, 100)) :]


def replace(rng, data):
    del data
    return rng.choice(
        (
            *(b"", b"{", b"{}", b"[]", b"null", b"7", b"\x80\x04.", b"PK\x03\x04", bytes(9000)),
            *(b"[" * 100_000, b'{"a":' * 100_000, b"9" * 100_000, "{}".encode("utf-16")),
            *(b"\xef\xbb\xbf{}", rng.randbytes(64), b"# version https://git-lfs"),
        )
    )


BYTES = (cut, flip, overwrite, insert, remove, replace)


# JSON, of configs, indices and safetensors' headers.


def any_place(rng, tree):
    """A container in a tree of JSON, and a key of it."""
    places, trees = [], [tree]
    while trees:
        node = trees.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        places += [(node, key) for key in keys]
        trees += [node[key] for key in keys if isinstance(node[key], dict | list) and node[key]]
    return rng.choice(places)


def edit(rng, tree):
    node, key = any_place(rng, tree)
    action = rng.randrange(6)
    value = rng.choice(ODDITIES)
    if action == 0:
        del node[key]
    elif action == 1 and isinstance(node, dict):
        node[rng.choice(("x", "", "_x", "__proto__", "a\nb", "\0", "x" * 9999))] = node.pop(key)
    elif action == 2:
        other, name = any_place(rng, tree)
        if key in (node if isinstance(node, dict) else range(len(node))):
            node[key], other[name] = other[name], node[key]
    elif isinstance(node[key], int) and action == 3:
        node[key] += rng.choice((-1, 1, 4, -4))
    else:
        node[key] = value


def as_text(rng, tree):
    """With a key given twice, now and then."""
    try:
        text = json.dumps(tree)
    except (ValueError, RecursionError):
        text = "{}"  # a swap has put a container into itself
    if rng.randrange(8) == 0 and isinstance(tree, dict) and tree:
        key = rng.choice(list(tree))
        other = rng.choice((tree[key], rng.choice(ODDITIES)))
        text = f"{text[:-1]}, {json.dumps(key)}: {json.dumps(other)}}}"
    return text.encode(errors="surrogatepass")


def json_edit(rng, data):
    tree = json.loads(data)
    with contextlib.suppress(KeyError, IndexError, ValueError, TypeError):
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            edit(rng, tree)
    return as_text(rng, tree)


def elsewhere(rng, data):
    """An index that points out of its folder, or to another of its files."""
    tree = json.loads(data)
    names = sorted(set(tree["weight_map"].values()))
    targets = (
        "../outside.safetensors",
        "/etc/passwd",
        "/dev/zero",
        "a/b.safetensors",
        "config.json",
    )
    target = rng.choice((*targets, "..", "", ".safetensors", "x" * 300 + ".safetensors", *names))
    for name in rng.sample(list(tree["weight_map"]), rng.choice((1, 3))):
        tree["weight_map"][name] = rng.choice((target, os.path.abspath("outside.safetensors")))
    return as_text(rng, tree)


# Safetensors.


def parts(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(rng, header, data):
    text = as_text(rng, header)
    return len(text).to_bytes(8, "little") + text + data


def header_edit(rng, data):
    header, rest = parts(data)
    with contextlib.suppress(KeyError, IndexError, ValueError, TypeError):
        edit(rng, header)
    return joined(rng, header, rest)


def header_length(rng, data):
    length = int.from_bytes(data[:8], "little")
    lies = (0, 1, length - 1, length + 1, length + 8, len(data), 10**8 + 1, 2**32, 2**63, 2**64 - 1)
    return rng.choice(lies).to_bytes(8, "little") + data[8:]


def entry_edit(rng, data):
    header, rest = parts(data)
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    begin, end = entry["data_offsets"]
    field, value = rng.choice(
        (
            ("dtype", rng.choice(("F64", "F16", "BF16", "I8", "I32", "BOOL", "F8_E4M3", "X", 7))),
            ("shape", entry["shape"][::-1]),
            ("shape", [2**62, 4]),
            ("shape", [2**31, 0]),
            ("shape", [1] * 70 + entry["shape"]),
            ("shape", [rng.choice(NUMBERS)] * rng.randrange(6)),
            ("data_offsets", [begin - 4, end - 4]),
            ("data_offsets", [begin + 4, end + 4]),
            ("data_offsets", [end, begin]),
            ("data_offsets", [begin, begin]),
            ("data_offsets", [0, len(rest)]),
            ("data_offsets", [rng.choice(NUMBERS), rng.choice(NUMBERS)]),
        )
    )
    entry[field] = value
    return joined(rng, header, rest)


def swap(rng, data):
    """Two tensors trade places: right, where their shapes agree."""
    header, rest = parts(data)
    names = [name for name in header if name != "__metadata__"]
    one, other = rng.sample(names, 2) if len(names) > 1 else names * 2
    header[one], header[other] = header[other], header[one]
    return joined(rng, header, rest)


def numbers(rng, data):
    header, rest = parts(data)
    i = 4 * rng.randrange(len(rest) // 4)
    value = rng.choice((np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, 0))
    return joined(rng, header, rest[:i] + np.float32(value).tobytes() + rest[i + 4 :])


def retype(rng, data):
    """Each number in another dtype: right, where it is a floating one."""
    tensors = safetensors.numpy.load(data)
    dtype = rng.choice((np.float64, np.float16, np.int32, np.uint8))
    some = rng.sample(list(tensors), rng.choice((1, len(tensors))))
    with np.errstate(invalid="ignore"):
        tensors |= {name: tensors[name].astype(dtype) for name in some}
    return safetensors.numpy.save(tensors)


def metadata(rng, data):
    header, rest = parts(data)
    fields = header.setdefault("__metadata__", {})
    names = (*vars(_latents.Latents(np.zeros(5))), "layout", "format", "dtype")
    value = rng.choice(ODDITIES)
    fields[rng.choice(names)] = value if rng.randrange(8) == 0 else str(value)
    return joined(rng, header, rest)


SAFETENSORS = (header_edit, header_length, entry_edit, swap, numbers, retype, metadata)


# Files.


def elsewhere_linked(rng, path):
    """A link is followed: the hub's cache is made of them."""
    outside = path.parents[1] / "linked"
    path.rename(outside)
    path.symlink_to(rng.choice((outside, outside, path, "/dev/zero", "/dev/null", "none")))


def misplaced(rng, path):
    path.unlink()
    if rng.randrange(2):
        path.mkdir()
    else:
        os.mkfifo(path)


PLACES = (elsewhere_linked, misplaced, lambda rng, path: path.unlink())


def mutate(rng, folder):
    """Spoils a file of the folder, once as a rule; says which, and how."""
    done = []
    for _ in range(rng.choice((1, 1, 1, 1, 2))):
        path = rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))
        kinds = list(BYTES)
        if path.suffix == ".json":
            kinds += [json_edit] * 8 + [elsewhere] * 6 * (path.name == INDEX)
        if path.suffix == ".safetensors":
            kinds += SAFETENSORS * 2
        kind = rng.choice(kinds)
        if rng.randrange(25) == 0:
            kind = rng.choice(PLACES)
            kind(rng, path)
            return [*done, (path.name, kind.__name__)]
        # What the first mutation spoilt, the second one may fail to read.
        with contextlib.suppress(*([Exception] if done else [])):
            path.write_bytes(kind(rng, path.read_bytes()))
        done.append((path.name, kind.__name__))
    return done


# What the files hold, by other readers.


def raw(path):
    """By safetensors' own reader, whatever the dtype."""
    entries = safetensors.deserialize(path.read_bytes())
    return {name: (entry["dtype"], entry["shape"], entry["data"]) for name, entry in entries}


DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


def plain(entry):
    dtype, shape, data = entry
    return np.frombuffer(data, DTYPES[dtype]).reshape(shape)


def pretrained_oracle(folder):
    tensors = {}
    for path in folder.glob("*.safetensors"):
        if path.name == WEIGHTS or not (folder / WEIGHTS).exists():
            tensors |= raw(path)
    return json.loads((folder / "config.json").read_bytes()), {
        name: plain(entry) for name, entry in tensors.items()
    }


def latents_oracle(folder):
    tensors = raw(folder / "z.safetensors")
    return None, tensors.get("latents", next(iter(tensors.values())))


def assert_right(model, due):
    """What was loaded is what is in the files."""
    if due is None:
        return
    fields, tensors = due
    if fields is None:
        array = np.asarray(model.array)
        assert array.tobytes() == plain(tensors).tobytes() or array.ndim == 5
        assert sorted(array.ravel().tolist()) == sorted(plain(tensors).ravel().tolist())
        return
    for name, value in fields.items():
        if not name.startswith("_") and not name.endswith("block_types"):
            assert model.config.to_dict()[name] == value, name
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    loaded = {jax.tree_util.keystr(p, simple=True, separator="."): leaf for p, leaf in leaves}
    assert loaded.keys() == tensors.keys()
    for name, leaf in loaded.items():
        due = tensors[name]
        axes = {5: "dhwio->oidhw", 4: "hwio->oihw", 1: "c->c"}[leaf.ndim]
        got = np.einsum(axes, np.asarray(leaf))
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(got, due.astype(got.dtype), err_msg=name)


# The cases.


def load_video(suffix, folder):
    """Read whole, and at another rate and size; there is no other reader to ask."""
    path = folder / f"clip.{suffix}"
    found = video.info(path)
    clip = video.read(path)
    assert clip.shape[0] == 1 and clip.shape[-1] == 3 and found.fps > 0
    assert np.isfinite(clip).all() and np.abs(clip).max() <= 1
    pieces = video.frames(path, size=(8, 8), fps=max(found.fps / 2, 0.001))
    assert {piece.shape[2:] for piece in pieces} == {(8, 8, 3)}
    return clip


def nothing(folder):
    """There is no other reader."""


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def build(folder):
    """The kinds of files, written whole."""
    vae = cv.VAE(CONFIG, key=jax.random.key(0))
    cv.save_pretrained(vae, folder / "single")
    single = files_of(folder / "single")
    tensors = safetensors.numpy.load(single[WEIGHTS])
    half = len(tensors) // 2
    shards = [dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])]
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    sharded = {name: safetensors.numpy.save(s) for name, s in zip(names, shards, strict=True)}
    places = {t: name for name, s in zip(names, shards, strict=True) for t in s}
    sharded[INDEX] = json.dumps({"metadata": {}, "weight_map": places}).encode()
    sharded["config.json"] = single["config.json"]
    (folder / "z").mkdir()
    array = np.random.default_rng(0).standard_normal((1, 3, 4, 6, 2)).astype(np.float32)
    record = _latents.Latents(array, False, 0.7, True, 8.0, 8, 12, 5, 9, "0" * 12)
    _latents.save_latents(folder / "z" / "z.safetensors", record)
    for suffix in ("mp4", "mkv"):
        (folder / suffix).mkdir()
        clip = video.procedural_clip(9, 16, 24)
        video.write(folder / suffix / f"clip.{suffix}", clip)
    (folder / "outside.safetensors").write_bytes(single[WEIGHTS])
    return (
        Case(single, cv.from_pretrained, pretrained_oracle),
        Case(sharded, cv.from_pretrained, pretrained_oracle),
        Case(files_of(folder / "z"), load_latents, latents_oracle),
        *(Case(files_of(folder / s), partial(load_video, s), nothing) for s in ("mp4", "mkv")),
    )


def load_latents(folder):
    return _latents.load_latents(folder / "z.safetensors", channels=2)


class Watch:
    """Which files are opened while it looks, and what is executed. Hooks cannot be removed."""

    def __init__(self):
        self.on = False
        self.opened, self.executed = [], []
        sys.addaudithook(self._see)

    def _see(self, event, args):
        if self.on and event == "open" and isinstance(args[0], str | bytes):
            self.opened.append(os.fsdecode(args[0]))
        elif self.on and event.startswith(EXECUTES):
            self.executed.append(event)

    def __enter__(self):
        self.opened, self.executed, self.on = [], [], True

    def __exit__(self, *_):
        self.on = False


def peak_kilobytes():
    """The most memory that was resident since the last reset, where Linux tells."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    except OSError:
        return 0


def guard_memory():
    """What asks for gigabytes fails by itself, before the machine does."""
    with contextlib.suppress(OSError, ImportError):
        import resource

        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + GUARD, now + GUARD))


def forget_peak():
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


@contextlib.contextmanager
def limited(seconds):
    def stop(*_):
        raise TimeoutError(f"took more than {seconds} seconds")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def fault_of(error, folder):
    """What is wrong with a refusal, or None."""
    message = str(error)
    if isinstance(error, TimeoutError) or not isinstance(error, REFUSALS):
        return "undocumented"
    if "\n" in message or len(message) > 4000:
        return "not one line"
    if str(folder) not in message:
        return "does not name the file"
    return None


def attempt(case, folder, watch):
    """Loads a spoilt checkpoint: whether it was `loaded` or `refused`; raises for a failure."""
    forget_peak()
    before = peak_kilobytes()
    try:
        with limited(SECONDS), watch:
            model = case.load(folder)
    except Exception as error:
        if fault := fault_of(error, folder):
            raise AssertionError(fault) from error
        outcome = "refused"
    else:
        assert_right(model, case.oracle(folder))
        outcome = "loaded"
    size = sum(p.stat().st_size for p in folder.iterdir() if p.is_file()) // 1024
    assert peak_kilobytes() - before < size + KILOBYTES, "memory"
    assert not watch.executed, watch.executed
    strangers = [path for path in watch.opened if is_outside(path, folder)]
    assert not strangers, strangers
    return outcome


def is_outside(path, folder):
    """Whether it is a file of this place, or a device, and not the checkpoint's own."""
    near = path.startswith((str(folder.parent), "/dev/", "/etc/"))
    return near and not path.startswith(f"{folder}{os.sep}")


def run(mutations, seed, only=None):
    """Counts of outcomes, and a line for each failure."""
    counts, failures = collections.Counter(), []
    watch = Watch()
    with tempfile.TemporaryDirectory() as top:
        top = Path(top).resolve()
        cases = build(top)[slice(only, None if only is None else only + 1)]
        guard_memory()
        folder = top / "model"
        for number in range(mutations):
            rng = random.Random(f"{seed}/{number}")
            case = cases[number % len(cases)]
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for name, data in case.files.items():
                (folder / name).write_bytes(data)
            done = mutate(rng, folder)
            try:
                outcome = attempt(case, folder, watch)
            except Exception as error:
                outcome = "failed"
                lines = traceback.format_exception(error)
                failures.append(f"mutation {number} {done}: {''.join(lines)[-1500:]}")
            counts[outcome] += 1
            (top / "linked").unlink(missing_ok=True)
    return counts, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the case of this number")
    options = parser.parse_args()
    warnings.simplefilter("error")
    start = time.process_time()
    counts, failures = run(options.mutations, options.seed, options.only)
    for failure in failures[:20]:
        print(failure, file=sys.stderr)
    summary = dict(counts) | {"seconds": round(time.process_time() - start, 1)}
    print(json.dumps(summary))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
