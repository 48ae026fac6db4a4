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
    from .._checkpoint import tensor_names as tensor_names
    from ._adversarial import Adversarial as Adversarial, hinge as hinge
    from ._clip_loss import ClipLoss as ClipLoss
    from ._crops import Crops as Crops, Source as Source
    from ._discriminator import Discriminator as Discriminator
    from ._lora import (
        load_lora as load_lora,
        lora as lora,
        lora_only as lora_only,
        merge as merge,
        save_lora as save_lora,
    )
    from ._losses import gradient as gradient, kl as kl, l1 as l1, l2 as l2, temporal as temporal
    from ._remat import rematerialised as rematerialised
    from ._states import load_state as load_state, save_state as save_state
    from ._trainer import Trainer as Trainer, TrainState as TrainState, decoder_only as decoder_only
except ImportError as error:
    raise ImportError(
        f'training needs optax ({error}): pip install "eqx_cogvae[train]".'
    ) from error

__all__ = [
    "Adversarial",
    "ClipLoss",
    "Crops",
    "Discriminator",
    "Source",
    "TrainState",
    "Trainer",
    "decoder_only",
    "gradient",
    "hinge",
    "kl",
    "l1",
    "l2",
    "load_lora",
    "load_state",
    "lora",
    "lora_only",
    "merge",
    "rematerialised",
    "save_lora",
    "save_state",
    "temporal",
    "tensor_names",
]
