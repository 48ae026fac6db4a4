"""`python -m eqx_cogvae`: reconstruct, encode and decode clips, and look at models."""

import argparse
import dataclasses
import io
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import eqx_cogvae as cv

from .. import _latents, video
from .._config import shown
from .._files import Written, atomic, check_writable
from .._frames import LATENT_BATCH, SAMPLE_BATCH, frame_batches
from .dataset import add_commands
from .passes import STRIP, Comparison, Padding, Stopwatch, progress, timed, to_decode

_DTYPES = ("float32", "bfloat16", "float16")
_OUT_OF_MEMORY = (
    "out of memory; give a smaller --size, or --dtype bfloat16: "
    "`info MODEL --size FRAMES HxW` says what a size takes"
)
_LONGEST_LINE = 1000
_DEFAULT_FRAMES = 49
_DEFAULT_SIZE = (96, 144)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; a user's mistake is one line on stderr and 2."""
    for stream in (sys.stdout, sys.stderr):
        # A file's name may be no text.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *rest, **more: _note(f"warning: {message}")
            options.run(options)
    except KeyboardInterrupt:
        _note("interrupted")
        return 130
    except (ValueError, OSError, ImportError, argparse.ArgumentTypeError) as error:
        _note(f"error: {error}")
        return 2
    except MemoryError:
        _note(f"error: {_OUT_OF_MEMORY}")
        return 2
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            error = _OUT_OF_MEMORY
        elif isinstance(error, jax.errors.JaxRuntimeError):
            raise
        _note(f"error: {error}")
        return 2
    return 0


def _reconstruct(options: argparse.Namespace) -> None:
    output = _output(options.output, options.input, (*video.CONTAINERS, ".npy"))
    strip = output.with_suffix(".png")
    check_writable(strip)
    vae = _model(options, options.input)
    clip = _clip(options, vae.config)
    encoding, decoding = Stopwatch(), Stopwatch()
    latents, count, _ = _encoded(vae, clip, options.sample, encoding)
    compared = Comparison(clip.pieces(), count)
    decoded = _decoded(vae, latents, count, decoding)
    _write(output, compared.watch(decoded), options.fps or clip.fps)
    video.filmstrip(*compared.rows(), n=STRIP, path=strip)
    print(f"{count} frames of {clip.height}x{clip.width} from {clip.name}, reconstructed: {output}")
    print(f"film strip, original above reconstruction: {strip}")
    print(f"PSNR {compared.psnr():.2f} dB, before the file's own compression")
    _print_costs(encode=encoding, decode=decoding)


def _encode(options: argparse.Namespace) -> None:
    output = _checked(options.output, (".safetensors",))
    vae = _model(options, options.input)
    clip = _clip(options, vae.config)
    watch = Stopwatch()
    latents, count, padded = _encoded(vae, clip, options.sample, watch)
    record = _latents.Latents(
        latents,
        scaling_factor=vae.config.scaling_factor,
        invert_scale_latents=vae.config.invert_scale_latents,
        fps=options.fps or clip.fps,
        height=clip.height,
        width=clip.width,
        frames=count,
        padded=padded,
        fingerprint=_latents.fingerprint(vae),
    )
    _latents.save_latents(output, record)
    print(f"{count} frames of {clip.height}x{clip.width} to latents {latents.shape}: {output}")
    _print_costs(encode=watch)


def _decode(options: argparse.Namespace) -> None:
    output = _checked(options.output, (*video.CONTAINERS, ".npy"))
    if not Path(options.input).is_file():
        _latents.load_latents(options.input)
    vae = _model(options)
    channels = vae.config.latent_channels
    record = _latents.load_latents(options.input, channels=channels, layout=options.layout)
    if len(record.array) != 1:
        raise ValueError(f"{options.input} holds {len(record.array)} clips, expected one.")
    mine = _latents.fingerprint(vae)
    if record.fingerprint not in (None, mine):
        _note(
            f"warning: these latents were encoded by model {record.fingerprint}, "
            f"and {options.model} is {mine}"
        )
    array, count = to_decode(vae, record)
    watch = Stopwatch()
    decoded = _decoded(vae, np.asarray(array), count, watch)
    _write(output, decoded, options.fps or record.fps or 8.0)
    print(f"latents {array.shape} to {count} frames: {output}")
    _print_costs(decode=watch)


def _info(options: argparse.Namespace) -> None:
    shape = options.size and (1, _count(options.size[0]), *_size(options.size[1]))
    vae = _model(options)
    for name, value in vae.config.to_dict().items():
        print(f"{name:28} {value}")
    leaves = jax.tree.leaves(eqx.filter(vae, eqx.is_array))
    print(f"{'parameters':28} {sum(leaf.size for leaf in leaves):,}")
    print(f"{'tensors':28} {len(leaves)}")
    print(f"{'bytes':28} {sum(leaf.nbytes for leaf in leaves):,}")
    print(f"{'dtype':28} {', '.join(sorted({leaf.dtype.name for leaf in leaves}))}")
    print(f"{'fingerprint':28} {_latents.fingerprint(vae)}")
    if shape:
        print(cv.plan(vae, shape, memory=options.memory and options.memory * 2**30))


