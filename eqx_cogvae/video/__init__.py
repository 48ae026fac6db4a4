"""Video files, film strips and PSNR. Reading and writing need `eqx_cogvae[video]`."""

from ._av import Frames as Frames, check_installed as check_installed, check_rate as check_rate
from ._procedural import procedural_clip as procedural_clip
from ._psnr import psnr as psnr
from ._read import (
    Info as Info,
    frames as frames,
    info as info,
    pictures as pictures,
    read as read,
)
from ._show import Player as Player, filmstrip as filmstrip, show as show
from ._write import CONTAINERS as CONTAINERS, write as write

__all__ = [
    "CONTAINERS",
    "Frames",
    "Info",
    "Player",
    "filmstrip",
    "frames",
    "info",
    "pictures",
    "procedural_clip",
    "psnr",
    "read",
    "show",
    "write",
]
