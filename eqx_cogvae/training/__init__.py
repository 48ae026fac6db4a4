"""Training a VAE: losses, random crops, a step, and a state that outlives the process.

Needs `eqx_cogvae[train]`. A `Trainer` holds what stays the same, a `TrainState` what changes:

```python
trainer = training.Trainer(optax.adam(1e-4), loss=training.ClipLoss(l1=1.0, gradient=1.0))
state = trainer.init(vae)
for clips in crops.batches(int(state.step)):
    state, metrics = trainer.step(state, clips, key)
```
"""

try:
    from ._clip_loss import ClipLoss as ClipLoss
    from ._crops import Crops as Crops, Source as Source
    from ._losses import gradient as gradient, kl as kl, l1 as l1, l2 as l2, temporal as temporal
    from ._remat import rematerialised as rematerialised
    from ._states import load_state as load_state, save_state as save_state
    from ._trainer import Trainer as Trainer, TrainState as TrainState, decoder_only as decoder_only
except ImportError as error:
    raise ImportError(
        f'training needs optax ({error}): pip install "eqx_cogvae[train]".'
    ) from error

__all__ = [
    "ClipLoss",
    "Crops",
    "Source",
    "TrainState",
    "Trainer",
    "decoder_only",
    "gradient",
    "kl",
    "l1",
    "l2",
    "load_state",
    "rematerialised",
    "save_state",
    "temporal",
]
