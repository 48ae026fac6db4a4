"""Frames as a player shows them: orientation, pixel shapes, clocks, and HDR."""

import itertools
import math
import struct
import warnings
from fractions import Fraction

import av
import numpy as np
import pytest

from eqx_cogvae import video

ONE = 1 << 16
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
CORNERS = np.array([[RED, GREEN], [BLUE, WHITE]], np.uint8)


def encode(path, frames, *, matrix=None, aspect=None, times=None, codec="libx264", **options):
    """Frames at 8 a second, or shown at `times`, in eighths of a second."""
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.options = {"crf": "4", "bf": "0"} if codec == "libx264" else {}
        if matrix:
            stream.set_display_matrix(matrix)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            frame.pts, frame.time_base = times[i] if times else i, Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def corners(height=32, width=48):
    return np.kron(CORNERS, np.ones((height // 2, width // 2, 1), np.uint8))


def corners_of(frame):
    """The colours in the middle of the four quarters."""
    h, w = frame.shape[:2]
    return frame[h // 4 :: h // 2, w // 4 :: w // 2]


ORIENTATIONS = [
    (a, b, c, d)
    for a, b, c, d in itertools.product((-1, 0, 1), repeat=4)
    if abs(a * d - b * c) == 1 and abs(a) + abs(b) == 1 and abs(c) + abs(d) == 1
]


def moved(pixels, a, b, c, d):
    """By the definition: the pixel at (x, y) goes to (a x + c y, b x + d y)."""
    y, x = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
    to_x, to_y = a * x + c * y, b * x + d * y
    to_x, to_y = to_x - to_x.min(), to_y - to_y.min()
    result = np.empty((to_y.max() + 1, to_x.max() + 1, 3), pixels.dtype)
    result[to_y, to_x] = pixels
    return result


def test_there_are_eight_orientations():
    assert len(ORIENTATIONS) == len(set(ORIENTATIONS)) == 8


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("matrix", ORIENTATIONS)
def test_the_whole_display_matrix_is_applied(matrix, suffix, tmp_path):
    a, b, c, d = (ONE * value for value in matrix)
    path = tmp_path / f"a.{suffix}"
    encode(path, [corners()] * 2, matrix=(a, b, 0, c, d, 0, 0, 0, 1 << 30))
    due = moved(corners(), *matrix)
    clip = video.read(path)
    assert clip.shape == (1, 2, *due.shape)
    np.testing.assert_allclose((corners_of(clip[0, 0]) + 1) * 127.5, corners_of(due), atol=12)
    found = video.info(path)
    assert (found.height, found.width) == due.shape[:2]


def test_a_matrix_in_between_is_the_nearest_orientation(tmp_path):
    cos, sin = (round(ONE * f(math.radians(80))) for f in (math.cos, math.sin))
    matrix = (cos, sin, 0, -sin, cos, 0, 0, 0, 1 << 30)
    path = encode(tmp_path / "a.mp4", [corners()], matrix=matrix)
    due = corners_of(moved(corners(), 0, 1, -1, 0))
    np.testing.assert_allclose((corners_of(video.read(path)[0, 0]) + 1) * 127.5, due, atol=12)


EXIF = {1: (1, 0, 0, 1), 2: (-1, 0, 0, 1), 3: (-1, 0, 0, -1), 5: (0, 1, 1, 0), 6: (0, 1, -1, 0)}


@pytest.mark.parametrize("orientation", EXIF)
def test_the_orientation_of_a_photograph(orientation, tmp_path):
    """Exif's 2 mirrors, 5 transposes, 6 turns by a quarter clockwise."""
    path = encode(tmp_path / "a.jpg", [corners()], codec="mjpeg", format="image2")
    data = path.read_bytes()
    entry = struct.pack("<HHIHH", 0x112, 3, 1, orientation, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    path.write_bytes(data[:2] + segment + data[2:])
    due = moved(corners(), *EXIF[orientation])
    clip = video.read(path)
    assert clip.shape[2:] == due.shape
    np.testing.assert_allclose((corners_of(clip[0, 0]) + 1) * 127.5, corners_of(due), atol=40)


def disc(height, width, aspect, radius):
    """White and round where pixels are `aspect` times as wide as high, about the centre."""
    y, x = np.mgrid[:height, :width] + 0.5
    inside = ((x - width / 2) * aspect) ** 2 + (y - height / 2) ** 2 < radius**2
    return np.repeat(np.where(inside, 255, 0)[..., None], 3, axis=-1).astype(np.uint8)


def extents(frame):
    """Height and width in pixels of what is bright."""
    bright = frame.mean(-1) > 0
    return np.count_nonzero(bright.any(1)), np.count_nonzero(bright.any(0))


@pytest.mark.parametrize(
    ("suffix", "turned"),
    [("mp4", False), ("mp4", True), ("mkv", False), ("ts", False), ("avi", False)],
)
@pytest.mark.parametrize(
    ("aspect", "shown"),
    [
        (Fraction(2), (64, 128)),
        (Fraction(1, 2), (128, 64)),
        (Fraction(16, 15), (64, 68)),
        (Fraction(8, 9), (72, 64)),
    ],
)
def test_round_objects_stay_round(aspect, shown, suffix, turned, tmp_path):
    path = tmp_path / f"a.{suffix}"
    radius = 20 * min(1, aspect)
    frames = [disc(64, 64, float(aspect), radius)] * 2
    quarter = (0, ONE, 0, -ONE, 0, 0, 0, 0, 1 << 30) if turned else None
    codec = "mpeg4" if suffix == "avi" else "libx264"
    encode(path, frames, aspect=aspect, matrix=quarter, codec=codec)
    shown = shown[::-1] if turned else shown
    found = video.info(path)
    assert (found.height, found.width) == shown
    clip = video.read(path)
    assert clip.shape[2:4] == shown
    high, wide = extents(clip[0, 0])
    assert high == pytest.approx(wide, abs=2)
    # Scaled alike in both directions, whatever the size, and cropped about the centre.
    for size in ((64, 64), (40, 80), (96, 48)):
        high, wide = extents(video.read(path, size=size)[0, 0])
        scale = max(size[0] / shown[0], size[1] / shown[1])
        due = 2 * radius * scale * max(1, 1 / aspect)
        assert min(size[0], due) == pytest.approx(high, abs=3)
        assert min(size[1], due) == pytest.approx(wide, abs=3)


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((2, 0, 0, 1), (32, 96)),
        ((1, 0, 0, 2), (64, 48)),
        ((0, 2, -1, 0), (96, 32)),
        ((0, -1, 2, 0), (48, 64)),
        ((0, 1, 1, 0), (48, 32)),
    ],
)
def test_a_matrix_that_stretches(matrix, shown, tmp_path):
    a, b, c, d = (ONE * value for value in matrix)
    path = encode(tmp_path / "a.mp4", [corners()], matrix=(a, b, 0, c, d, 0, 0, 0, 1 << 30))
    found = video.info(path)
    assert (found.height, found.width) == video.read(path).shape[2:4] == shown


def test_pixels_too_oblong(tmp_path):
    path = encode(tmp_path / "a.mp4", [corners(64, 512)], aspect=Fraction(40))
    for read in (video.read, video.info):
        with pytest.raises(ValueError, match=r"a\.mp4 has pixels of 40:1, .* 64x20480: write"):
            read(path)
    assert video.read(path, size=(32, 32)).shape == (1, 1, 32, 32, 3)


def greys(count, first=0):
    """Frame i has level 20 + 12 i."""
    return [np.full((32, 32, 3), 20 + 12 * (first + i), np.uint8) for i in range(count)]


def numbers(clip):
    return np.rint(((clip[0].mean((1, 2, 3)) + 1) * 127.5 - 20) / 12).astype(int).tolist()


def joined(tmp_path, parts):
    """MPEG-TS files one after the other; each starts its clock at its own time."""
    data = b""
    for i, (frames, begin) in enumerate(parts):
        path = tmp_path / f"part{i}.ts"
        times = range(begin, begin + len(frames))
        data += encode(path, frames, times=times).read_bytes()
    (tmp_path / "a.ts").write_bytes(data)
    return tmp_path / "a.ts"


@pytest.mark.parametrize("begins", [(0, 0, 0), (0, 4, 2), (800, 0, 0), (0, 0, 8000)])
def test_joined_files_go_on_after_the_clock_jumps(begins, tmp_path):
    """Back to zero, back a little, and ahead by a quarter of an hour."""
    parts = [(greys(6, 6 * i), begin) for i, begin in enumerate(begins)]
    path = joined(tmp_path, parts)
    assert numbers(video.read(path)) == list(range(18))
    assert numbers(video.read(path, fps=8)) == list(range(18))
    assert numbers(video.read(path, fps=4)) == list(range(0, 18, 2))
    assert numbers(video.read(path, fps=8, start=5, frames=9)) == list(range(5, 14))
    assert video.info(path).frames == 18
    with pytest.raises(ValueError, match=r"a\.ts holds 9 frames at 4 frames a second, asked for"):
        video.read(path, fps=4, frames=10)


def test_a_frame_is_held_through_a_pause(tmp_path):
    """A pause of a minute is no jump of the clock where files are not joined."""
    path = encode(tmp_path / "a.mkv", greys(4), times=[0, 1, 481, 482])
    assert numbers(video.read(path, fps=1)) == [0] + [1] * 30 + [2] * 30


def test_a_clock_that_leaps_by_years_ends(tmp_path):
    path = encode(tmp_path / "a.mkv", greys(4), times=[0, 1, 2**30, 2**30 + 1])
    assert numbers(video.read(path, fps=8)) == [0, 1, 2, 3]


def test_frames_that_an_edit_list_cuts_are_not_there(tmp_path):
    """The first three frames are in the file, for those after them to be decoded."""
    path = encode(tmp_path / "a.mp4", greys(12))
    with av.open(str(path)) as container:
        frame = int(Fraction(1, 8) / container.streams.video[0].time_base)
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 12
    duration, begin = struct.unpack(">Ii", data[at : at + 8])
    data[at : at + 8] = struct.pack(">Ii", duration * 9 // 12, begin + 3 * frame)
    path.write_bytes(data)
    assert video.info(path).frames == 9
    assert numbers(video.read(path)) == numbers(video.read(path, frames=9)) == list(range(3, 12))
    assert numbers(video.read(path, fps=4)) == [3, 5, 7, 9, 11]
    with pytest.raises(ValueError, match="holds 9 frames, asked for frames 0 to 9"):
        video.read(path, frames=10)


# HDR. The oracle is the formulas of BT.2100 the other way, from light to signal, in float64.


def pq_signal(light):
    """Signal of light in cd/m2."""
    y = (light / 10_000) ** (2610 / 16384)
    a, b, c = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
    return ((a + b * y) / (1 + c * y)) ** (2523 / 4096 * 128)


def hlg_signal(light):
    """Signal of light in cd/m2 on a display of 1000, grey only: the luminance is the value."""
    scene = (light / 1000) ** (1 / 1.2)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    low = np.sqrt(3 * scene)
    return np.where(scene <= 1 / 12, low, a * np.log(np.maximum(12 * scene, 1) - b) + c)


def encode_hdr(path, signal, transfer, matrix=9):
    """A frame of RGB signals, (h, w, 3) in [0, 1], by the matrix of BT.2020, in 10 bits."""
    red, green, blue = np.moveaxis(signal, -1, 0)
    luma = 0.2627 * red + 0.6780 * green + 0.0593 * blue
    planes = [64 + 876 * luma]
    planes += [512 + 896 * (blue - luma) / 1.8814, 512 + 896 * (red - luma) / 1.4746]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width = signal.shape[:2]
        stream.pix_fmt, stream.options = "yuv444p10le", {"qp": "0"}
        context = stream.codec_context
        context.color_primaries, context.colorspace = 9, matrix
        context.color_trc, context.color_range = transfer, 1
        frame = av.VideoFrame(*signal.shape[1::-1], "yuv444p10le")
        for plane, values in zip(frame.planes, planes, strict=True):
            rows = np.zeros((signal.shape[0], plane.line_size // 2), "<u2")
            rows[:, : signal.shape[1]] = np.rint(values)
            plane.update(rows.tobytes())
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


NITS = np.array([0, 2, 20, 50, 100, 150, 203, 203, 400, 1000, 203, 10])


def blocks(values):
    """A 64x48 picture of 4 x 3 flat blocks."""
    return np.kron(np.reshape(values, (4, 3, -1)), np.ones((16, 16, 1)))


def block_values(frame):
    return frame[8::16, 8::16].reshape(12, 3)


@pytest.mark.parametrize(
    ("transfer", "signal", "name"), [(16, pq_signal, "PQ"), (18, hlg_signal, "HLG")]
)
def test_hdr_is_tone_mapped(transfer, signal, name, tmp_path):
    """Grey of so much light: at and above 203 cd/m2 it is white, below it keeps its light."""
    path = encode_hdr(tmp_path / "a.mp4", blocks(np.repeat(signal(NITS)[:, None], 3, 1)), transfer)
    with pytest.warns(UserWarning, match=rf"a\.mp4 is HDR \({name}, .* 203 cd/m2 becomes 1"):
        clip = video.read(path)
    light = ((block_values(clip[0, 0]) + 1) / 2) ** 2.4 * 203
    due = np.minimum(NITS, 203)
    np.testing.assert_allclose(light, np.repeat(due[:, None], 3, 1), rtol=0.04, atol=0.5)
    with pytest.warns(UserWarning, match="HDR"):
        pixels = next(video.pictures(path))
    np.testing.assert_array_equal(np.rint((clip[0, 0] + 1) * 127.5), pixels)


@pytest.mark.parametrize("matrix", [9, 2])
def test_hdr_colours_are_those_of_bt709(matrix, tmp_path):
    """Colours inside BT.709, given as such: the primaries' chromaticities give the conversion.

    The matrix of luma and chroma is that of BT.2020, named in the file or not.
    """

    def to_xyz(primaries):
        x, y = np.array([*primaries, (0.3127, 0.3290)]).T
        xyz = np.stack([x / y, np.ones(4), (1 - x - y) / y])
        return xyz[:, :3] * np.linalg.solve(xyz[:, :3], xyz[:, 3])

    narrow = to_xyz([(0.640, 0.330), (0.300, 0.600), (0.150, 0.060)])
    wide = to_xyz([(0.708, 0.292), (0.170, 0.797), (0.131, 0.046)])
    colours = np.random.default_rng(0).uniform(0.1, 1, (12, 3))
    light = colours @ (np.linalg.inv(wide) @ narrow).T
    path = encode_hdr(tmp_path / "a.mp4", blocks(pq_signal(203 * light)), 16, matrix)
    with pytest.warns(UserWarning, match="HDR"):
        clip = video.read(path)
    shown = ((block_values(clip[0, 0]) + 1) / 2) ** 2.4
    np.testing.assert_allclose(shown, colours, rtol=0.05, atol=0.01)


def test_ten_bits_alone_are_no_hdr(tmp_path):
    path = encode_hdr(tmp_path / "a.mp4", blocks(np.full((12, 3), 0.5)), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(video.read(path), 0, atol=0.01)
