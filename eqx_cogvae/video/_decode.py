"""Opening video files and decoding their frames, damaged ones included."""

import contextlib
import itertools
import os
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

from .._files import check_regular
from ._av import local_name, pyav

Corrupt: TypeAlias = Literal["raise", "skip", "keep"]
"""Treatment of damaged frames: an error, left out, or kept as FFmpeg patched them."""


# FFmpeg goes by a file's content, whatever its name. Playlists are left out: they name other
# files. Of the audio formats, the reader is told that they hold no video.
_READABLE = {
    "format_whitelist": "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,obu,ivf,flv,ogg,asf,"
    "mxf,nut,rm,dv,gif,apng,yuv4mpegpipe,png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe,"
    "mp3,flac,wav,aac",
    "protocol_whitelist": "file",
}


# B-frames are decoded before frames that are shown earlier, by at most the 16 frames that H.264
# and HEVC may hold back; fields count twice.
REORDERED = 32


# Decoders that report a spoilt frame late or not at all. They give one frame for each packet, so
# the times show which frame is missing.
_UNRELIABLE = ("hevc", "av1", "libdav1d", "libaom-av1")


# Seconds by which a Matroska file may be shorter than it says.
_ROUNDING = 1


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[tuple[Any, Any]]:
    """Opens a file; gives the container and its first video stream that is no cover picture.

    **Raises:** `FileNotFoundError`, `IsADirectoryError`, `OSError` for a pipe or a device,
    `ValueError` for a file without video. FFmpeg's errors inside the block become `ValueError`.
    """
    av = pyav()
    check_regular(path)
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no video at {path}.")
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a directory, name a video in it.")
    try:
        with av.open(local_name(path), options=_READABLE, **_lenient(av)) as container:
            covers = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
            streams = [s for s in container.streams.video if not s.disposition & covers]
            if not streams:
                raise ValueError(
                    f"{path} has no video stream, or an empty one: choose another file."
                )
            if streams[0].codec_context is None:
                raise ValueError(
                    f"{path} is in a codec that this FFmpeg cannot decode: convert it to H.264."
                )
            yield container, streams[0]
    except av.error.EOFError as error:
        raise ValueError(f"{path} holds no frames, choose a video that has some.") from error
    except av.error.FFmpegError as error:
        raise ValueError(
            f"{path} is not a video that FFmpeg can read, or is truncated "
            f"({error.strerror}): check it in a player, or copy it again."
        ) from error


