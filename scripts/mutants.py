"""Asks whether the tests notice: small wrong edits of the package, one at a time, in a copy.

    python scripts/mutants.py                        # all of them
    python scripts/mutants.py --only ramp halo       # those whose names hold one of the words
    python scripts/mutants.py --list                 # only looks whether each edit still applies

Each edit names the tests that must fail with it. The exit code is 1 where an edit survives, and 2
where an edit's old text is not in its file exactly once, so that it has to be written anew.
"""

import argparse
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("eqx_cogvae", "tests", "pyproject.toml", "README.md", "scripts")
SECONDS = 900
_DEVICES = "--xla_force_host_platform_device_count=8"
EIGHT = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}"}


class Mutant(NamedTuple):
    """An edit: in `file`, `old` becomes `new`; `tests -k only` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    only: str


_FRAMEWISE = "_transforms/framewise.py"
_STREAMED = "_transforms/streamed.py"
_TILED = "_transforms/tiled.py"
_SHARDED = "_transforms/sharded.py"
MUTANTS = (
    # Layers and their lowering, the network.
    Mutant(
        "means of single frames have no derivative",
        "_lowering/affine.py",
        "change = change - affine_tangent.mean",
        "change = change",
        "test_lowering",
        "derivatives_of_an_affine_map",
    ),
    Mutant(
        "a device's share is the whole",
        "_lowering/choose.py",
        "max(math.prod(shape) // hints.split.devices, 1)",
        "math.prod(shape)",
        "test_lowering",
        "a_devices_share_decides",
    ),
    Mutant(
        "parts reach beyond their neighbours",
        "_lowering/choose.py",
        "part >= max(reach)",
        "part >= 0",
        "test_lowering",
        "parts",
    ),
    Mutant(
        "a part gets the rows of the wrong neighbour",
        "_lowering/parts.py",
        "_shifted(last, 1, axis), _shifted(first, -1, axis)",
        "_shifted(last, -1, axis), _shifted(first, 1, axis)",
        "test_lowering",
        "parts",
    ),
    Mutant(
        "two parts see themselves beyond the edge",
        "_lowering/parts.py",
        "jnp.where(leads, 0, other), jnp.where(leads, other, 0)",
        "other, other",
        "test_lowering",
        "parts",
    ),
    Mutant(
        "columns are exchanged without the corners",
        "_lowering/parts.py",
        "corners(before), pixels(2, start, count)",
        "0 * corners(before), pixels(2, start, count)",
        "test_lowering",
        "parts",
    ),
    Mutant(
        "convolutions leave the exchange to XLA",
        "_lowering/parts.py",
        "parts.number == 1",
        "True",
        "eight_devices",
        "exchange_their_edges",
    ),
    Mutant(
        "the frames after the first forget it",
        "_lowering/chunked.py",
        "._replace(cache=cache)",
        "",
        "test_lowering",
        "chunks",
    ),
    Mutant(
        "the first frame counts as much as all others",
        "_lowering/moments.py",
        "axis=0, weights=counts",
        "axis=0",
        "test_lowering",
        "moments_of_large_arrays",
    ),
    Mutant(
        "a band of resized frames is read without the row above",
        "_lowering/resized.py",
        "i * (height * stride) - reach[0]",
        "i * (height * stride)",
        "test_lowering",
        "resizing_in_chunks",
    ),
    Mutant(
        "an inner split forgets the outer one",
        "_meshes.py",
        "Split(*map(max, self, other))",
        "other",
        "test_lowering",
        "a_devices_share_decides",
    ),
    Mutant(
        "doubled pixels are one row and column late",
        "_lowering/tpu.py",
        "(above + 1, below + 1)",
        "(above + 2, below)",
        "test_lowering",
        "doubling_lowerings",
    ),
    Mutant(
        "a cache is one frame late",
        "_lowering/conv.py",
        "x[:, -past:] if past",
        "x[:, -past - 1 : -1] if past",
        "test_lowering",
        "the_cache_is_the_last_frames",
    ),
    Mutant(
        "the last frame stands in for those before the first",
        "_lowering/conv.py",
        "jnp.repeat(x[:, :1], past, axis=1)",
        "jnp.repeat(x[:, -1:], past, axis=1)",
        "test_layers",
        "sees_no_later_frame",
    ),
    Mutant(
        "an odd side loses its last pixel to Winograd",
        "_lowering/winograd.py",
        "(above, below + h % 2), (left, right + w % 2)",
        "(above + h % 2, below), (left, right + w % 2)",
        "test_lowering",
        "fewer_multiplications",
    ),
    Mutant(
        "a loop over frames begins with zeros",
        "_lowering/loops.py",
        "before = jnp.repeat(last.pop(0), past, axis=1)",
        "before = 0 * jnp.repeat(last.pop(0), past, axis=1)",
        "test_lowering",
        "chunks_are_the_whole",
    ),
    Mutant(
        "scale and shift are swapped",
        "_layers.py",
        "scale, shift = self.conv_y(latents)[0], self.conv_b(latents)[0]",
        "shift, scale = self.conv_y(latents)[0], self.conv_b(latents)[0]",
        "test_layers",
        "test_spatial_norm",
    ),
    Mutant(
        "below the last band is what was in memory",
        "_lowering/loops.py",
        "put(lax.empty(shape, dtype), below, 0, seen, 0)",
        "lax.empty(shape, dtype)",
        "test_lowering",
        "chunk or band",
    ),
    Mutant(
        "moments are of the first frame alone",
        "_lowering/moments.py",
        "jnp.mean(jnp.mean(x, axis=width",
        "jnp.mean(jnp.mean(x[:, :1], axis=width",
        "test_layers",
        "group_norm_is_as_exact",
    ),
    Mutant(
        "the means of parts do not add to the variance",
        "_lowering/moments.py",
        "variances + jnp.square(means - mean)",
        "variances",
        "test_layers",
        "group_norm_is_as_exact",
    ),
    Mutant(
        "moments are exchanged one after the other",
        "_lowering/moments.py",
        "parts != (1, 1)",
        "False",
        "eight_devices",
        "moments_of_all_devices",
    ),
    Mutant(
        "the first of an odd number of frames is no exception",
        "_layers.py",
        "odd = x.shape[1] % 2\n",
        "odd = 0 * x.shape[1]\n",
        "test_layers",
        "test_resampling",
    ),
    Mutant(
        "zeros are added before a picture, not behind it",
        "_layers.py",
        "pads=((0, 1), (0, 1))",
        "pads=((1, 0), (1, 0))",
        "test_layers",
        "test_resampling",
    ),
    Mutant(
        "the caches of a block are swapped",
        "_resnet.py",
        "ResnetCache(cache1, cache2)\n",
        "ResnetCache(cache2, cache1)\n",
        "test_autoencoder",
        "frame_counts_agree and 17",
    ),
    Mutant(
        "latents are unscaled twice as far",
        "_autoencoder.py",
        "scaled = latents / self._factor(",
        "scaled = latents * self._factor(",
        "test_autoencoder",
        "scaling_of_latents",
    ),
    Mutant(
        "the shift of latents is left out",
        "_autoencoder.py",
        "(config.shift_factor or 0.0)",
        "0.0 * (config.shift_factor or 0.0)",
        "test_autoencoder",
        "scaling_of_latents",
    ),
    Mutant(
        "a video with NaN is encoded",
        "_checks.py",
        "if not np.isfinite(largest):",
        "if largest == -1:",
        "test_autoencoder",
        "video_with_nan",
    ),
    # Batches of frames.
    Mutant(
        "a batch's cache is lost",
        _FRAMEWISE,
        "result, cache = jitted_step(",
        "result, _ = jitted_step(",
        "test_transforms",
        "framewise_is_the_whole_clip",
    ),
    Mutant(
        "a scan's cache is one batch late",
        _FRAMEWISE,
        "                result, cache = self._step(frames, cache)\n",
        "                result, _ = self._step(frames, cache)\n",
        "test_transforms",
        "framewise_is_the_whole_clip",
    ),
    Mutant(
        "the batches of a scan come back in reverse",
        _FRAMEWISE,
        "lax.scan(body, cache, jnp.moveaxis(batches, 1, 0))",
        "lax.scan(body, cache, jnp.moveaxis(batches, 1, 0), reverse=True)",
        "test_transforms",
        "framewise_is_the_whole_clip",
    ),
    Mutant(
        "the last batch takes the remainder",
        "_frames.py",
        "(size + t % size,) + (size,) * (t // size - 1)",
        "(size,) * (t // size - 1) + (size + t % size,)",
        "test_transforms",
        "steady_batches_share",
    ),
    Mutant(
        "frames are padded to 8k",
        "_frames.py",
        "missing = (1 - t) % SAMPLE_BATCH",
        "missing = -t % SAMPLE_BATCH",
        "test_autoencoder",
        "padding_is_undone",
    ),
    Mutant(
        "frames are padded by the first",
        "_frames.py",
        "jnp.repeat(video[:, -1:], count",
        "jnp.repeat(video[:, :1], count",
        "test_autoencoder",
        "padding_is_undone",
    ),
    Mutant(
        "frames are cropped at the front",
        "_frames.py",
        "return video[:, :t]",
        "return video[:, -t:]",
        "test_autoencoder",
        "padding_is_undone",
    ),
    # Slices.
    Mutant(
        "every slice is the first",
        "_transforms/sliced.py",
        "a[i : i + 1]",
        "a[:1]",
        "test_transforms",
        "sliced",
    ),
    Mutant(
        "slices of different batches are taken",
        "_transforms/sliced.py",
        "if len(batch) != 1:",
        "if not batch:",
        "test_transforms",
        "sliced_arguments",
    ),
    # Streams.
    Mutant(
        "a resumed stream skips a frame",
        _STREAMED,
        "self.frame += done.frames",
        "self.frame += done.frames + 1",
        "test_streams",
        "saved_cache_resumes",
    ),
    Mutant(
        "the caller's cache is given away",
        _STREAMED,
        "jnp.array(x, copy=True)",
        "jnp.asarray(x)",
        "test_streams",
        "saved_cache_resumes",
    ),
    Mutant(
        "a stream takes frames of any size",
        _STREAMED,
        "if (self._like or like) != like:",
        "if not like:",
        "test_streams",
        "bad_streams",
    ),
    Mutant(
        "a first batch of unknown length has no remainder",
        _STREAMED,
        "first = self._size + self._waiting[0].shape[1] % self._size",
        "first = self._size",
        "test_streams",
        "takes_arrays_and_iterators or short_clips",
    ),
    Mutant(
        "pixels are computed in the model's own dtype",
        _STREAMED,
        "quantised(at_least_float32(frames))",
        "quantised(frames.astype(jnp.bfloat16).astype(jnp.float32))",
        "test_streams",
        "pixels_before_they_leave",
    ),
    Mutant(
        "an interrupt during a step is forgotten",
        "_transforms/interruption.py",
        "if self._pending is not None:\n            pending, self._pending",
        "if self._pending is None:\n            pending, self._pending",
        "test_faults",
        "interrupt",
    ),
    # Tiles.
    Mutant(
        "a ramp starts at 1",
        _TILED,
        "(jnp.arange(extent, dtype=jnp.float32) / extent)",
        "((1 + jnp.arange(extent, dtype=jnp.float32)) / extent)",
        "test_tiles",
        "blend",
    ),
    Mutant(
        "a ramp runs backwards",
        _TILED,
        "tail.astype(dtype) * (1 - ramp) + head.astype(dtype) * ramp",
        "tail.astype(dtype) * ramp + head.astype(dtype) * (1 - ramp)",
        "test_tiles",
        "blend",
    ),
    Mutant(
        "a tile's stride is one cell longer",
        _TILED,
        "// down * down\n    if stride < 1",
        "// down * down + down\n    if stride < 1",
        "test_tiles",
        "equals_diffusers",
    ),
    Mutant(
        "columns are blended over the rows' overlap",
        _TILED,
        "_blended(line[-1], piece, column.lead, _WIDTH)",
        "_blended(line[-1], piece, row.lead, _WIDTH)",
        "test_tiles",
        "equals_diffusers",
    ),
    Mutant(
        "a tile that was moved inward is left out",
        _TILED,
        "starts = [*range(0, last, stride), last]",
        "starts = [*range(0, last + 1, stride)]",
        "test_tiles",
        "spans_cover",
    ),
    # Devices.
    Mutant(
        "a shard's halo is one row short",
        _SHARDED,
        '_LEAST = {"batch": 1, "height": 2, "width": 2}',
        '_LEAST = {"batch": 1, "height": 1, "width": 2}',
        "eight_devices",
        "what_does_not_divide or best_mesh or no_mesh",
    ),
    Mutant(
        "height is cut where width is asked for",
        _SHARDED,
        "PartitionSpec(self.batch, None, self.height, self.width, None)",
        "PartitionSpec(self.batch, None, self.width, self.height, None)",
        "eight_devices",
        "steps_are_exact and decode-8",
    ),
    Mutant(
        "the best mesh has the longest edges",
        _SHARDED,
        "height / way[1] + width / way[2]",
        "height / way[2] + width / way[1]",
        "eight_devices",
        "best_mesh",
    ),
    # The posterior and the configuration.
    Mutant(
        "log variances are not clamped above",
        "_posterior.py",
        "_LOGVAR_RANGE = (-30.0, 20.0)",
        "_LOGVAR_RANGE = (-30.0, 90.0)",
        "test_posterior",
        "clamped",
    ),
    Mutant(
        "a variance is taken for a deviation",
        "_posterior.py",
        "jnp.exp(0.5 * logvar)",
        "jnp.exp(logvar)",
        "test_posterior",
        "samples_have_the_moments",
    ),
    Mutant(
        "a divergence is not symmetric in its terms",
        "_posterior.py",
        "jnp.exp(logvar - to_logvar)",
        "jnp.exp(to_logvar - logvar)",
        "test_posterior",
        "divergence_from_another",
    ),
    Mutant(
        "odd frames are doubled too",
        "_config.py",
        "t = 2 * t - t % 2",
        "t = 2 * t",
        "test_config",
        "frame_counts",
    ),
    # Training.
    Mutant(
        "the average begins too slowly",
        "training/_trainer.py",
        "(1 + state.step) / (10 + state.step)",
        "(9 + state.step) / (10 + state.step)",
        "test_training",
        "a_step_is_that_of",
    ),
    Mutant(
        "every step draws the same noise",
        "training/_trainer.py",
        "jax.random.fold_in(key, state.step)",
        "jax.random.fold_in(key, 7 + 0 * state.step)",
        "test_training",
        "a_step_is_that_of",
    ),
    Mutant(
        "parts of a batch are added, not averaged",
        "training/_trainer.py",
        "x / self.accumulate, total",
        "x, total",
        "test_training",
        "less_memory",
    ),
    Mutant(
        "a crop is mirrored upside down",
        "training/_crops.py",
        "return crop[:, :, ::-1] if flipped",
        "return crop[:, ::-1] if flipped",
        "test_training",
        "crops_are_of_the_clip",
    ),
    Mutant(
        "crops forget their seed",
        "training/_crops.py",
        "np.random.default_rng([self._seed, index])",
        "np.random.default_rng([index])",
        "test_training",
        "crops_depend_on",
    ),
    Mutant(
        "a half scale counts twice",
        "training/_losses.py",
        "return total / count",
        "return total",
        "test_training",
        "losses_of_known_clips",
    ),
    Mutant(
        "the adaptive weight is upside down",
        "training/_adversarial.py",
        "by_loss / (by_term + _SMALLEST_NORM)",
        "by_term / (by_loss + _SMALLEST_NORM)",
        "test_adversarial",
        "a_step_is_torchs",
    ),
    Mutant(
        "the adaptive weight is differentiated",
        "training/_adversarial.py",
        "pull, (ascent,) = _stopped(pull), _stopped(back(jnp.ones_like(term)))",
        "(ascent,) = back(jnp.ones_like(term))",
        "test_adversarial",
        "a_step_is_torchs",
    ),
    Mutant(
        "the VAE helps the discriminator",
        "training/_adversarial.py",
        "discriminator(clips), discriminator(_stopped(decoded))",
        "discriminator(clips), discriminator(decoded)",
        "test_adversarial",
        "a_step_is_torchs",
    ),
    Mutant(
        "the discriminator learns to be fooled",
        "training/_adversarial.py",
        "fixed = _stopped(discriminator)",
        "fixed = discriminator",
        "test_adversarial",
        "a_step_is_torchs",
    ),
    Mutant(
        "the discriminator begins at once",
        "training/_adversarial.py",
        "jnp.where(step < self.start, old, new)",
        "jnp.where(step < 0, old, new)",
        "test_adversarial",
        "two_hundred_steps",
    ),
    Mutant(
        "the term begins at once",
        "training/_adversarial.py",
        "jnp.where(step < self.start, 0, ",
        "jnp.where(step < 0, 0, ",
        "test_adversarial",
        "two_hundred_steps",
    ),
    Mutant(
        "a discriminator's optimiser is not asked for its kind",
        "training/_states.py",
        "*_kinds(state.optimiser), *_kinds(state.discriminator_optimiser)",
        "*_kinds(state.optimiser)",
        "test_adversarial",
        "another_optimiser_of_the_discriminator",
    ),
    Mutant(
        "a change is merged twice",
        "training/_lora.py",
        "(kernel, bias))",
        "(2 * kernel - node.weight, bias))",
        "test_lora",
        "merged_it_is_the_same",
    ),
    Mutant(
        "changes are not zero at first",
        "training/_lora.py",
        "jnp.zeros((*(1 for _ in sizes), rank, o), dtype)",
        "jnp.ones((*(1 for _ in sizes), rank, o), dtype)",
        "test_lora",
        "the_same_at_first",
    ),
    Mutant(
        "half of a pair is enough",
        "training/_lora.py",
        "if partner not in tensors:",
        "if partner not in convs:",
        "test_lora",
        "wrong_files",
    ),
    Mutant(
        "a loss of one's own has no weight",
        "training/_clip_loss.py",
        "self.perceptual_weight * terms",
        "terms",
        "test_training",
        "ones_own_is_weighed",
    ),
    # Files.
    Mutant(
        "a file that failed is left behind",
        "_files.py",
        "partial.unlink(missing_ok=True)",
        "pass",
        "test_faults",
        "full_disk_leaves_the_old_file",
    ),
    Mutant(
        "a file is written in place",
        "_files.py",
        "partial = _partial(path.parent, path)",
        "partial = path",
        "test_faults",
        "full_disk_leaves_the_old_file",
    ),
    Mutant(
        "a pixel is rounded down",
        "_pixels.py",
        "module.rint((module.clip",
        "module.floor((module.clip",
        "test_video",
        "written_is_read or pixels_are_converted",
    ),
    Mutant(
        "a PSNR is of values in [0, 1]",
        "video/_psnr.py",
        "10 * math.log10(4 / mse)",
        "10 * math.log10(1 / mse)",
        "test_video",
        "psnr",
    ),
    Mutant(
        "the weights are left out of a clip's key",
        "dataset/_store.py",
        "key = digest(self.weights, self.settings.identity(), sha256, name, start, *rule)",
        'key = digest("", self.settings.identity(), sha256, name, start, *rule)',
        "test_dataset",
        "what_changes_gets_another_name",
    ),
    Mutant(
        "a video with one clip left counts as done",
        "dataset/_store.py",
        "all(map(self.has, ids))",
        "any(map(self.has, ids))",
        "test_dataset",
        "interrupted or lost or missing or finished or killed",
    ),
    Mutant(
        "a dataset's first batch is short",
        "dataset/_clips.py",
        "held, due, count = [], SAMPLE_BATCH + 1, 0",
        "held, due, count = [], SAMPLE_BATCH, 0",
        "test_dataset",
        "clips_are_what_the_model_encodes",
    ),
    # Checkpoints and latents files.
    Mutant(
        "a kernel's input and output channels are swapped",
        "_checkpoint/names.py",
        "5: (2, 3, 4, 1, 0)",
        "5: (2, 3, 4, 0, 1)",
        "test_checkpoint",
        "diffusers_loads_what_we_save",
    ),
    Mutant(
        "the original's up blocks are not reversed",
        "_checkpoint/names.py",
        "blocks - 1 - int(level[1])",
        "int(level[1])",
        "test_checkpoint",
        "test_original",
    ),
    Mutant(
        "weights that are not finite are loaded",
        "_checkpoint/checkpoint.py",
        "if not _is_finite(array):",
        "if False:",
        "test_checkpoint",
        "overflow_is_named or bad_checkpoints",
    ),
    Mutant(
        "the shards of an old checkpoint stay",
        "_checkpoint/checkpoint.py",
        "(folder / INDEX).unlink(missing_ok=True)",
        "pass",
        "test_checkpoint",
        "saving_over_a_sharded_checkpoint",
    ),
    Mutant(
        "latents of others are not turned",
        "_latents.py",
        "array = np.moveaxis(array, 1, -1)",
        "array = np.moveaxis(array, 1, 1)",
        "test_latents",
        "foreign_layouts",
    ),
    Mutant(
        "latents with NaN are loaded",
        "_latents.py",
        "wrong = ~np.isfinite(np.asarray(latents))",
        "wrong = np.isinf(np.asarray(latents)) & False",
        "test_latents",
        "broken_latents",
    ),
    Mutant(
        "every clip of a dataset draws the same noise",
        "dataset/_latents_source.py",
        "noise = np.random.default_rng((*self._seeds, number))",
        "noise = np.random.default_rng(self._seeds)",
        "test_latents_source",
        "samples_are_the_keys",
    ),
    # The command line, plans and previews.
    Mutant(
        "a plan counts each program once",
        "_plan.py",
        "return sum(program.calls * program.flop for program in programs)",
        "return sum(program.flop for program in programs)",
        "test_plan",
        "arithmetic_is_that_of_the_compiler or arithmetic_grows",
    ),
    Mutant(
        "a plan puts every array on a device",
        "_plan.py",
        "own if place is None and alone else place",
        "SingleDeviceSharding(jax.devices()[0])",
        "test_plan",
        "planned_programs_are_those",
    ),
    Mutant(
        "the command line forgets the first batch",
        "_cli/clips.py",
        "cv.streamed(vae.decode_step, LATENT_BATCH, first=first)",
        "cv.streamed(vae.decode_step, LATENT_BATCH)",
        "test_cli",
        "the_first_latent_alone",
    ),
    Mutant(
        "a dataset's lone last latent begins a clip",
        "dataset/_decode.py",
        "cache if self.first is None else continued(cache)",
        "cache",
        "test_cli",
        "the_first_latent_alone",
    ),
    Mutant(
        "Excel's line is taken for a header",
        "dataset/_lists.py",
        "if named := _EXCEL.match(text):",
        'if named := re.match("$^", text):',
        "test_dataset_inputs",
        "lists_under_another",
    ),
    Mutant(
        "a NUL byte in a name passes",
        "_files.py",
        'if "\\0" in name:',
        "if not name:",
        "test_files",
        "nul_byte",
    ),
    Mutant(
        "a preview is not brought back to [-1, 1]",
        "preview.py",
        "jnp.clip(y[:, skipped:], 0, 1) * 2 - 1",
        "jnp.clip(y[:, skipped:], 0, 1)",
        "test_preview",
        "decoding_equals_torch",
    ),
    Mutant(
        "a preview's first latent gives four frames",
        "preview.py",
        "cache is None and latents.shape[1] % 2 else 0",
        "cache is None and latents.shape[1] % 2 == 7 else 0",
        "test_preview",
        "decoding_equals_torch or latent_alone",
    ),
    Mutant(
        "the command line pads to 8k",
        "_cli/passes.py",
        "(1 - self.count) % SAMPLE_BATCH",
        "(-self.count) % SAMPLE_BATCH",
        "test_cli",
        "do_not_round_trip",
    ),
    # The adapter.
    Mutant(
        "video comes back BTHWC",
        "diffusers/_tensors.py",
        "tensor.permute(0, 4, 1, 2, 3)",
        "tensor.permute(0, 1, 4, 2, 3)",
        "test_diffusers",
        "test_layouts or every_bit",
    ),
    Mutant(
        "what is lazily conjugated is lost",
        "diffusers/_tensors.py",
        ".resolve_conj().resolve_neg()",
        "",
        "test_diffusers",
        "negated_or_conjugated",
    ),
    Mutant(
        "tiles are asked for and not made",
        "diffusers/_running.py",
        "if tile is not None:\n            overlap",
        "if tile is None:\n            overlap",
        "test_diffusers",
        "pipelines_give_the_same_frames",
    ),
    Mutant(
        "cotangents are taken for inputs",
        "diffusers/_call.py",
        "arrays[: self.inputs], arrays[self.inputs :]",
        "arrays[-self.inputs :], arrays[: -self.inputs]",
        "test_diffusers",
        "gradients_of_decoding",
    ),
)


def occurrences(mutant: Mutant) -> int:
    """How often the old text is in its file: once, or the edit is not the one that was meant."""
    return (ROOT / "eqx_cogvae" / mutant.file).read_text("utf-8").count(mutant.old)


def copied(folder: Path) -> None:
    """The sources and tests, and nothing that was built."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    # Programs that the edit does not change need not be compiled again.
    cache = ROOT / ".jax_cache"
    cache.mkdir(exist_ok=True)
    (folder / ".jax_cache").symlink_to(cache.resolve())