@dataclasses.dataclass(frozen=True)
class _Clip:
    """A clip that can be read more than once; `frames` is None where only reading it tells."""

    name: str
    pieces: Callable[[], Iterator[Any]]
    fps: float
    frames: int | None
    height: int
    width: int


def _clip(options: argparse.Namespace, config: cv.Config) -> _Clip:
    cell = config.spatial_compression
    if options.size and any(side % cell for side in options.size):
        near = "x".join(str(max(cell, round(side / cell) * cell)) for side in options.size)
        raise ValueError(f"--size must be in multiples of {cell}, such as {near}.")
    if options.input is None:
        if options.start:
            raise ValueError("--start is of a video, the procedural clip has none.")
        frames, size = options.frames or _DEFAULT_FRAMES, options.size or _DEFAULT_SIZE
        array = video.procedural_clip(frames, *size, seed=options.seed or 0)
        cuts = range(SAMPLE_BATCH + 1, frames, SAMPLE_BATCH)
        pieces = lambda: iter(np.split(array, cuts, axis=1))  # noqa: E731
        return _Clip("the procedural clip", pieces, options.fps or 8.0, frames, *size)
    if options.seed is not None:
        raise ValueError("--seed is of the procedural clip, leave it out with a video.")
    found = video.info(options.input)
    size = options.size or tuple(side // cell * cell for side in (found.height, found.width))
    if not min(size):
        raise ValueError(
            f"{options.input} is {found.height}x{found.width}, the model needs {cell}x{cell}: "
            f"enlarge it with --size."
        )
    if not options.size and size != (found.height, found.width):
        _note(f"resized to {size[0]}x{size[1]}, which are multiples of {cell}")
    given = {"start": options.start, "frames": options.frames, "fps": options.fps, "size": size}
    frames = options.frames or (None if options.fps else max(found.frames - options.start, 1))
    return _Clip(
        str(options.input),
        lambda: video.frames(options.input, batch=SAMPLE_BATCH, **given),
        options.fps or found.fps,
        frames,
        *size,
    )


def _encoded(
    vae: cv.VAE, clip: _Clip, sample: int | None, watch: Stopwatch
) -> tuple[np.ndarray, int, int]:
    """The clip's latents, its frame count, and the count it was padded to."""
    padding = Padding()
    batches = clip.frames and len(frame_batches(clip.frames, SAMPLE_BATCH))
    stream = cv.streamed(vae.encode_step, SAMPLE_BATCH)(padding.pad(clip.pieces()))
    moments = np.concatenate(list(progress(timed(stream, watch), "encode", batches)), axis=1)
    if padding.padded != padding.count:
        _note(
            f"warning: {padding.count} frames do not round-trip; the last was repeated "
            f"up to {padding.padded} (8k + 1), which decoding undoes"
        )
    posterior = cv.DiagonalGaussian.from_moments(jnp.asarray(moments))
    latents = posterior.mode() if sample is None else posterior.sample(jax.random.key(sample))
    return np.asarray(latents), padding.count, padding.padded


def _decoded(
    vae: cv.VAE, latents: np.ndarray, count: int, watch: Stopwatch
) -> Iterator[np.ndarray]:
    """Decodes frame batch by frame batch, and stops at `count` frames."""
    _latents.check_latents(latents)
    batches = len(frame_batches(latents.shape[1], LATENT_BATCH))
    stream = cv.streamed(vae.decode_step, LATENT_BATCH)(latents)
    for result in progress(timed(stream, watch), "decode", batches):
        yield result[:, :count]
        count -= result.shape[1]
        if count <= 0:
            return


def _write(output: Path, pieces: Iterator[np.ndarray], fps: float) -> None:
    if output.suffix != ".npy":
        video.write(output, pieces, fps=fps)
        return
    with atomic(output) as partial, Written(partial) as file:
        np.save(file, np.concatenate([piece.astype(np.float32) for piece in pieces], axis=1))


def _model(options: argparse.Namespace, source: Path | None = None) -> cv.VAE:
    if source is not None:
        # What is wrong with a video is known sooner than a model is loaded.
        video.info(source)
        video.frames(source, start=options.start, frames=options.frames, fps=options.fps)
    dtype = None if options.dtype is None else jnp.dtype(options.dtype)
    return cv.from_pretrained(options.model, dtype=dtype)


def _output(output: Path | None, source: Path | None, suffixes: tuple[str, ...]) -> Path:
    if output is None:
        Path("out").mkdir(exist_ok=True)
        output = Path("out") / f"{source.stem if source else 'procedural'}.mp4"
    if source and source.exists() and output.exists() and output.samefile(source):
        raise ValueError(f"{output} is the video that is read: name another file.")
    return _checked(output, suffixes)


def _checked(output: Path, suffixes: tuple[str, ...]) -> Path:
    if output.suffix not in suffixes:
        raise ValueError(f"{output} must end in {' or '.join(suffixes)}.")
    check_writable(output)
    return output


def _print_costs(**watches: Stopwatch) -> None:
    for name, watch in watches.items():
        print(
            f"{name} {watch.total:.1f} s, of which the first batch, compiled, {watch.first:.1f} s"
        )
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        print(f"peak memory {stats['peak_bytes_in_use'] / 2**30:.2f} GiB on {jax.devices()[0]}")
        return
    try:
        import resource
    except ImportError:
        return
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(f"peak memory {peak / 2**30:.2f} GiB, of the process")


def _note(message: str) -> None:
    line = " ".join(message.split())
    if len(line) > _LONGEST_LINE:
        line = f"{line[: _LONGEST_LINE // 2]} ... {line[-_LONGEST_LINE // 2 :]}"
    print("eqx_cogvae:", line, file=sys.stderr)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text)
    if not match:
        raise argparse.ArgumentTypeError(
            f"a size is HEIGHTxWIDTH, such as 96x144, got {shown(text)}"
        )
    return int(match[1]), int(match[2])


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,6}", text):
        raise argparse.ArgumentTypeError(
            f"expected a whole number of at least 1, got {shown(text)}: ten million are too many"
        )
    return int(text)


