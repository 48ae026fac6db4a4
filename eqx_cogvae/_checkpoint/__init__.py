"""Checkpoints: reading, writing, names of tensors, and the one place where layouts change."""

from .checkpoint import (
    from_original as from_original,
    from_pretrained as from_pretrained,
    save_pretrained as save_pretrained,
    stored_leaves as stored_leaves,
    tensor_names as tensor_names,
)