def _lenient(av: Any) -> dict[str, str]:
    """Returns options for titles in any encoding; PyAV 19 needs none."""
    return {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


def decoded(
    path: str | os.PathLike, container: Any, stream: Any, corrupt: Corrupt
) -> Iterator[Any]:
    """Decodes the frames of an open file, in the order in which they are shown.

    **Raises:** `ValueError` for a file without frames; with `corrupt="raise"` also for one that
    ends too early, and for the first frame that is damaged.
    """
    return iter(_Decoding(path, container, stream, corrupt))


class _Decoding:
    """One pass over a stream; counts packets and frames, so that an error can name a frame."""

    def __init__(self, path: str | os.PathLike, container: Any, stream: Any, corrupt: Corrupt):
        self._path, self._stream, self._corrupt = path, stream, corrupt
        self._format = container.format.name
        self._demuxed = container.demux(stream)
        self._is_unreliable = stream.codec_context.name in _UNRELIABLE
        self._error = pyav().error
        self._packets = self._discarded = self._frames = self._end = 0
        self._recent: deque[tuple[int, int]] = deque(maxlen=2 * REORDERED)
        self._marked: set[int] = set()
        self._due: set[int] = set()
        self._latest: int | None = None
        self._failure: str | None = None

    def __iter__(self) -> Iterator[Any]:
        for packet in self._read_packets():
            for frame in self._decode(packet):
                self._check_none_missing(frame.pts)
                damaged = frame.is_corrupt or frame.pts in self._marked
                if damaged and self._corrupt == "raise":
                    raise self._damage(self._frames, "a part of it is unreadable")
                if damaged and self._corrupt == "skip":
                    continue
                self._frames += 1
                yield frame
        if self._corrupt == "raise":
            self._check_end()
        if not self._frames:
            raise ValueError(f"{self._path} holds no frames, choose a video that has some.")

    def _read_packets(self) -> Iterator[Any]:
        """Yields the packets, and an empty one that makes the decoder give its last frames."""
        try:
            for packet in self._demuxed:
                self._note(packet)
                yield packet
        except self._error.FFmpegError as error:
            if self._corrupt == "raise":
                raise self._damage(self._packets, error.strerror) from error
            last = pyav().Packet()
            last.stream = self._stream
            yield last

    def _note(self, packet: Any) -> None:
        if not packet.size:
            return
        self._packets += 1
        self._discarded += packet.is_discard
        if packet.dts is None or packet.pts is None:
            return
        if self._recent and packet.dts < self._recent[-1][0]:
            # The clock starts over, and times before are not comparable with those after.
            self._recent.clear()
            self._due.clear()
            self._latest = None
        self._recent.append((packet.dts, packet.pts))
        self._end = max(self._end, packet.pts + (packet.duration or 0))
        # MPEG-TS marks the packet before a splice as incomplete, though nothing is missing.
        if packet.is_corrupt and self._format != "mpegts":
            self._marked.add(packet.pts)
        is_later = self._latest is None or packet.pts > self._latest
        if self._is_unreliable and is_later and not packet.is_discard:
            self._due.add(packet.pts)

    def _decode(self, packet: Any) -> list[Any]:
        # The last frames of all come with one empty packet, so an error among them is passed.
        for _ in range(1 if packet.size else REORDERED):
            try:
                return packet.decode()
            except self._error.EOFError:
                break
            except self._error.FFmpegError as error:
                self._failure = error.strerror
                if self._corrupt == "raise" and not self._is_unreliable:
                    raise self._damage(self._number(packet), error.strerror) from error
        return []

    def _number(self, packet: Any) -> int:
        """Returns the index of a packet's frame among the frames as they are shown."""
        if packet.pts is None or packet.dts is None:
            return max(self._frames, self._packets - 1)
        number = self._packets - self._discarded
        number -= sum(pts >= packet.pts for _, pts in self._recent)
        # Frames that are shown earlier may follow in the file.
        with contextlib.suppress(self._error.FFmpegError):
            for following in itertools.islice(self._demuxed, REORDERED):
                if following.dts is None or following.dts < packet.dts:
                    break
                number += following.pts is not None and following.pts < packet.pts
        return number

    def _check_none_missing(self, pts: int | None) -> None:
        """Raises where an unreliable decoder left out a frame that is due before this one."""
        if pts is None or not self._is_unreliable:
            return
        missing = {due for due in self._due if due < pts}
        # A file may begin in the middle of a recording, with frames that nothing can decode.
        cut = self._latest is None and self._failure is None
        self._due -= missing | {pts}
        self._latest = pts
        if missing and not cut and self._corrupt == "raise":
            raise self._damage(self._frames, self._failure)

    def _check_end(self) -> None:
        if self._packets < len(self._stream.index_entries):
            raise truncation(self._path, self._stream, self._packets)
        if self._due and self._is_unreliable:
            raise self._damage(self._frames, self._failure)
        # Matroska's index lists some frames only, but most files say how long each stream is.
        stated = self._stream.metadata.get("DURATION", "")
        if self._format.startswith("matroska") and re.fullmatch(r"\d+:\d\d:\d\d(\.\d+)?", stated):
            hours, minutes, seconds = stated.split(":")
            due = 3600 * int(hours) + 60 * int(minutes) + float(seconds)
            there = float(self._end * self._stream.time_base)
            if there + _ROUNDING < due:
                raise ValueError(
                    f"{self._path} is truncated: {there:.1f} of {due:.1f} seconds are there; copy "
                    "it again, or ask for a range of frames that it has."
                )

    def _damage(self, number: int, reason: str | None) -> ValueError:
        """Returns an error that names the frame, or says that the file ends too early."""
        there = complete(self._path, self._stream)
        if there < len(self._stream.index_entries):
            return truncation(self._path, self._stream, there)
        return ValueError(
            f"{self._path} is damaged at frame {number} ({reason or 'undecodable'}): copy it "
            "again, or pass `corrupt='skip'` to leave such frames out."
        )


def complete(path: str | os.PathLike, stream: Any) -> int:
    """Counts the entries of a file's index that lie within the file."""
    size = os.path.getsize(path)
    return sum(entry.pos + entry.size <= size for entry in stream.index_entries)


def truncation(path: str | os.PathLike, stream: Any, there: int) -> ValueError:
    """Returns the error for a file that holds fewer frames than its index lists."""
    return ValueError(
        f"{path} is truncated: {there} of {len(stream.index_entries)} frames are there; "
        "copy it again, or ask for a range of frames that it has."
    )


__all__ = ["REORDERED", "Corrupt", "complete", "decoded", "opened", "truncation"]
