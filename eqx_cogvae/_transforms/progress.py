"""A progress bar on stderr."""

from typing import Any


class _Hidden:
    def update(self, n: int = 1) -> None:
        del n

    def close(self) -> None:
        pass


def progress_bar(total: int | None, unit: str, *, show: bool) -> Any:
    """Something with `update(n)` and `close()`; shown by tqdm, which huggingface_hub brings."""
    if not show:
        return _Hidden()
    from tqdm import tqdm

    return tqdm(total=total, unit=unit)


__all__ = ["progress_bar"]
