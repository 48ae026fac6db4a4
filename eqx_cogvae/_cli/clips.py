"""The commands `reconstruct`, `encode` and `decode`, for one clip."""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np

import eqx_cogvae as cv

from .. import _latents, video
from .._files import Written, atomic, check_folder, check_writable
from .._frames import LATENT_BATCH, SAMPLE_BATCH, frame_batches
from ..dataset._decode import to_decode
from . import options
from .messages import note
from .passes import STRIP, Comparison, Padding, Stopwatch, progress, timed

_DEFAULT_FRAMES = 49
_DEFAULT_SIZE = (96, 144)
_DEFAULT_FPS = 8.0
_RAW = ".npy"

_clip_options = options.added(
    options.model(),
    click.option("--start", type=options.INDEX, default=0, help="First frame; default: 0."),
    click.option("--frames", type=options.COUNT, help="Default: all."),
    options.size(),
    click.option(
        "--sample", type=options.INDEX, metavar="SEED", help="Draw latents; default: mode."
    ),
)


@click.command(cls=options.Command, short_help="Encode and decode a clip, and compare.")
@options.path("input", "[IN]", required=False)
@options.path("output", "[OUT]", required=False)
@_clip_options
@options.first()
@click.option("--seed", type=options.INDEX, help="Of the procedural clip; default: 0.")
def reconstruct(**given: Any) -> None:
    """Encode and decode a clip, and say how near it comes.

    IN is a video; without it, a procedural clip is made. OUT is mp4, mov, mkv, or npy for raw
    floats; without it, the result goes into out/.
    """
    chosen = _chosen(given)
    output = _output(chosen.output, chosen.input)
    strip = output.with_suffix(".png")
    check_writable(strip)
    vae = _model(chosen, chosen.input)
    clip = _clip(chosen, vae.config)
    encoding, decoding = Stopwatch(), Stopwatch()
    latents, count, _ = _encoded(vae, clip, chosen.sample, encoding)
    compared = Comparison(clip.pieces(), count)
    decoded = _decoded(vae, latents, count, chosen.first, decoding)
    write(output, compared.watch(decoded), chosen.fps or clip.fps)
    video.filmstrip(*compared.rows(), n=STRIP, path=strip)
    print(f"{count} frames of {clip.height}x{clip.width} from {clip.name}, reconstructed: {output}")
    print(f"film strip, original above reconstruction: {strip}")
    print(f"PSNR {compared.psnr():.2f} dB, before the file's own compression")
    _print_costs(encode=encoding, decode=decoding)


@click.command(cls=options.Command, short_help="Encode a video into a latents file.")
@options.path("input", "IN")
@options.path("output", "OUT")
@_clip_options
def encode(**given: Any) -> None:
    """Encode a video, IN, into a latents file, OUT.safetensors."""
    chosen = _chosen(given | {"seed": None})
    output = _checked(chosen.output, (".safetensors",))
    vae = _model(chosen, chosen.input)
    clip = _clip(chosen, vae.config)
    watch = Stopwatch()
    latents, count, padded = _encoded(vae, clip, chosen.sample, watch)
    record = _latents.Latents(
        latents,
        scaling_factor=vae.config.scaling_factor,
        invert_scale_latents=vae.config.invert_scale_latents,
        fps=chosen.fps or clip.fps,
        height=clip.height,
        width=clip.width,
        frames=count,
        padded=padded,
        fingerprint=_latents.fingerprint(vae),
    )
    _latents.save_latents(output, record)
    print(f"{count} frames of {clip.height}x{clip.width} to latents {latents.shape}: {output}")
    _print_costs(encode=watch)


@click.command(cls=options.Command, short_help="Decode a latents file into a video.")
@options.path("input", "IN")
@options.path("output", "OUT")
@options.model()
@options.layout()
@options.first()
def decode(**given: Any) -> None:
    """Decode a latents file, IN.safetensors, into a video, OUT.

    OUT is mp4, mov, mkv, or npy for raw floats.
    """
    chosen = SimpleNamespace(**given)
    output = _checked(chosen.output, (*video.CONTAINERS, _RAW))
    if not chosen.input.is_file():
        _latents.load_latents(chosen.input)
    vae = _model(chosen)
    channels = vae.config.latent_channels
    record = _latents.load_latents(chosen.input, channels=channels, layout=chosen.layout)
    if len(record.array) != 1:
        raise ValueError(f"{chosen.input} holds {len(record.array)} clips, expected one.")
    fps = chosen.fps or record.fps or _DEFAULT_FPS
    if output.suffix != _RAW:
        video.check_rate(fps)
    mine = _latents.fingerprint(vae)
    if record.fingerprint not in (None, mine):
        note(
            f"warning: these latents were encoded by model {record.fingerprint}, "
            f"and {chosen.model} is {mine}"
        )
    array, count = to_decode(vae, record, chosen.first)
    watch = Stopwatch()
    decoded = _decoded(vae, np.asarray(array), count, chosen.first, watch)
    write(output, decoded, fps)
    print(f"latents {array.shape} to {count} frames: {output}")
    _print_costs(decode=watch)


@dataclasses.dataclass(frozen=True)
class _Clip:
    """A clip that can be read more than once; `frames` is None where only reading it tells."""

    name: str
    pieces: Callable[[], Iterator[Any]]
    fps: float
    frames: int | None
    height: int
    width: int


def _chosen(given: dict[str, Any]) -> SimpleNamespace:
    sizes = options.chosen_sizes(given["size"], given.pop("height"), given.pop("width"))
    return SimpleNamespace(**given | {"size": sizes[0] if sizes else None})