def _index(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(
            f"expected a whole number, 0 to 999999999, got {shown(text)}"
        )
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
        video.check_rate(rate)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"a frame rate is of 0.001 to 1000, got {shown(text)}"
        ) from error
    return rate


def _gibibytes(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,7}(\.[0-9]{1,9})?", text) or not float(text):
        raise argparse.ArgumentTypeError(
            f"expected gibibytes above 0, such as 16 or 0.5, got {shown(text)}"
        )
    return float(text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _note(f"error: {message}; see --help")
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("eqx_cogvae", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for run, about in (
        (_reconstruct, "encode and decode a clip, and say how near it comes"),
        (_encode, "a video to a latents file"),
        (_decode, "a latents file to a video"),
        (_info, "a model's configuration and size"),
    ):
        command = commands.add_parser(run.__name__[1:], help=about, description=about)
        command.set_defaults(run=run)
        if run is _info:
            command.add_argument("model", nargs="?", default="tiny", metavar="MODEL")
            command.add_argument("--dtype", choices=_DTYPES, help="default: as stored")
            command.add_argument("--size", nargs=2, metavar=("FRAMES", "HxW"), help="plan memory")
            command.add_argument(
                "--memory", type=_gibibytes, metavar="GIB", help="to fit the plan into"
            )
            continue
        _add_paths(command, run)
        command.add_argument("--model", default="tiny", help="directory or hub id; default: tiny")
        command.add_argument("--dtype", choices=_DTYPES, default="float32")
        command.add_argument("--fps", type=_rate, help="default: as the input has it")
        if run is _decode:
            command.add_argument("--layout", choices=("BTHWC", "BCTHW"), help="where not said")
        else:
            _add_clip(command, seeded=run is _reconstruct)
    add_commands(commands, _model, _note)
    return parser


def _add_paths(command: argparse.ArgumentParser, run: Callable) -> None:
    optional: dict[str, Any] = {"nargs": "?"} if run is _reconstruct else {}
    kind = "latents.safetensors" if run is _decode else "a video"
    default = "; default: a procedural clip" if optional else ""
    command.add_argument("input", type=Path, metavar="IN", help=kind + default, **optional)
    kind = "latents.safetensors" if run is _encode else "mp4, mov, mkv, or npy for raw floats"
    default = "; default: in out/" if optional else ""
    command.add_argument("output", type=Path, metavar="OUT", help=kind + default, **optional)


def _add_clip(command: argparse.ArgumentParser, *, seeded: bool) -> None:
    command.add_argument("--start", type=_index, default=0, help="first frame; default: 0")
    command.add_argument("--frames", type=_count, help="how many; default: all")
    command.add_argument("--size", type=_size, metavar="HxW", help="resize, cropping to the aspect")
    command.set_defaults(seed=None)
    if seeded:
        command.add_argument("--seed", type=_index, help="of the procedural clip; default: 0")
    command.add_argument(
        "--sample", type=_index, metavar="SEED", help="draw latents; default: mode"
    )