@functools.cache
def passes(tests: str, only: str, folder: Path) -> bool:
    """Whether the tests pass without an edit: else their failure would say nothing."""
    return run(tests, only, folder) == 0


def outcome(mutant: Mutant, folder: Path) -> str:
    """Says "caught", or what else became of the tests with the edit."""
    if not passes(mutant.tests, mutant.only, folder):
        return "SURVIVED: the tests fail, or are none, without the edit"
    path = folder / "eqx_cogvae" / mutant.file
    sound = path.read_text("utf-8")
    path.write_text(sound.replace(mutant.old, mutant.new), "utf-8")
    try:
        code = run(mutant.tests, mutant.only, folder)
    finally:
        path.write_text(sound, "utf-8")
    # Tests that never end are noticed as well.
    return "SURVIVED" if code == 0 else "caught"


def run(tests: str, only: str, folder: Path) -> int | None:
    """pytest's exit code; None where it was stopped."""
    own = {"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"}
    own |= EIGHT if tests == "eight_devices" else {}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider"]
    command += [f"tests/{tests}.py", "-k", only]
    try:
        done = subprocess.run(
            command, cwd=folder, env=os.environ | own, capture_output=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return None
    return done.returncode


def main() -> int:
    """0 where all are caught, 1 where one survives, 2 where one does not apply."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="WORD", help="edits whose names hold one")
    parser.add_argument("--list", action="store_true", help="run nothing")
    options = parser.parse_args()
    words = options.only or [""]
    chosen = [m for m in MUTANTS if any(word in m.name for word in words)]
    stale = [m for m in chosen if occurrences(m) != 1]
    for mutant in stale:
        print(f"{mutant.name}: its old text is {occurrences(mutant)} times in {mutant.file}")
    if stale or not chosen:
        return 2
    if options.list:
        print(*(f"{m.file}: {m.name} ({m.tests})" for m in chosen), f"{len(chosen)}", sep="\n")
        return 0
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copied(Path(folder))
        for mutant in chosen:
            begun = time.perf_counter()
            found = outcome(mutant, Path(folder))
            survivors += found != "caught"
            seconds = time.perf_counter() - begun
            print(f"{found:8} {seconds:6.0f} s  {mutant.file}: {mutant.name}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