def _clip(chosen: SimpleNamespace, config: cv.Config) -> _Clip:
    cell = config.spatial_compression
    if chosen.size and any(side % cell for side in chosen.size):
        near = "x".join(str(max(cell, round(side / cell) * cell)) for side in chosen.size)
        raise ValueError(f"--size must be in multiples of {cell}, such as {near}.")
    if chosen.input is None:
        return _procedural(chosen)
    found = video.info(chosen.input)
    size = chosen.size or (found.height // cell * cell, found.width // cell * cell)
    if not min(size):
        raise ValueError(
            f"{chosen.input} is {found.height}x{found.width}, the model needs {cell}x{cell}: "
            f"enlarge it with --size."
        )
    if not chosen.size and size != (found.height, found.width):
        note(f"resized to {size[0]}x{size[1]}, which are multiples of {cell}")
    frames = chosen.frames or (None if chosen.fps else max(found.frames - chosen.start, 1))
    return _Clip(
        str(chosen.input),
        lambda: video.frames(chosen.input, batch=SAMPLE_BATCH, size=size, **_range(chosen)),
        chosen.fps or found.fps,
        frames,
        *size,
    )


def _procedural(chosen: SimpleNamespace) -> _Clip:
    frames, size = chosen.frames or _DEFAULT_FRAMES, chosen.size or _DEFAULT_SIZE
    array = video.procedural_clip(frames, *size, seed=chosen.seed or 0)
    cuts = range(SAMPLE_BATCH + 1, frames, SAMPLE_BATCH)
    return _Clip(
        "the procedural clip",
        lambda: iter(np.split(array, cuts, axis=1)),
        chosen.fps or _DEFAULT_FPS,
        frames,
        *size,
    )


def _range(chosen: SimpleNamespace) -> dict[str, Any]:
    return {"start": chosen.start, "frames": chosen.frames, "fps": chosen.fps}


def _encoded(
    vae: cv.VAE, clip: _Clip, sample: int | None, watch: Stopwatch
) -> tuple[np.ndarray, int, int]:
    """Returns the clip's latents, its frame count, and the count it was padded to."""
    padding = Padding()
    batches = clip.frames and len(frame_batches(clip.frames, SAMPLE_BATCH))
    stream = cv.streamed(vae.encode_step, SAMPLE_BATCH)(padding.pad(clip.pieces()))
    moments = np.concatenate(list(progress(timed(stream, watch), "encode", batches)), axis=1)
    if padding.padded != padding.count:
        note(
            f"warning: {padding.count} frames do not round-trip; the last was repeated "
            f"up to {padding.padded} (8k + 1), which decoding undoes"
        )
    posterior = cv.DiagonalGaussian.from_moments(jnp.asarray(moments))
    latents = posterior.mode() if sample is None else posterior.sample(jax.random.key(sample))
    return np.asarray(latents), padding.count, padding.padded


def _decoded(
    vae: cv.VAE, latents: np.ndarray, count: int, first: int | None, watch: Stopwatch
) -> Iterator[np.ndarray]:
    """Yields frame batches, and stops at `count` frames.

    **Raises:** `ValueError` for latents, or frames, that are not finite.
    """
    _latents.check_latents(latents)
    batches = len(frame_batches(latents.shape[1], LATENT_BATCH, first))
    stream = cv.streamed(vae.decode_step, LATENT_BATCH, first=first)(latents)
    done = 0
    for result in progress(timed(stream, watch), "decode", batches):
        if not np.isfinite(result.astype(np.float32)).all():
            raise ValueError(
                f"the latents decode to NaN or infinite values from frame {done} on: use --dtype "
                "float32 or bfloat16, and look to what made them."
            )
        yield result[:, : count - done]
        done += result.shape[1]
        if done >= count:
            return


def write(output: Path, pieces: Iterator[np.ndarray], fps: float) -> None:
    """Writes a clip as a video, or as the raw floats of a `.npy`."""
    if output.suffix != _RAW:
        video.write(output, pieces, fps=fps)
        return
    with atomic(output) as partial, Written(partial) as file:
        np.save(file, np.concatenate([piece.astype(np.float32) for piece in pieces], axis=1))


def _model(chosen: SimpleNamespace, source: Path | None = None) -> cv.VAE:
    """Returns the model; complains of the source first, as models take long to load."""
    if source is not None:
        _check_source(chosen, source)
    elif getattr(chosen, "start", 0):
        raise ValueError("--start is of a video, the procedural clip has none.")
    return cv.from_pretrained(chosen.model, dtype=jnp.dtype(chosen.dtype))


def _check_source(chosen: SimpleNamespace, source: Path) -> None:
    """Raises `ValueError` for what is wrong with a video, or with the frames asked of it."""
    if chosen.seed is not None:
        raise ValueError("--seed is of the procedural clip, leave it out with a video.")
    found = video.info(source)
    rate = chosen.fps or found.fps
    if rate > found.fps * 1.01:
        note(
            f"warning: {source} has {found.fps:g} frames a second, fewer than --fps {rate:g}: "
            "frames are repeated"
        )
    # The count of the new rate is known to a frame or two; the container's own may be wrong.
    expected = found.frames if chosen.fps is None else found.frames * rate / found.fps - 2
    if chosen.start + (chosen.frames or 1) > expected:
        for _ in video.frames(source, size=(8, 8), **_range(chosen)):
            pass


def _output(output: Path | None, source: Path | None) -> Path:
    if output is None:
        check_folder(folder := Path("out"))
        folder.mkdir(exist_ok=True)
        output = folder / f"{source.stem if source else 'procedural'}.mp4"
    if source and source.exists() and output.exists() and output.samefile(source):
        raise ValueError(f"{output} is the video that is read: name another file.")
    return _checked(output, (*video.CONTAINERS, _RAW))


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


__all__ = ["decode", "encode", "reconstruct", "write"]
